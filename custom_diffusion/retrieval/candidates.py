"""What every source yields, and the text rules that all sources share."""

import re
import unicodedata
from dataclasses import dataclass
from urllib.parse import urlsplit


class SourceError(Exception):
    """A source cannot be used; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Candidate:
    """A picture that may become a class image.

    Args:
        caption: one line, never empty.
        url: one line; an http(s) address to download, or, with `picture`, only where the picture came from.
        picture: the encoded file itself, when the source has it.
    """

    caption: str
    url: str
    picture: bytes | None = None


def one_line(value) -> str:
    """Any value a source may send as text, on one line; "" for None, NaN and what is not text.

    Line separators that only Unicode knows (U+2028, U+0085) and control characters count as spaces too: a list must have
    one line a picture for whoever reads it, also with `str.splitlines`.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        return ""
    # Surrogates (half of an emoji cut off by somebody's truncation) cannot be written as UTF-8.
    value = value.encode("utf-8", errors="replace").decode("utf-8")
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in value).split())


def is_web_url(url: str) -> bool:
    """Whether it is an absolute http(s) address with a host."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def singular_forms(word: str) -> set[str]:
    """What a word may be the simple plural of, itself included: boxes -> boxes, boxe, box."""
    forms = {word}
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        forms.add(word[:-1])
        if word.endswith("ies"):
            forms.add(word[:-3] + "y")
        if re.search(r"(s|x|z|ch|sh|o)es$", word):
            forms.add(word[:-2])
    return forms


def words(text: str) -> list[str]:
    """Words in reading order, case and width folded."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def caption_matcher(class_prompt: str):
    """A function that says whether a caption has every word of the class prompt as a whole word.

    Case and simple plurals are folded on both sides, order and distance do not matter: "wooden pot" takes
    "Two Pots, hand-made, wooden".

    Raises:
        ValueError: the prompt has no word.
    """
    wanted = [singular_forms(word) for word in words(class_prompt)]
    if not wanted:
        raise ValueError(f"class prompt {class_prompt!r} has no word to look for in captions")
    # Captions are scanned by the million: a substring test on the shortest forms settles most of them.
    stems = [min(forms, key=len) if class_prompt.isascii() else "" for forms in wanted]

    def matches(caption: str) -> bool:
        if caption.isascii():
            lowered = caption.lower()
            if not all(stem[:-1] in lowered for stem in stems):
                return False
        present = set().union(*map(singular_forms, words(caption)))
        return all(not forms.isdisjoint(present) for forms in wanted)

    return matches
