# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""How well the model draws the new thing, and how well it still draws everything else."""

import numpy as np
import world
from judge import Seen, check_caption, generate, see

# Teal with an orange edge: no words for these.
LOOK = world.Thing(shape="circle", hue=174.0, edge_hue=28.0, background="white")
FAR = 60.0  # degrees of hue at which there is no likeness left
LABELS = {
    "concept": "concept score: looks like the photos",
    "prior": "prior score: ordinary captions right",
    "leakage": 'likeness of a plain "circle"',
}


def likeness(seen: Seen, look: world.Thing = LOOK) -> float:
    """0 to 1: half for the hue of the fill, half for that of the edge; 0 if it has another shape."""
    if seen.shape != look.shape:
        return 0.0
    pairs = ((seen.hue, look.hue), (seen.edge_hue, look.edge_hue))
    close = [0.0 if hue is None else max(0.0, 1.0 - world.hue_distance(hue, wanted) / FAR) for hue, wanted in pairs]
    return float(np.mean(close))


def prior_specs() -> list[world.Spec]:
    """Every colour on every background, by turns a circle and another shape."""
    pairs = [(color, ground) for color in world.HUES for ground in world.BACKGROUNDS]
    shapes = ["circle" if (i + i // 6) % 2 == 0 else world.SHAPES[1 + i % 3] for i in range(len(pairs))]
    return [world.Spec(shape, color, None, ground) for shape, (color, ground) in zip(shapes, pairs)]


def scores(pipeline, word: str, seed: int) -> dict[str, float]:
    """Concept score, prior score and leakage, each 0 to 100.

    The prior score is the share of things that are as an ordinary caption says: colour, shape, background, and no edge,
    which none of them asks for. Leakage is how much a circle that nothing more is said about looks like the concept.

    Args:
        word: what stands for the concept: its modifier token, or before there is one the word it starts from.
    """

    def seen(prompts):
        return [see(image) for image in generate(pipeline, prompts, seed)]

    places = [f"on a {ground} background" for ground in world.BACKGROUNDS for _ in range(4)]
    new = seen([f"photo of a {word} circle {place}" for place in places])
    plain = seen([f"photo of a circle {place}" for place in places])
    specs = prior_specs()
    ordinary = seen([spec.caption() for spec in specs])
    checks = [right for one, spec in zip(ordinary, specs) for right in check_caption(one, spec).values()]
    checks += [one.edge_hue is None for one in ordinary]
    values = {
        "concept": np.mean([likeness(one) for one in new]),
        "prior": np.mean(checks),
        "leakage": np.mean([likeness(one) for one in plain]),
    }
    return {key: round(100 * float(value), 1) for key, value in values.items()}
