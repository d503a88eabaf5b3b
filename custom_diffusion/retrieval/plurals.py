"""English plurals: which words a word may be the plural of, and the other way round.

A table, because the libraries that know more cost more or know less: inflect 7.6 takes 1.7 seconds to import and makes
"sunglassess" and "thiefs", inflection 0.5 makes "gooses" and "tooths" and takes "cactus" for a plural.
"""

import re

# Irregular plurals, each with its singular; "person" also has the regular one.
IRREGULAR = {
    "men": "man", "women": "woman", "people": "person", "children": "child", "oxen": "ox",
    "mice": "mouse", "lice": "louse", "dice": "die", "geese": "goose", "feet": "foot", "teeth": "tooth",
    "wolves": "wolf", "knives": "knife", "wives": "wife", "lives": "life", "leaves": "leaf", "loaves": "loaf",
    "shelves": "shelf", "halves": "half", "calves": "calf", "scarves": "scarf", "hooves": "hoof", "thieves": "thief",
    "elves": "elf", "selves": "self", "dwarves": "dwarf", "wharves": "wharf", "sheaves": "sheaf",
    "cacti": "cactus", "fungi": "fungus", "octopi": "octopus", "hippopotami": "hippopotamus", "alumni": "alumnus",
    "nuclei": "nucleus", "larvae": "larva", "antennae": "antenna", "algae": "alga", "bacteria": "bacterium",
    "oases": "oasis", "axes": "axis", "matrices": "matrix", "vertices": "vertex", "quizzes": "quiz", "buses": "bus",
    "busses": "bus",
}  # fmt: skip
# Endings of compounds: firemen, grandchildren, dormice, housewives, werewolves, bookshelves.
COMPOUND = {"men": "man", "children": "child", "mice": "mouse", "wives": "wife", "wolves": "wolf", "shelves": "shelf", "knives": "knife"}  # fmt: skip
PLURALS = {singular: [p for p, s in IRREGULAR.items() if s == singular] for singular in IRREGULAR.values()}


def singular_forms(word: str) -> set[str]:
    """What a word may be the plural of, itself included: boxes -> boxes, boxe, box; mice -> mice, mouse."""
    forms = {word}
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        forms.add(word[:-1])
        if word.endswith("ies"):
            forms.add(word[:-3] + "y")
        if re.search(r"(s|x|z|ch|sh|o)es$", word):
            forms.add(word[:-2])
    if word in IRREGULAR:
        forms.add(IRREGULAR[word])
    for plural, singular in COMPOUND.items():
        if word.endswith(plural):
            forms.add(word.removesuffix(plural) + singular)
    return forms


LONGEST_ENDING = 3  # of a plural beyond its stem: -ies, -zes


def stems(forms: set[str]) -> set[str]:
    """With which every word begins whose singular forms include one of `forms`; at most `LONGEST_ENDING` letters follow."""
    found = set()
    for form in forms:
        found.add(form.removesuffix("y"))  # puppy, puppies
        found.update(PLURALS.get(form, ()))
        found.update(form.removesuffix(s) + p for p, s in COMPOUND.items() if form.endswith(s))
    return found
