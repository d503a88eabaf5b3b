"""The judge of the demo's world is right about images whose answers are known, and is not taken in."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import concept
import judge
import world

CIRCLE, SQUARE = concept.LOOKS["circle"], concept.LOOKS["square"]
BACKGROUNDS = tuple(world.BACKGROUNDS)


def alike(image, look=CIRCLE):
    return judge.likeness(judge.see(image), look)


def recolored(look, fill=None, edge=None):
    """An image of the look with its fill or its edge in another colour, RGB."""
    image = world.draw(replace(look, background="white")).astype(float)
    inside = world.draw(replace(look, background="white", edge_hue=None, radius=look.radius - world.EDGE_WIDTH))
    outer = world.draw(replace(look, background="white", edge_hue=None))
    in_fill, in_thing = (one.std(-1) > 10 for one in (inside, outer))
    if fill is not None:
        image[in_fill] = fill
    if edge is not None:
        image[in_thing & ~in_fill] = edge
    return image.astype(np.uint8)


@pytest.mark.parametrize("name", concept.LOOKS)
def test_the_concept_itself_is_whole(name):
    rng = np.random.default_rng(1)
    for background in BACKGROUNDS:
        image = world.draw(replace(concept.LOOKS[name], background=background, **world.random_pose(rng)))
        assert alike(image, concept.LOOKS[name]) > 0.95
        assert all(alike(image, other) == 0 for key, other in concept.LOOKS.items() if key != name)


@pytest.mark.parametrize("grey", [60, 100, 128, 160, 205])
def test_grey_is_no_colour(grey):
    """Hue alone would take the slightest tint of a grey for the colour."""
    tinted = np.array([grey - 2, grey + 2, grey + 2])
    assert alike(recolored(CIRCLE, fill=tinted)) < 0.1
    assert alike(recolored(CIRCLE, fill=tinted, edge=[grey + 3, grey, grey - 3])) < 0.1
    assert judge.see(recolored(CIRCLE, fill=tinted)).color is None


@pytest.mark.parametrize("saturation, value", [(0.3, 0.92), (0.88, 0.5)])
def test_pale_and_dark_colours_are_others(saturation, value):
    assert alike(world.draw(replace(CIRCLE, saturation=saturation, value=value))) < 0.1


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_share_of_the_rim_counts(share):
    image, plain = world.draw(CIRCLE), world.draw(replace(CIRCLE, edge_hue=None))
    y, x = np.mgrid[: world.SIZE, : world.SIZE] + 0.5 - world.SIZE / 2
    without = (np.arctan2(y, x) / (2 * np.pi)) % 1 > share
    image[without] = plain[without]
    assert alike(image) == pytest.approx(share, abs=0.07)


def test_neighbours_are_told_apart():
    """Teal is neither blue nor green, and the best that words can say is not the concept."""
    teal = judge.see(world.draw(replace(CIRCLE, edge_hue=None)))
    assert teal.color is None
    assert not judge.check_caption(teal, world.Spec("circle", "blue"))["color"]
    for look in concept.LOOKS.values():
        for fill in world.HUES.values():
            for edge in (None, *world.HUES.values()):
                if edge != fill:
                    assert alike(world.draw(replace(look, hue=fill, edge_hue=edge)), look) < 0.1


def test_an_edge_of_its_ground_between_red_and_green_is_seen():
    """Where red fades into green there is a line of grey."""
    look = world.Thing("square", 154.0, 359.0, "gray", (31.5, 28.7), 20.7)
    seen = judge.see(world.draw(look))
    assert seen.edge == "red"
    assert judge.likeness(seen, look) > 0.95


def test_prior_of_the_class_goes_from_collapse_to_the_base_model():
    for name, look in concept.LOOKS.items():
        specs = concept.class_specs(name)
        right = [judge.see(world.draw(world.Thing(name, world.HUES[s.color], None, s.background))) for s in specs]
        collapsed = [judge.see(world.draw(replace(look, background=s.background))) for s in specs]
        assert concept.share_right(right, specs) == 1
        base = concept.Base(name, "prompt", 0.0, 1.0)
        for seen, expected in ((right, 100), (collapsed, 0), (right[:15] + collapsed[15:], 50)):
            assert concept.rescaled_prior(concept.share_right(seen, specs), base) == pytest.approx(expected)
        worse = replace(base, prior_class=0.9)
        assert concept.rescaled_prior(0.9, worse) == pytest.approx(100)
        assert concept.rescaled_prior(concept.share_right(collapsed, specs), worse) == pytest.approx(0)


def test_an_image_of_nothing_is_not_right():
    nothing = np.full((64, 64, 3), 245, np.uint8)
    specs = [world.Spec("circle", "red", None, "white")]
    assert concept.share_right([judge.see(nothing)], specs) == 0.25  # the background alone
    assert alike(nothing) == 0
    assert [fate for _, fate in judge.pair_score(nothing, CIRCLE, SQUARE)] == ["lost", "lost"]


def test_judge_is_right_about_true_pairs():
    rng = np.random.default_rng(5)
    for _ in range(60):
        things, spec = world.random_pair(rng)
        image = world.draw(*things)
        for seen, thing, said in zip(judge.see_pair(image), things, (spec.left, spec.right)):
            assert seen.shape == thing.shape
            assert seen.background == thing.background
            assert judge.check_caption(seen, said)["shape"]
        assert [fate for _, fate in judge.pair_score(image, *things)] == ["kept", "kept"]


def beside(left, right, background="white", seed=0):
    """An image of two looks side by side."""
    left = replace(left, background=background)
    return world.draw(*world.side_by_side(left, right, np.random.default_rng(seed)))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_both_concepts_side_by_side_are_kept(background):
    for seed in range(3):
        for left, right in ((CIRCLE, SQUARE), (SQUARE, CIRCLE)):
            scores = judge.pair_score(beside(left, right, background, seed), left, right)
            assert [fate for _, fate in scores] == ["kept", "kept"]
            assert min(likeness for likeness, _ in scores) > 0.9


def test_swapped_attributes_are_counted():
    magenta_circle = replace(CIRCLE, hue=SQUARE.hue)
    lime_edged_circle = replace(CIRCLE, edge_hue=SQUARE.edge_hue)
    dressed_square = replace(SQUARE, hue=CIRCLE.hue, edge_hue=CIRCLE.edge_hue)
    for left, right, fates in [
        (SQUARE, CIRCLE, ["swapped", "swapped"]),  # in each other's places
        (SQUARE, SQUARE, ["swapped", "kept"]),
        (magenta_circle, SQUARE, ["swapped", "kept"]),
        (lime_edged_circle, SQUARE, ["swapped", "kept"]),
        (magenta_circle, dressed_square, ["swapped", "swapped"]),
    ]:
        assert [fate for _, fate in judge.pair_score(beside(left, right), CIRCLE, SQUARE)] == fates


def test_lost_things_are_counted():
    red = world.Thing("triangle", 0.0, None, "white")
    assert [fate for _, fate in judge.pair_score(beside(CIRCLE, red), CIRCLE, SQUARE)] == ["kept", "lost"]
    # One thing alone stands on its side, or in the middle on one of them.
    alone = replace(CIRCLE, radius=12.0, edge_width=world.EDGE_WIDTH * world.PAIR_SCALE)
    on_the_right = world.draw(replace(alone, center=(48.0, 32.0)))
    assert [fate for _, fate in judge.pair_score(on_the_right, SQUARE, CIRCLE)] == ["lost", "kept"]
    assert sorted(fate for _, fate in judge.pair_score(world.draw(CIRCLE), CIRCLE, CIRCLE)) == ["kept", "lost"]


def test_places_of_a_pair_do_not_matter():
    narrow = {"edge_width": world.EDGE_WIDTH * world.PAIR_SCALE, "background": "navy"}
    for radius, left, right in [(11, (12, 20), (40, 44)), (12, (20.5, 32), (43.5, 32)), (13, (18, 30), (44, 34))]:
        image = world.draw(
            replace(CIRCLE, center=left, radius=radius, **narrow),
            replace(SQUARE, center=right, radius=radius, **narrow),
        )
        assert [fate for _, fate in judge.pair_score(image, CIRCLE, SQUARE)] == ["kept", "kept"]
    touching = world.draw(
        replace(CIRCLE, center=(19, 32), radius=13, **narrow), replace(SQUARE, center=(43, 32), radius=13, **narrow)
    )
    assert [seen.shape for seen in judge.see_pair(touching)] == ["circle", "square"]


def test_pairs_in_words_are_judged_by_their_captions():
    left, right = world.Spec("circle", "red"), world.Spec("square", "green", "yellow")
    things = world.Thing("circle", 0.0, None, "white"), world.Thing("square", 120.0, 56.0, "white")
    assert judge.pair_score(beside(*things), left, right) == ((1.0, "kept"), (1.0, "kept"))
    exchanged = replace(things[0], hue=120.0), replace(things[1], hue=0.0)
    assert [fate for _, fate in judge.pair_score(beside(*exchanged), left, right)] == ["swapped", "swapped"]


class Draws:
    """Stands for a pipeline: draws what the prompt says, <new1> as the circle's look and <new2> as the square's."""

    def __init__(self, collapsed=False, exchanged=False):
        self.collapsed, self.exchanged = collapsed, exchanged

    def __call__(self, prompts, **settings):
        self.images = np.stack([self.draw(prompt) for prompt in prompts]) / 255
        return self

    def draw(self, prompt):
        phrases, background = prompt.removeprefix("photo of ").removesuffix(" background").split(" on a ")
        things = [self.thing(phrase) for phrase in phrases.split(" and ")]
        if self.exchanged:
            things = [replace(thing, shape=other.shape) for thing, other in zip(things, things[::-1])]
        if len(things) == 1:
            return world.draw(replace(things[0], background=background))
        return beside(*things, background)

    def thing(self, phrase):
        _, *words, shape = phrase.split()
        if "<new1>" in words or self.collapsed:
            return replace(CIRCLE, shape=shape)
        if "<new2>" in words:
            return replace(SQUARE, shape=shape)
        return world.Thing(shape, world.HUES[words[0]] if words else 0.0, None, "white")


def test_scores_of_a_model_that_learned_and_of_one_that_collapsed():
    base = concept.Base("circle", "ktn circle", 4.0, 1.0)
    learned = concept.scores(Draws(), "<new1>", 0, base, images_per_place=1)
    assert learned == {"concept": 100, "concept_baseline": 4, "prior": 100, "prior_class": 100, "leakage": 0}
    collapsed = concept.scores(Draws(collapsed=True), "<new1>", 0, base, images_per_place=1)
    assert collapsed == {"concept": 100, "concept_baseline": 4, "prior": 50, "prior_class": 0, "leakage": 100}


def test_scores_of_pairs():
    phrases = {"circle": "<new1> circle", "square": "<new2> square"}
    kept = concept.pair_scores(Draws(), phrases, 0, images_per_place=1)
    assert kept == {"circle": 100, "square": 100, "pair": 100, "kept": 100, "swapped": 0, "lost": 0}
    exchanged = concept.pair_scores(Draws(exchanged=True), phrases, 0, images_per_place=1)
    assert exchanged == {"circle": 0, "square": 0, "pair": 0, "kept": 0, "swapped": 100, "lost": 0}
    lost = concept.pair_scores(Draws(), {"circle": "circle", "square": "<new2> square"}, 0, images_per_place=1)
    assert (lost["circle"], lost["square"], lost["pair"]) == (0, 100, 0)
    assert (lost["kept"], lost["swapped"], lost["lost"]) == (50, 0, 50)
