# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What `--cache_latents` costs in quality, measured on the small model: `python demo/cache_latents.py`.

Runs the demo with and without it, from several seeds, with its own settings and with augmentation, and prints the mean scores and
how far apart the two are, with the standard error of the difference. Writes docs/cache_latents.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"--noaug": [], "augmented, --hflip": ["--augment"]}
SCORES = ("concept", "prior")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_seeds", type=int, default=4)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "demo/output/cache", help="what is there is used again")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser.parse_args()


def demo_scores(work_dir: Path, seed: int, flags: list[str]) -> dict[str, float]:
    """The demo's scores after training."""
    folder = work_dir / "".join(["seed-", str(seed), *flags])
    if not (folder / "scores.json").is_file():
        command = [sys.executable, "demo/demo.py", "--seed", str(seed), "--output", str(folder), *flags]
        subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((folder / "scores.json").read_text())["after"]


def main() -> None:
    args = parse_args()
    rows = []
    for name, flags in SETTINGS.items():
        runs = {
            side: [demo_scores(args.work_dir, seed, flags + own) for seed in range(args.num_seeds)]
            for side, own in (("default", ["--without_cache"]), ("--cache_latents", []))
        }
        for score in SCORES:
            default, cached = (np.array([one[score] for one in scores]) for scores in runs.values())
            difference = cached - default
            rows.append({
                "settings": name,
                "score": score,
                "default": default.tolist(),
                "--cache_latents": cached.tolist(),
                "mean difference": float(difference.mean()),
                "standard error": float(difference.std(ddof=1) / len(difference) ** 0.5),
            })  # fmt: skip
    args.docs.mkdir(exist_ok=True)
    (args.docs / "cache_latents.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n| settings | score of 100 | default | `--cache_latents` | difference |\n|---|---|---|---|---|")
    for row in rows:
        means = " | ".join(f"{np.mean(row[side]):.1f}" for side in ("default", "--cache_latents"))
        print(
            f"| {row['settings']} | {row['score']} | {means} | {row['mean difference']:+.1f} ± {row['standard error']:.1f} |"
        )


if __name__ == "__main__":
    main()
