# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What `--cache_latents` costs in quality, measured on the small model: `python experiments/cache_latents.py`.

Trains the demo's concept with and without it, a prompt for each photo, augmented (without augmentation the two see the same
images). Prints the mean scores and how far apart the two are, with the standard error of the difference; writes
docs/cache_latents.json. Half an hour of one core; what is there is used again.
"""

import argparse
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch

import demo

SIDES = {"default": ["--hflip"], "--cache_latents": ["--hflip", "--cache_latents"]}
SCORES = ("concept", "prior", "prior_class", "leakage")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "cache", num_seeds=8)
    parser.set_defaults(steps=500)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def measure(args: argparse.Namespace, side: str, seed: int, base: runs.Base) -> dict[str, float]:
    """Train the concept and score it."""
    work_dir = args.work_dir / side.strip("-")
    flags = [*SIDES[side], *runs.described_flags(args.work_dir, base.concept)]
    weights = runs.trained(work_dir, base.concept, seed, args.steps, flags, args.threads, args.model)
    return runs.scored(weights, seed, base, args.model)


def compare(key: str, default: list[dict], cached: list[dict]) -> dict:
    """Both sides' scores, and the mean of their difference with its standard error."""
    scores = {"default": [one[key] for one in default], "--cache_latents": [one[key] for one in cached]}
    mean, error = runs.mean_and_error(np.subtract(scores["--cache_latents"], scores["default"]))
    return {"score": key, **scores, "mean difference": mean, "standard error": error}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    base = runs.baselines.read(args.model)[demo.concept.LOOK.shape]
    results = {side: [] for side in SIDES}
    for seed in runs.seeds(args):
        for side in SIDES:  # side by side, so that what has been measured so far is always of the same seeds
            results[side].append(measure(args, side, seed, base))
    rows = [compare(key, *results.values()) for key in SCORES]
    runs.write_json(args.docs / "cache_latents.json", rows)
    lines = [["score of 100", "default", "`--cache_latents`", "difference"]]
    for row in rows:
        difference = np.subtract(row["--cache_latents"], row["default"])
        lines.append([row["score"], *(runs.cell(row[side]) for side in SIDES), runs.cell(difference, "+")])
    print("\n" + runs.table(lines))


if __name__ == "__main__":
    main()
