# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What it would save and cost to stop where the curve says "learned", on the small model: `python experiments/stopping.py`.

Trains both concepts from many seeds to the end, with a prompt for each photo, and scores each run twice: its weights, and its
checkpoint at the step that its curve calls learned, which is where a run that stops there would have ended. Prints the table and
writes docs/stopping.json. Some hours; what is there is used again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch
from concept import LOOKS

from custom_diffusion.files import CURVE_VALUES, checkpoint_path
from custom_diffusion.training.curve import CONCEPT_LOSS, PRIOR_LOSS, Point, learned_at

SCORES = ("concept", "prior", "prior_class", "leakage")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "runs", num_seeds=12)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def stopping_step(weights: Path) -> int | None:
    """The step that the curve of the run in this folder calls learned; None if it is not before its end."""
    points = json.loads((weights / CURVE_VALUES).read_text())["points"]
    points = [Point(point["step"], point[CONCEPT_LOSS], point.get(PRIOR_LOSS)) for point in points]
    step = learned_at(points)
    return None if step == points[-1].step else step


def measure(args: argparse.Namespace, concept: str, seed: int, base: runs.Base) -> dict:
    """The steps that one run would have taken, and its scores at the end ("given") and there ("taken")."""
    flags = [*runs.FLAGS, *runs.described_flags(args.work_dir, concept)]
    folder = args.work_dir / "described"
    weights = runs.trained(folder, concept, seed, args.steps, flags, args.threads, args.model)
    given = runs.scored(weights, seed, base, args.model, weights.parent / f"scores-{args.steps}.json")
    step = stopping_step(weights)
    if step is None:
        return {"seed": seed, "steps": args.steps, "given": given, "taken": given}
    taken = runs.scored(checkpoint_path(weights, step), seed, base, args.model, weights.parent / f"scores-{step}.json")
    return {"seed": seed, "steps": step, "given": given, "taken": taken}


def compare(concept: str, steps: int, found: list[dict]) -> dict:
    """What the table says of one concept: steps, scores of both, and their differences with standard errors."""
    taken = runs.summary([{"steps": one["steps"]} for one in found])["steps"]
    given = runs.summary([one["given"] for one in found])
    stopped = runs.summary([one["taken"] for one in found])
    differences = {
        key: runs.mean_and_error(np.subtract(stopped[key]["values"], given[key]["values"])) for key in SCORES
    }
    return {
        "concept": concept,
        "steps given": steps,
        "steps taken": taken,
        "given": given,
        "taken": stopped,
        "differences": {key: dict(zip(("mean", "standard error"), value)) for key, value in differences.items()},
    }


def table_of(rows: list[dict]) -> str:
    """Markdown."""
    lines = [["concept", "steps", "score of 100", "all steps", "stopped", "difference"]]
    for row in rows:
        steps = f"{runs.cell(row['steps taken']['values'])} of {row['steps given']}"
        for key in SCORES:
            given, taken = row["given"][key]["values"], row["taken"][key]["values"]
            difference = runs.cell(np.subtract(taken, given), "+")
            lines.append([row["concept"], steps, key, runs.cell(given), runs.cell(taken), difference])
    return runs.table(lines)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    bases = runs.baselines.read(args.model)
    found = {name: [] for name in LOOKS}
    for seed in runs.seeds(args):  # concept by concept within a seed, so that what is there is always of the same seeds
        for name in LOOKS:
            found[name].append(measure(args, name, seed, bases[name]))
    rows = [compare(name, args.steps, one) for name, one in found.items()]
    runs.write_json(args.docs / "stopping.json", rows)
    print("\n" + table_of(rows))


if __name__ == "__main__":
    main()
