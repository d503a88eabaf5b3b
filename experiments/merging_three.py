# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Three concepts merged at once, measured on the small model: `python experiments/merging_three.py`.

A file of its own beside `merging.py`, whose words and images are of two concepts. For every seed the circle, the square and the square
of another training (seed + 1, the last one that of the first) are merged; each word's concept score is set against that of its own
training. Prints the table and writes docs/merging_three.json.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import runs  # finds the demo
import torch
from concept import concept_score

import demo
from custom_diffusion import load_custom_diffusion, merge, unload_custom_diffusion

IMAGES_PER_PLACE = 2
PARTS = {"circle": ("circle", 0), "square": ("square", 0), "another square": ("square", 1)}  # concept, seeds further


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "runs", num_seeds=8)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def measure(args: argparse.Namespace, pipe, seed: int) -> dict[str, dict[str, float]]:
    """Concept scores apart and merged, of each part; of a part the same noise for both."""

    def score(name, word, weights):
        concept, further = PARTS[name]
        load_custom_diffusion(pipe, weights)
        value = concept_score(pipe, f"{word} {concept}", concept, seed + further, IMAGES_PER_PLACE)
        unload_custom_diffusion(pipe)
        return value

    count = len(runs.seeds(args))
    folders = {
        name: runs.trained(args.work_dir, concept, args.first_seed + (seed - args.first_seed + further) % count,
                           args.steps, threads=args.threads, model=args.model)
        for name, (concept, further) in PARTS.items()
    }  # fmt: skip
    captions = [runs.class_images(args.work_dir, concept) for concept in ("circle", "square")]
    with TemporaryDirectory() as work_dir:
        merged = Path(work_dir) / "merged"
        merge(list(folders.values()), captions=captions, model=str(args.model), output=merged)
        return {
            "apart": {name: score(name, "<new1>", folder) for name, folder in folders.items()},
            "merged": {name: score(name, f"<new{number}>", merged) for number, name in enumerate(PARTS, start=1)},
        }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    pipe, kept = demo.load_pipeline(model=args.model), args.work_dir / "merging_three"
    seeds = [
        runs.once(kept / f"seed-{seed}.json", lambda seed=seed: measure(args, pipe, seed)) for seed in runs.seeds(args)
    ]
    results = {label: runs.summary([one[label] for one in seeds]) for label in seeds[0]}
    runs.write_json(args.docs / "merging_three.json", results)
    rows = [[label, *(runs.cell(one["values"]) for one in row.values())] for label, row in results.items()]
    print("\n" + runs.table([["of 100", *PARTS], *rows]))


if __name__ == "__main__":
    main()
