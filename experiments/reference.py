# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Does this script learn as well as the reference? `python experiments/reference.py --reference path/to/train_custom_diffusion.py`.

Both train the small model from the same photos, class images and flags: one concept or two, keys and values or all of
cross-attention, without augmentation or with it. The reference leaves a border out of the loss where nothing is augmented, and
before March 2024 never trained the last of several new words; so there are further sides, this script with the one or the other.
Prints the table and writes docs/reference.json. Four hours of one core; what is there is used again.
"""

import argparse
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch
from concept import LOOK

WITHOUT_TORCHVISION = runs.ROOT / "benchmarks/without_torchvision.py"
SCORES = ("concept", "prior", "prior_class", "leakage")
OURS, BORDER, FIXED, REFERENCE = "ours", "ours with a border", "ours, last word fixed", "reference"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "reference", num_seeds=8)
    parser.set_defaults(steps=300)
    parser.add_argument("--reference", type=runs.absolute, required=True, help="the script of diffusers")
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def settings() -> list[dict]:
    """What is trained: the concept or both, its flags, and the sides that there are. Every combination of three choices."""
    found = []
    for concept in (LOOK.shape, runs.JOINT):
        for attention in ([], ["--freeze_model", "crossattn"]):
            for augmentation in (["--noaug"], []):
                sides = [OURS, REFERENCE]
                if augmentation and not (concept == runs.JOINT and attention):  # three settings tell what a border does
                    sides.insert(1, BORDER)
                if augmentation and concept == runs.JOINT and not attention:
                    sides.insert(2, FIXED)
                found.append({"concept": concept, "flags": [*augmentation, *attention], "sides": tuple(sides)})
    return found


def measure(args: argparse.Namespace, setting: dict, side: str, seed: int) -> dict[str, float]:
    """The scores of a run; of two concepts, their mean, and the concept's score of each."""
    scripts = {
        OURS: (runs.SCRIPT,),
        BORDER: (runs.VARIANTS, "border"),
        FIXED: (runs.VARIANTS, "last-word-fixed"),
        REFERENCE: (WITHOUT_TORCHVISION, args.reference),
    }
    work_dir = args.work_dir / "-".join(["", *setting["flags"], *side.split()]).strip("-")
    concept, flags = setting["concept"], setting["flags"]
    weights = runs.trained(work_dir, concept, seed, args.steps, flags, args.threads, args.model, script=scripts[side])
    bases = runs.baselines.read(args.model)
    words = runs.WORDS if concept == runs.JOINT else {concept: "<new1>"}
    found = {
        name: runs.scored(weights, seed, bases[name], args.model, weights.parent / f"scores-{name}.json", word)
        for name, word in words.items()
    }
    means = {key: float(np.mean([scores[key] for scores in found.values()])) for key in SCORES}
    return means | {name: scores["concept"] for name, scores in found.items() if len(found) > 1}


def table_of(rows: list[dict]) -> str:
    """Markdown: each side's scores, and differences of sides, seed by seed; at the end the difference over all settings."""
    columns = (*SCORES, *runs.WORDS)
    lines, over_all = [["", *columns]], {key: [] for key in SCORES}
    for row in rows:
        what, sides = " ".join([row["concept"], *row["flags"]]), row["sides"]
        values = {
            side: {key: summary[key]["values"] for key in columns if key in summary} for side, summary in sides.items()
        }
        for side, own in values.items():
            lines.append([f"{what}: {side}", *(runs.cell(own[key]) if key in own else "" for key in columns)])
        pairs = [(side, REFERENCE) for side in values if side != REFERENCE]
        pairs += [(side, OURS) for side in values if side in (BORDER, FIXED)]
        for side, other in pairs:
            own, theirs = values[side], values[other]
            differences = (runs.cell(np.subtract(own[key], theirs[key]), "+") if key in own else "" for key in columns)
            lines.append([f"{side} less {other}", *differences])
        for key, differences in over_all.items():
            differences.append(np.subtract(values[OURS][key], values[REFERENCE][key]))
    means = (runs.cell(np.mean(differences, axis=0), "+") for differences in over_all.values())
    lines.append([f"{OURS} less {REFERENCE}, mean of all settings", *means, *[""] * len(runs.WORDS)])
    return runs.table(lines)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    found = [{side: [] for side in setting["sides"]} for setting in settings()]
    for seed in runs.seeds(args):  # all sides within a seed, so that what is there is always of the same seeds
        for setting, sides in zip(settings(), found):
            for side, scores in sides.items():
                scores.append(measure(args, setting, side, seed))
    rows = [
        setting | {"steps": args.steps, "sides": {side: runs.summary(scores) for side, scores in sides.items()}}
        for setting, sides in zip(settings(), found)
    ]
    runs.write_json(args.docs / "reference.json", rows)
    print("\n" + table_of(rows))


if __name__ == "__main__":
    main()
