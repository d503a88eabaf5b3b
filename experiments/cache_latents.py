# ruff: noqa: E402
# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What `--cache_latents` costs in quality, measured on the small model: `python experiments/cache_latents.py`.

Trains the demo's concept with and without it from many seeds, augmented (without augmentation the two see the same pictures), and
scores each with twice the demo's pictures. Prints the mean scores and how far apart the two are, with the standard error of
the difference; writes docs/cache_latents.json. Some hours; what is there is used again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "demo"), str(ROOT)]  # the small model's world and judge; the package, installed or not

import concept
import numpy as np
import torch

import demo

SIDES = {"default": ["--hflip"], "--cache_latents": ["--hflip", "--cache_latents"]}
SCORES = ("concept", "prior")
PICTURE_SEEDS = range(2)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_seeds", type=int, default=60)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "demo/output/cache")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser.parse_args()


def measure(side: str, seed: int, work_dir: Path) -> dict[str, float]:
    """Train one concept in one thread, so that the result does not depend on how many train beside it, and score it."""
    folder = work_dir / f"{side.strip('-')}-{seed}"
    file = folder / "scores.json"
    if not file.is_file():
        torch.set_num_threads(1)
        folder.mkdir(exist_ok=True)
        settings = demo.parse_args(["--seed", str(seed)])
        command = demo.training_command(folder / "weights", work_dir / "class_circle", SIDES[side], settings)
        with (folder / "training.log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=environment, stdout=log, stderr=log)
        pipeline = demo.load_pipeline(folder / "weights")
        scores = [concept.scores(pipeline, "<new1>", picture_seed) for picture_seed in PICTURE_SEEDS]
        file.write_text(json.dumps({key: float(np.mean([one[key] for one in scores])) for key in SCORES}))
    return json.loads(file.read_text())


def compare(key: str, default: list[dict], cached: list[dict]) -> dict:
    """Both sides' scores, and the mean of their difference with its standard error."""
    scores = {"default": [one[key] for one in default], "--cache_latents": [one[key] for one in cached]}
    difference = np.subtract(scores["--cache_latents"], scores["default"])
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return {"score": key, **scores, "mean difference": float(difference.mean()), "standard error": float(error)}


def main() -> None:
    args = parse_args()
    if not (args.work_dir / "class_circle").is_dir():
        demo.retrieve_class_images(args.work_dir)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        # Side by side, so that what has been measured so far is always of the same seeds.
        runs = [(side, seed) for seed in range(args.num_seeds) for side in SIDES]
        results = dict(zip(runs, pool.map(measure, *zip(*runs), repeat(args.work_dir))))
    sides = [[results[side, seed] for seed in range(args.num_seeds)] for side in SIDES]
    rows = [compare(key, *sides) for key in SCORES]
    args.docs.mkdir(exist_ok=True)
    (args.docs / "cache_latents.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n| score of 100 | default | `--cache_latents` | difference |\n|---|---|---|---|")
    for row in rows:
        means = " | ".join(f"{np.mean(row[side]):.1f}" for side in SIDES)
        print(f"| {row['score']} | {means} | {row['mean difference']:+.1f} ± {row['standard error']:.1f} |")


if __name__ == "__main__":
    main()
