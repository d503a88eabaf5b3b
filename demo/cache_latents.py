# ruff: noqa: E402
# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What `--cache_latents` costs in quality, measured on the small model: `python demo/cache_latents.py`.

Runs the demo with and without it, from several seeds, with its own settings and with augmentation, and scores each with twice
the demo's pictures. Prints the mean scores and how far apart the two are, with the standard error of the difference; writes
docs/cache_latents.json.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import concept
import numpy as np

from demo import load_pipeline

SETTINGS = {"--noaug": [], "augmented, --hflip": ["--augment"]}
SIDES = {"default": ["--without_cache"], "--cache_latents": []}
SCORES = ("concept", "prior")
PICTURE_SEEDS = range(2)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_seeds", type=int, default=12)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "demo/output/cache", help="what is there is used again")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser.parse_args()


def run_demo(folder: Path, flags: list[str]) -> None:
    """In one thread, so that as many run at a time as there are cores, and the result does not depend on their number."""
    if (folder / "scores.json").is_file():
        return
    command = [sys.executable, "demo/demo.py", "--output", str(folder), *flags]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    print(folder.name, flush=True)


def score(folder: Path) -> dict[str, float]:
    """Mean scores of the demo in `folder` over more pictures than the demo draws."""
    file = folder / "mean_scores.json"
    if not file.is_file():
        pipeline = load_pipeline(folder / "weights")
        scores = [concept.scores(pipeline, "<new1>", seed) for seed in PICTURE_SEEDS]
        file.write_text(json.dumps({key: float(np.mean([one[key] for one in scores])) for key in scores[0]}))
    return json.loads(file.read_text())


def main() -> None:
    args = parse_args()
    seeds = range(args.num_seeds)
    flags = {
        (setting, side, seed): ["--seed", str(seed), *SETTINGS[setting], *SIDES[side]]
        for setting in SETTINGS
        for side in SIDES
        for seed in seeds
    }
    folders = {run: args.work_dir / "-".join(word.strip("-") for word in words) for run, words in flags.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_demo, folders.values(), flags.values()))
    rows = []
    for setting in SETTINGS:
        for key in SCORES:
            default, cached = (np.array([score(folders[setting, side, seed])[key] for seed in seeds]) for side in SIDES)
            difference = cached - default
            rows.append({
                "settings": setting,
                "score": key,
                "default": default.tolist(),
                "--cache_latents": cached.tolist(),
                "mean difference": float(difference.mean()),
                "standard error": float(difference.std(ddof=1) / len(difference) ** 0.5),
            })  # fmt: skip
    args.docs.mkdir(exist_ok=True)
    (args.docs / "cache_latents.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n| settings | score of 100 | default | `--cache_latents` | difference |\n|---|---|---|---|---|")
    for row in rows:
        means = " | ".join(f"{np.mean(row[side]):.1f}" for side in SIDES)
        difference = f"{row['mean difference']:+.1f} ± {row['standard error']:.1f}"
        print(f"| {row['settings']} | {row['score']} | {means} | {difference} |")


if __name__ == "__main__":
    main()
