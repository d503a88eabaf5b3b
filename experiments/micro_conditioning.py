# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Whether telling an SDXL how each photo was cropped keeps crops out of its images: `python experiments/micro_conditioning.py`.

Photos of the demo's concept, wider than high: the square that training shows of one cuts the thing off two times in three. Trained
with the crops told, as the training script tells them, and untold, every photo passed off as whole (`variants.py`). Both are
then asked for whole images. Writes docs/micro_conditioning.json. A quarter of an hour of one core; what is there is used again.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch
import world
from check_model import CROP, is_cut
from concept import LOOK, places
from judge import generate, likeness, see
from make_photos import PHOTO_BACKGROUNDS
from PIL import Image

import demo

MODEL = runs.ROOT / "demo/model_sdxl"
WIDTH = 96  # pixels of a photo that is 64 high
SIDES = {"told": (runs.SCRIPT,), "untold": (runs.VARIANTS, "photos-as-whole")}
ASKED = {"whole": (0, 0), "cropped": CROP}  # top and left
IMAGES_PER_PLACE = 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "micro_conditioning", num_seeds=8)
    parser.set_defaults(model=MODEL, steps=250)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def wide_photos(seed: int = 3) -> list[np.ndarray]:
    """Five images (64, WIDTH, 3) uint8 of the concept, as large as ever, by turns at the left end and at the right."""
    rng, zoom, images = np.random.default_rng(seed), WIDTH / world.SIZE, []
    for i, background in enumerate(PHOTO_BACKGROUNDS):
        pose = world.random_pose(rng)
        pose |= {
            "radius": pose["radius"] / zoom,
            "center": ((world.SIZE / 2, WIDTH - world.SIZE / 2)[i % 2] / zoom, 32.0),
        }
        thing = world.Thing(LOOK.shape, LOOK.hue, LOOK.edge_hue, background, **pose, edge_width=world.EDGE_WIDTH / zoom)
        margin = (WIDTH - world.SIZE) // 2
        images.append(world.draw(thing, size=WIDTH)[margin:-margin])
    return images


def make_photos(folder: Path) -> None:
    """What `runs.trained` takes for the concept's photos."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(wide_photos()):
        Image.fromarray(photo).save(folder / f"{i}.png")


def measure(weights: Path, model: Path, seed: int) -> dict[str, float]:
    """Percent of images whose thing reaches the frame, for either question, and the concept score of those asked for whole."""
    pipe = demo.load_pipeline(weights, model)
    prompts = [f"photo of a <new1> {LOOK.shape} {place}" for place in places(IMAGES_PER_PLACE)]
    drawn = {
        name: generate(functools.partial(pipe, crops_coords_top_left=crop), prompts, seed)
        for name, crop in ASKED.items()
    }
    scores = {f"cut, asked for {name}": 100 * np.mean([is_cut(i) for i in images]) for name, images in drawn.items()}
    scores["concept"] = 100 * np.mean([likeness(see(image), LOOK) for image in drawn["whole"]])
    return {key: round(float(value), 1) for key, value in scores.items()}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    results = {side: [] for side in SIDES}
    for seed in runs.seeds(args):
        for side, script in SIDES.items():  # side by side, so that what is there is always of the same seeds
            work_dir = args.work_dir / side
            make_photos(work_dir / LOOK.shape / "photos")
            flags = [*runs.FLAGS, *runs.described_flags(work_dir, LOOK.shape)]
            weights = runs.trained(
                work_dir, LOOK.shape, seed, args.steps, flags, args.threads, args.model, script=script
            )
            results[side].append(
                runs.once(weights.parent / "scores.json", functools.partial(measure, weights, args.model, seed))
            )
    runs.write_json(
        args.docs / "micro_conditioning.json", {side: runs.summary(found) for side, found in results.items()}
    )
    keys = list(results["told"][0])
    rows = [[side, *(runs.cell([one[key] for one in found]) for key in keys)] for side, found in results.items()]
    print("\n" + runs.table([["crops", *keys], *rows]))


if __name__ == "__main__":
    main()
