# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What keeps the class word from turning into the concept, on the small model: `python experiments/leakage.py`.

Trains the square, which leaks more than the circle, with a prompt for each photo, and then with one thing changed at a time: the
rate, the weight of the class images, their captions, the steps. Prints the table, with differences seed by seed, and writes
docs/leakage.json. Three hours of one core; what is there is used again.
"""

import argparse
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch

import demo

CONCEPT = "square"
RECIPE = "the demo's recipe"
CLASS_WORD = "class images all captioned with the class word"
CHANGES = {
    RECIPE: [],
    "half the rate": ["--learning_rate", "2.5e-4"],
    "twice the rate": ["--learning_rate", "1e-3"],
    "half the steps": [],
    "`--prior_loss_weight 2`": ["--prior_loss_weight", "2"],
    CLASS_WORD: [],
}
SCORES = ("concept", "leakage", "prior_class", "prior")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "runs", num_seeds=8)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def captioned_with_the_class_word(work_dir: Path) -> Path:
    """A folder for `runs.described_flags` whose class images have no other caption."""
    captions, wanted = runs.class_images(work_dir, CONCEPT) / "caption.txt", f"{CONCEPT}\n" * demo.NUM_CLASS_IMAGES
    if captions.read_text() != wanted:
        captions.write_text(wanted)
    return work_dir


def measure(args: argparse.Namespace, change: str, seed: int) -> dict[str, float]:
    """The scores of a run with this change."""
    work_dir = args.work_dir
    folder = work_dir / "described" / ("" if change == RECIPE else change.strip("`-"))
    if change == CLASS_WORD:
        work_dir = captioned_with_the_class_word(work_dir / "class-word")
    flags = [*runs.FLAGS, *runs.described_flags(work_dir, CONCEPT), *CHANGES[change]]
    steps = args.steps // 2 if change == "half the steps" else args.steps
    weights = runs.trained(folder, CONCEPT, seed, steps, flags, args.threads, args.model)
    base = runs.baselines.read(args.model)[CONCEPT]
    return runs.scored(weights, seed, base, args.model, weights.parent / f"scores-{steps}.json")


def table_of(found: dict[str, dict]) -> str:
    """Markdown: scores, and below each change how far it moves them."""
    recipe = found[RECIPE]
    lines = [["", *SCORES]]
    for change, scores in found.items():
        lines.append([change, *(runs.cell(scores[key]["values"]) for key in SCORES)])
        if change != RECIPE:
            differences = [np.subtract(scores[key]["values"], recipe[key]["values"]) for key in SCORES]
            lines.append(["less the recipe", *(runs.cell(difference, "+") for difference in differences)])
    return runs.table(lines)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    scores = {change: [] for change in CHANGES}
    for seed in runs.seeds(args):  # all changes within a seed, so that what is there is always of the same seeds
        for change in CHANGES:
            scores[change].append(measure(args, change, seed))
    found = {change: runs.summary(of_seeds) for change, of_seeds in scores.items()}
    runs.write_json(args.docs / "leakage.json", {"concept": CONCEPT, "steps": args.steps, "changes": found})
    print("\n" + table_of(found))


if __name__ == "__main__":
    main()
