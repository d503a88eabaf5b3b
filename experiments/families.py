# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""The small Stable Diffusion and the small SDXL taught the same, side by side: `python experiments/families.py`.

The circle alone, and the circle and the square in one run, from the same photos, class images and flags. Prints the table and
writes docs/families.json. An hour of one core; what is there is used again.
"""

import argparse
from pathlib import Path

import runs  # finds the demo
import torch
from concept import LOOK

MODELS = (runs.MODEL, runs.ROOT / "demo/model_sdxl")
SCORES = ("concept", "prior", "prior_class", "leakage")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "families", num_seeds=8)
    parser.set_defaults(steps=500)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def measure(args: argparse.Namespace, model: Path, seed: int) -> dict[str, dict[str, float]]:
    """The scores of the circle alone, and of either concept in the run that taught both."""
    bases, work_dir = runs.baselines.read(model), args.work_dir / model.name
    alone = runs.trained(work_dir, LOOK.shape, seed, args.steps, threads=args.threads, model=model)
    found = {f"{LOOK.shape} alone": runs.scored(alone, seed, bases[LOOK.shape], model)}
    both = runs.trained(work_dir, runs.JOINT, seed, args.steps, threads=args.threads, model=model)
    for name, word in runs.WORDS.items():
        file = both.parent / f"scores-{name}.json"
        found[f"{name} of both"] = runs.scored(both, seed, bases[name], model, file, word)
    return found


def table_of(results: dict[str, dict[str, dict]]) -> str:
    """Markdown."""
    lines = [["of 100", "", "best description", *SCORES]]
    for model, by_run in results.items():
        for run, summary in by_run.items():
            described = f"{summary['concept_baseline']['mean']:.1f}"
            lines.append([f"`{model}`", run, described, *(runs.cell(summary[key]["values"]) for key in SCORES)])
    return runs.table(lines)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    found = {model.name: [] for model in MODELS}
    for seed in runs.seeds(args):  # model by model within a seed, so that what is there is always of the same seeds
        for model in MODELS:
            found[model.name].append(measure(args, model, seed))
    results = {
        model: {run: runs.summary([one[run] for one in seeds]) for run in seeds[0]} for model, seeds in found.items()
    }
    runs.write_json(args.docs / "families.json", results)
    print("\n" + table_of(results))


if __name__ == "__main__":
    main()
