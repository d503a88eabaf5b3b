# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""How well the model draws a new thing, and how well it still draws everything else."""

from dataclasses import dataclass
from functools import cache
from itertools import cycle

import numpy as np
import world
from judge import MOST, Seen, check_caption, generate, likeness, pair_score, see

# By what they are. Teal with an orange edge, and magenta with a lime one: no words for these.
LOOKS = {
    "circle": world.Thing(shape="circle", hue=174.0, edge_hue=28.0, background="white"),
    "square": world.Thing(shape="square", hue=322.0, edge_hue=88.0, background="white"),
}
LOOK = LOOKS["circle"]  # the demo's
LABELS = {
    "concept": "concept score: looks like the photos",
    "prior": "prior score: ordinary captions right",
    "prior_class": "the same of its class alone, rescaled",
    "leakage": "likeness of a plain {}",
}
FATES = ("kept", "swapped", "lost")


@dataclass(frozen=True)
class Base:
    """What the model can do before it is taught anything: what scores are measured against.

    Attributes:
        concept: name in LOOKS.
        prompt: the description that gets nearest to the concept without a new word.
        score: its concept score, 0 to 100.
        prior_class: share of its class's captions' checks that come out right, 0 to 1.
    """

    concept: str
    prompt: str
    score: float
    prior_class: float


def places(num_images: int) -> list[str]:
    """The ends of prompts: so many images on each background."""
    return [f"on a {ground} background" for ground in world.BACKGROUNDS for _ in range(num_images)]


def class_specs(concept: str) -> list[world.Spec]:
    """Ordinary captions of the concept's class: every colour on every background."""
    return [world.Spec(concept, color, None, ground) for color in world.HUES for ground in world.BACKGROUNDS]


def other_specs(concept: str) -> list[world.Spec]:
    """Ordinary captions of the other shapes, half as many."""
    shapes = cycle(shape for shape in world.SHAPES if shape != concept)
    return [world.Spec(next(shapes), spec.color, None, spec.background) for spec in class_specs(concept)[::2]]


def share_right(seen: list[Seen], specs: list[world.Spec]) -> float:
    """0 to 1: what is as an ordinary caption says: colour, shape, background, and no edge, which none of them asks for."""
    checks = [right for one, spec in zip(seen, specs) for right in check_caption(one, spec).values()]
    return float(np.mean([*checks, *(one.hue is not None and one.edged.mean() <= 1 - MOST for one in seen)]))


@cache
def collapsed_share(concept: str) -> float:
    """`share_right` of the concept's class if every image of it showed the concept, on the background asked for."""
    look, specs = LOOKS[concept], class_specs(concept)
    drawn = [world.draw(world.Thing(look.shape, look.hue, look.edge_hue, spec.background)) for spec in specs]
    return share_right([see(image) for image in drawn], specs)


def rescaled_prior(share: float, base: Base) -> float:
    """`share_right` of the concept's class as a score: 0 where all of it looks like the concept, 100 as before training."""
    floor = collapsed_share(base.concept)
    return 100 * (share - floor) / (base.prior_class - floor)


def concept_score(pipeline, prompt: str, concept: str, seed: int, images_per_place: int = 4) -> float:
    """0 to 100: the mean likeness to the concept of what is drawn for `prompt` on every background."""
    images = generate(pipeline, [f"photo of a {prompt} {place}" for place in places(images_per_place)], seed)
    return 100 * float(np.mean([likeness(see(image), LOOKS[concept]) for image in images]))


def scores(pipeline, word: str, seed: int, base: Base, images_per_place: int = 4) -> dict[str, float]:
    """What was learned, and what it cost.

    Args:
        word: what stands for the concept: its modifier token, or before there is one the word it starts from.
        base: the same concept's, of the model before training.
    Returns:
        concept: mean likeness of the word's images to the concept, 0 to 100.
        concept_baseline: what the model before training gets for the best description.
        prior: share of ordinary captions drawn right, 0 to 100; the concept's class and the other shapes count the same.
        prior_class: that of the concept's class alone; 0 where everything of it looks like the concept, 100 as before training.
        leakage: mean likeness to the concept of its class word when nothing more is said.
    """
    shape, specs, others = LOOKS[base.concept].shape, class_specs(base.concept), other_specs(base.concept)
    seen = [see(image) for image in generate(pipeline, [spec.caption() for spec in specs + others], seed)]
    of_class, of_others = share_right(seen[: len(specs)], specs), share_right(seen[len(specs) :], others)
    values = {
        "concept": concept_score(pipeline, f"{word} {shape}", base.concept, seed, images_per_place),
        "concept_baseline": base.score,
        "prior": 50 * (of_class + of_others),
        "prior_class": rescaled_prior(of_class, base),
        "leakage": concept_score(pipeline, shape, base.concept, seed, images_per_place),
    }
    return {key: round(value, 1) for key, value in values.items()}


def pair_scores(pipeline, phrases: dict[str, str], seed: int, images_per_place: int = 4) -> dict[str, float]:
    """Two new things in one image, by turns in either order.

    Args:
        phrases: what stands for either concept, like "<new1> circle", by its name in LOOKS.
    Returns:
        each concept's mean likeness by its name, `pair` that of the worse one of each image, and the shares of things that were
        kept, swapped or lost (see `pair_score`); 0 to 100.
    """
    names = list(phrases)
    ends = places(images_per_place)
    orders = [names if i % 2 == 0 else names[::-1] for i in range(len(ends))]
    prompts = [f"photo of a {phrases[left]} and a {phrases[right]} {end}" for (left, right), end in zip(orders, ends)]
    likenesses, fates = {name: [] for name in names}, []
    for image, order in zip(generate(pipeline, prompts, seed), orders):
        for name, (alike, fate) in zip(order, pair_score(image, *(LOOKS[name] for name in order))):
            likenesses[name].append(alike)
            fates.append(fate)
    values = {name: np.mean(likenesses[name]) for name in names} | {
        "pair": np.mean(np.min(list(likenesses.values()), axis=0))
    }
    values |= {fate: fates.count(fate) / len(fates) for fate in FATES}
    return {key: round(100 * float(value), 1) for key, value in values.items()}
