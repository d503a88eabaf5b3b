# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Does a small model follow captions that training never showed? `python demo/check_model.py` writes model_scores.json."""

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import world
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from judge import check_caption, foreground, generate, score_captions, see
from PIL import Image

HERE = Path(__file__).resolve().parent
CROP = (0, 20)  # top and left of a crop, asked of SDXL


def enlarged_half(image: np.ndarray, side: int) -> np.ndarray:
    """The left half (side 0) or the right one (1) of an image (64, 64, 3), so large that its thing is as large as one alone."""
    half = Image.fromarray(image[:, world.SIZE // 2 * side :][:, : world.SIZE // 2])
    size = tuple(round(length / world.PAIR_SCALE) for length in half.size)
    return np.asarray(half.resize(size, Image.Resampling.BICUBIC))


def score_pairs(pipeline: DiffusionPipeline, specs: list[world.PairSpec], seed: int) -> dict[str, float]:
    """Share of things of two in an image, in percent, whose colour, edge and shape come out as asked, and of backgrounds.

    `all` is the share of images with nothing wrong at all.
    """
    images = generate(pipeline, [spec.caption() for spec in specs], seed)
    checks, whole = [], []
    for image, spec in zip(images, specs):
        sides = [check_caption(see(enlarged_half(image, i)), side) for i, side in enumerate((spec.left, spec.right))]
        background = {"background": see(image).background == spec.background}
        checks += [*sides, background]
        whole.append(all(right for check in (*sides, background) for right in check.values()))
    scores = {
        key: round(100 * float(np.mean([check[key] for check in checks if key in check])), 1)
        for key in ("color", "edge", "background", "shape")
    }
    return {**scores, "all": round(100 * float(np.mean(whole)), 1)}


def is_cut(image: np.ndarray) -> bool:
    """Whether the thing in an image (64, 64, 3) uint8 reaches the frame."""
    mask = foreground(image)[1]
    return bool(mask[:, :2].any() or mask[:, -2:].any() or mask[:2].any() or mask[-2:].any())


def score_crops(pipeline: StableDiffusionXLPipeline, specs: list[world.Spec], seed: int) -> dict[str, float]:
    """Percent of images whose thing reaches the frame, asked for whole and asked for as cropped by `CROP`."""
    captions = [spec.caption() for spec in specs]
    shares = {}
    for name, crop in (("whole", (0, 0)), ("cropped", CROP)):
        images = generate(functools.partial(pipeline, crops_coords_top_left=crop), captions, seed)
        shares[name] = round(100 * float(np.mean([is_cut(image) for image in images])), 1)
    return shares


def score_model(pipeline: DiffusionPipeline, seed: int, every: int = 1) -> dict:
    """How many held-out captions there are, and what share of them comes out right; every so manieth of them alone."""
    specs, pairs = world.held_out_specs()[::every], world.held_out_pairs()[::every]
    scores = {
        "num_captions": len(specs),
        "num_pairs": len(pairs),
        "seed": seed,
        "percent_right": score_captions(pipeline, specs, seed),
        "percent_right_of_pairs": score_pairs(pipeline, pairs, seed),
    }
    if isinstance(pipeline, StableDiffusionXLPipeline):
        scores["percent_cut_by_the_frame"] = score_crops(pipeline, specs[::4], seed)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: beside the model, its name and _scores.json")
    args = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    scores = score_model(pipeline, args.seed)
    print(json.dumps(scores))
    output = args.output or args.model.with_name(f"{args.model.resolve().name}_scores.json")
    output.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
