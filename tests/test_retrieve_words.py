"""Which captions name the class, and the first look that Arrow takes at them."""

import random
import sys
import unicodedata

import pyarrow
import pytest

from custom_diffusion.retrieval.captions import MADE_ASCII, WITHOUT_SPACES, ClassWords, folded, words
from custom_diffusion.retrieval.plurals import IRREGULAR, singular_forms


@pytest.mark.parametrize(
    "class_prompt, caption, matches",
    [
        ("mouse", "two mice", True), ("wolf", "Wolves at night", True), ("child", "Children playing", True),
        ("person", "old people", True), ("person", "two persons", True), ("knife", "kitchen knives", True),
        ("people", "a person", True), ("mice", "a mouse", True), ("fireman", "firemen", True), ("wife", "housewives", False),
        ("housewife", "housewives", True), ("quiz", "quizzes", True), ("love", "loaf", False), ("leaf", "leaves", True),
        ("goose", "geese!", True), ("mongoose", "mongooses", True), ("lice", "police", False), ("police", "lice", False),
        ("猫", "黒い猫がいる", True), ("猫", "犬がいる", False), ("고양이", "고양이가 잔다", True), ("แมว", "แมวสองตัว", True),
        ("แมว", "หมาสองตัว", False), ("ねこ", "白いねこと犬", True), ("黒い 猫", "猫は黒い", True), ("ｶﾞﾗｽ", "ガラスの瓶", True),
        ("बिल्ली", "काली बिल्ली", True), ("बिल", "काली बिल्ली", False), ("chat", "un chât noir", False), ("cat", "ＣＡＴ", True),
        ("ﬁsh", "two fish", True), ("fish", "two ﬁshes", True), ("cat", "cat_toy", True), ("hoover", "hooves", False),
        # Words are all that is looked at.
        ("cat", "no cat here", True), ("cat", "a CAT scan", True),
    ],
)  # fmt: skip
def test_words_of_every_script_and_irregular_plurals(class_prompt, caption, matches):
    assert ClassWords(class_prompt).matches(caption) is matches


def test_other_names_and_words_to_leave_out():
    wanted = ClassWords("cat", also=("kitten", "tabby tom"), without=("scan", "hello kitty"))
    assert [wanted.matches(text) for text in ("kittens", "a tom, tabby", "tabby", "cats", "dog")] == [1, 1, 0, 1, 0]
    assert [wanted.excludes(text) for text in ("CAT scans", "Kitty says hello", "kitty", "cat")] == [1, 1, 0, 0]


def random_captions(randomness, number):
    """Captions of several scripts, full of what is almost a plural, and of what folding changes."""
    pieces = [
        *IRREGULAR, *IRREGULAR.values(), "cat", "Cats", "scat", "category", "puppies", "PUPPY", "boxes", "bus", "glasses", "pot", "wooden",
        "ＣＡＴ", "ﬁsh", "ｋｎｉｖｅｓ", "ªnt", "𝒄𝒂𝒕", "Ⓒat", "caſtle", "\u212anife", "cat\u0301", "straße", "STRASSE", "cafe\u0301", "café",
        "firemen", "bookshelves", "猫", "黒い", "고양이", "가", "แมว", "ผู้", "кот", "КОТЫ", "बिल्ली", "ΣΊΣΥΦΟΣ", "\ufb03", "🐈", "1", "２",
    ]  # fmt: skip
    joints = ["", " ", "-", "_", "'", "\u2019", ", ", "\u00a0", "s", "S ", "es", "\u200d", "\n", "。"]
    for _ in range(number):
        chosen = randomness.choices(pieces, k=randomness.randint(1, 5))
        text = "".join(piece + randomness.choice(joints) for piece in chosen)
        if randomness.random() < 0.3:
            code = randomness.choice((randomness.randrange(0x20, 0x3000), randomness.randrange(0xA000, 0x1FFFF)))
            text = text.replace(randomness.choice(text), chr(code) if not 0xD800 <= code < 0xE000 else "x")
        yield unicodedata.normalize(randomness.choice(("NFC", "NFD", "NFKD")), text)


def plainly_matches(prompt, caption):
    """What the matcher is to say, without its short cuts."""
    return all(
        word in folded(caption)
        if WITHOUT_SPACES.search(word)
        else any(singular_forms(word) & singular_forms(other) for other in words(caption))
        for word in words(prompt)
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_first_look_passes_all_that_the_matcher_takes(seed):
    randomness = random.Random(seed)
    captions = list(random_captions(randomness, 1000))
    prompts = [
        "cat", "cats", "boxes", "mouse", "people", "puppy", "knife", "fish", "wooden pot", "猫", "고양이", "แมว", "кот", "straße",
        "strasse", "iPhone猫", "fireman", "bookshelf", "y", "s", "1", "ant", "castle", "café", "σίσυφος", "quiz", "bus", "glass", "men", "die",
    ]  # fmt: skip
    num_matches = 0
    for prompt in prompts:
        for wanted in (ClassWords(prompt), ClassWords("zebra", also=("kitten", prompt))):
            passed = wanted.may_match(pyarrow.array(captions)).to_pylist()
            matched = [wanted.matches(caption) for caption in captions]
            assert matched == [plainly_matches(prompt, caption) for caption in captions], prompt
            assert not [c for c, p, m in zip(captions, passed, matched) if m and not p], prompt
            num_matches += sum(matched)
    assert num_matches > 1000


def test_few_others_pass_the_first_look():
    captions = ["category", "scat", "education", "a black dog", "“quoted” — dash…", "naïve café"]
    assert not any(ClassWords("cat").may_match(pyarrow.array(captions)).to_pylist())


def test_characters_that_folding_makes_ascii_are_known():
    made = [
        chr(code)
        for code in range(128, sys.maxunicode + 1)
        if not 0xD800 <= code < 0xE000
        and any(c.isascii() and c.isalnum() for c in unicodedata.normalize("NFKC", chr(code)).casefold())
    ]
    import pyarrow.compute as pc

    assert len(made) > 1000
    assert pc.all(pc.match_substring_regex(pyarrow.array(made), f"[{MADE_ASCII}]")).as_py()


def test_a_column_of_any_type_is_looked_at():
    wanted = ClassWords("cat")
    texts = ["a cat", None, "dog"]
    for column in (
        texts,
        pyarrow.array(texts),
        pyarrow.array(texts, pyarrow.large_string()),
        pyarrow.array(texts).dictionary_encode(),
    ):
        likely = wanted.likely(column)
        assert likely.values[0] == "a cat" and likely.indices[0] == 0
        assert (likely.num_missing, likely.num_undecodable) == (1, 0)
    lists = wanted.likely(pyarrow.array([["a dog", "a cat"], None]))
    assert lists.values == [["a dog", "a cat"]] and lists.num_missing == 1
    broken = pyarrow.array([b"a cat \xff", b"a cat"]).view(pyarrow.string())
    assert (wanted.likely(broken).values, wanted.likely(broken).num_undecodable) == (["a cat"], 1)
