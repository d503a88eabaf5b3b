# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Draw the demo's five photos and its small captioned set of class images: `python demo/make_photos.py`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import world
from concept import LOOK
from PIL import Image

HERE = Path(__file__).resolve().parent

PHOTO_BACKGROUNDS = ("white", "gray", "navy", "pink", "brown")


def concept_photos(look: world.Thing = LOOK, seed: int = 1) -> list[np.ndarray]:
    """Five images (64, 64, 3) uint8 of the concept: other places, sizes, light and backgrounds, the same look."""
    rng = np.random.default_rng(seed)
    return [
        world.draw(world.Thing(look.shape, look.hue, look.edge_hue, background, **world.random_pose(rng)))
        for background in PHOTO_BACKGROUNDS
    ]


def class_images(num_circles: int = 120, num_others: int = 40, seed: int = 2) -> list[tuple[np.ndarray, str]]:
    """Ordinary images and their captions, none of the concept's colour.

    Half of the captions name no colour: they are what keeps the bare class word from taking on the concept's look.
    """
    rng = np.random.default_rng(seed)
    circles, others = [], []
    while len(circles) < num_circles or len(others) < num_others:
        thing, spec = world.random_sample(rng)
        wanted, limit = (circles, num_circles) if thing.shape == LOOK.shape else (others, num_others)
        if len(wanted) == limit or world.hue_distance(thing.hue, LOOK.hue) < 25.0:
            continue
        if rng.random() < 0.5:
            spec = replace(spec, color=None)
        wanted.append((world.draw(thing), spec.caption()))
    mixed = circles + others
    return [mixed[i] for i in rng.permutation(len(mixed))]


def main() -> None:
    photos, images = HERE / "photos", HERE / "class_images"
    photos.mkdir(exist_ok=True)
    images.mkdir(exist_ok=True)
    for i, photo in enumerate(concept_photos()):
        Image.fromarray(photo).save(photos / f"{i}.png", optimize=True)
    rows = []
    for i, (image, caption) in enumerate(class_images()):
        name = f"{i:03d}.png"
        Image.fromarray(image).save(images / name, optimize=True)
        rows.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (images / "metadata.jsonl").write_text("".join(rows))


if __name__ == "__main__":
    main()
