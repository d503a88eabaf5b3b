"""Which captions name the class."""

import re
import unicodedata
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from custom_diffusion.retrieval.plurals import LONGEST_ENDING, singular_forms, stems

# Thai, Lao, Tibetan, Burmese, Khmer; kana and Han, which write no spaces; Hangul, whose particles follow the word.
WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff\u3005\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Characters of which normalization makes ASCII letters or digits (full-width, ligatures, superscripts), and neighbours
# of theirs that captions seldom have.
MADE_ASCII = (
    "\u00aa-\u00be\u00df\u0130-\u0149\u017f\u01c4-\u01cc\u01f0-\u01f3\u02b0-\u02b8\u02e1-\u02e3\u1d2c-\u1d65\u1d9c-\u1da0\u1dbb"
    "\u1e96-\u1e9e\u2070-\u20a8\u2100-\u2189\u2460-\u24ea\u2c7c-\u2c7d\u3250-\u325f\u32b1-\u32cf\u3358-\u33ff\ua7f1-\ua7f4"
    "\ufb00-\ufb06\uff10-\uff5a\U000107a5\U0001ccd6-\U0001ccf9\U0001d400-\U0001d6a3\U0001d7ce-\U0001d7ff\U0001f100-\U0001f190"
    "\U0001fbf0-\U0001fbf9"
)


def folded(text: str) -> str:
    """Case and width folded."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def words(text: str) -> list[str]:
    """Words in reading order, case and width folded; vowel signs and accents belong to their letter."""
    text = folded(text)
    if text.isascii():
        return re.findall(r"[^\W_]+", text)
    return ["".join(letters) for is_word, letters in groupby(text, _is_of_word) if is_word]


def _is_of_word(character):
    return character.isalnum() or unicodedata.category(character).startswith("M")


class _Word:
    """One wanted word."""

    def __init__(self, word):
        self.is_part = bool(WITHOUT_SPACES.search(word))
        self._word = word
        self._forms = singular_forms(word)
        self._stems = tuple(stems(self._forms))

    def may_be_in(self, text):
        """Whether folded text may have it: a quick look that says no to most."""
        return self._word in text if self.is_part else any(stem in text for stem in self._stems)

    def is_in(self, text_words):
        """Whether it is one of a text's words, the text having passed `may_be_in`."""
        return self.is_part or any(
            not self._forms.isdisjoint(singular_forms(word)) for word in text_words if word.startswith(self._stems)
        )

    def pattern(self):
        """A regular expression for RE2, which finds it in captions that are not folded; None for a word beyond ASCII."""
        if not self._word.isascii():
            return None
        begins = "|".join(sorted(self._stems))
        # What is no letter or digit of ASCII may be one after folding, but then it is in MADE_ASCII.
        return f"(?:^|[^A-Za-z0-9])(?i:(?:{begins})[a-z]{{0,{LONGEST_ENDING}}})(?:$|[^A-Za-z0-9])|[{MADE_ASCII}]"


class ClassWords:
    """The words that a caption of the class must have, or must not.

    A caption names the class when it has every word of the class prompt, or every word of one of `also`, each as a whole
    word. Case and plurals are folded on both sides, order and distance do not matter: "wooden pot" takes "Two Pots,
    hand-made, wooden". Words of scripts that write no spaces may be anywhere.

    Args:
        class_prompt: the class.
        also: other names of it.
        without: words or phrases whose captions are left out.
    Raises:
        ValueError: one of them has no word.
    """

    def __init__(self, class_prompt: str, also: tuple[str, ...] = (), without: tuple[str, ...] = ()):
        self.prompt = class_prompt
        self.also = tuple(also)
        self.without = tuple(without)
        self._wanted = [_phrase(text) for text in (class_prompt, *also)]
        self._unwanted = [_phrase(text) for text in without]

    def matches(self, caption: str) -> bool:
        """Whether the caption names the class."""
        return _has_one(caption, self._wanted)

    def excludes(self, caption: str) -> bool:
        """Whether the caption has one of the words to leave out."""
        return _has_one(caption, self._unwanted)

    def likely(self, values) -> "Likely":
        """Those of a column's captions that `matches` may take.

        Args:
            values: Arrow array, or list, of what a caption column holds.
        """
        if isinstance(values, list):
            there = [(index, value) for index, value in enumerate(values) if value is not None]
            return Likely([i for i, _ in there], [v for _, v in there], len(values) - len(there), 0)
        import pyarrow.compute as pc
        import pyarrow.types as types

        if types.is_dictionary(values.type):
            values = values.dictionary_decode()
        indices = pc.indices_nonzero(
            self.may_match(values)
            if types.is_string(values.type) or types.is_large_string(values.type)
            else values.is_valid()
        )
        found = _to_python(values.take(indices))
        there = [(i, value) for i, value in zip(indices.to_pylist(), found) if value is not None]
        return Likely([i for i, _ in there], [v for _, v in there], values.null_count, len(indices) - len(there))

    def may_match(self, captions):
        """A first look at many captions at once.

        Args:
            captions: Arrow array of strings.
        Returns:
            Arrow array of booleans, true for all that `matches` takes and for few others; null for null.
        """
        import pyarrow.compute as pc

        found = None
        for phrase in self._patterns:
            in_phrase = None
            for pattern in phrase:
                # An ASCII caption stays ASCII when it is folded, so it cannot have a word beyond ASCII.
                has = (
                    pc.invert(pc.string_is_ascii(captions))
                    if pattern is None
                    else pc.match_substring_regex(captions, pattern)
                )
                in_phrase = has if in_phrase is None else pc.and_(in_phrase, has)
            found = in_phrase if found is None else pc.or_(found, in_phrase)
        return found

    @cached_property
    def _patterns(self):
        return [[word.pattern() for word in phrase] for phrase in self._wanted]


class Likely(NamedTuple):
    """Captions to look at: their indices in the column, their values, and how many others there are none of."""

    indices: list[int]
    values: list
    num_missing: int
    num_undecodable: int


def first_values(values, number: int = 10) -> list:
    """The first values of an Arrow array or list."""
    return values[:number] if isinstance(values, list) else _to_python(values.slice(0, number))


def _to_python(array):
    """The array's values; None for text that is not UTF-8."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [value.as_py() if _is_decodable(value) else None for value in array]


def _is_decodable(value):
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _phrase(text):
    found = [_Word(word) for word in words(text)]
    if not found:
        raise ValueError(f"{text!r} has no word to look for in captions")
    return found


def _has_one(caption, phrases):
    """Whether the caption has every word of one of the phrases."""
    text = folded(caption)
    likely = [phrase for phrase in phrases if all(word.may_be_in(text) for word in phrase)]
    if not likely:
        return False
    text_words = words(caption)
    return any(all(word.is_in(text_words) for word in phrase) for phrase in likely)
