# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""The small Stable Diffusion and the small SDXL taught the same, side by side: `python experiments/families.py`.

The circle alone, and the circle and the square in one run, each with one prompt for all photos and with prompts that name a photo's
background; from the same photos, class images and flags. Prints the table and writes docs/families.json. Some hours of one core;
what is there is used again.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch
from concept import LOOK, concept_score, places
from judge import generate, likeness, see

import demo
from custom_diffusion.files import checkpoint_path

MODELS = (runs.MODEL, runs.ROOT / "demo/model_sdxl")
# Where a run of the last so many is scored, with one prompt for all photos and with both concepts
STEPS = (100, 250, 500)
ONE, DESCRIBED = "one for all photos", "one for each, with its background"
# What no prompt of training has said: the background that is in no photo, and other sentences
UNSEEN = {
    "new background": ["photo of a {} on a black background"] * 12,
    "new sentences": [f"{start} {place}" for start in ("a photo of {}", "{}", "a {}") for place in places(1)],
}
SCORES = ("concept", "leakage", "prior_class", "prior", "circle", "square", *UNSEEN)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "families", num_seeds=8)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def at(weights: Path, step: int, steps: int) -> Path:
    """The weights that a run of so many steps had after `step` of them."""
    return weights if step == steps else checkpoint_path(weights, step)


def unseen(weights: Path, model: Path, seed: int) -> dict[str, float]:
    """The circle's score for each of UNSEEN, 0 to 100."""
    pipe = demo.load_pipeline(weights, model)
    return {
        name: round(100 * float(np.mean([likeness(see(image), LOOK) for image in drawn])), 1)
        for name, prompts in UNSEEN.items()
        for drawn in [generate(pipe, [prompt.format(f"<new1> {LOOK.shape}") for prompt in prompts], seed)]
    }


def concepts_of_both(weights: Path, model: Path, seed: int) -> dict[str, float]:
    """The concept score of each, of weights that know both."""
    pipe = demo.load_pipeline(weights, model)
    scores = {name: concept_score(pipe, f"{word} {name}", name, seed) for name, word in runs.WORDS.items()}
    return {name: round(score, 1) for name, score in scores.items()}


def measure(args: argparse.Namespace, model: Path, seed: int) -> dict[str, dict[str, float]]:
    """The scores of the circle, taught by either kind of prompt, and of both where one run taught them."""
    bases, work_dir, found = runs.baselines.read(model), args.work_dir / model.name, {}
    described = [*runs.FLAGS, *runs.described_flags(work_dir, LOOK.shape)]
    for prompts, folder, flags, steps in (
        (ONE, work_dir, runs.FLAGS, STEPS),
        (DESCRIBED, work_dir / "described", described, (args.steps,)),
    ):
        weights = runs.trained(folder, LOOK.shape, seed, steps[-1], flags, args.threads, model)
        for step in steps:
            file = weights.parent / f"scores-{step}.json"
            found[f"{prompts}, {step}"] = runs.scored(
                at(weights, step, steps[-1]), seed, bases[LOOK.shape], model, file
            )
        file = weights.parent / "unseen.json"
        found[f"{prompts}, {steps[-1]}"] |= runs.once(file, partial(unseen, weights, model, seed))
    described = [*runs.FLAGS, *runs.described_flags(work_dir, runs.JOINT)]
    for prompts, folder, flags, steps in (
        (ONE, work_dir, runs.FLAGS, STEPS),
        (DESCRIBED, work_dir / "described", described, STEPS[-1:]),
    ):
        both = runs.trained(folder, runs.JOINT, seed, STEPS[-1], flags, args.threads, model)
        for step in steps:
            of_both = partial(concepts_of_both, at(both, step, STEPS[-1]), model, seed)
            found[f"both, {prompts}, {step}"] = runs.once(both.parent / f"concepts-{step}.json", of_both)
    return found


def table_of(results: dict[str, dict[str, dict]]) -> str:
    """Markdown."""
    lines = [["", "prompts, steps", *SCORES]]
    for model, by_run in results.items():
        for name, summary in by_run.items():
            cells = [runs.cell(summary[key]["values"]) if key in summary else "" for key in SCORES]
            lines.append([f"`{model}`", name, *cells])
    return runs.table(lines)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    found = {model.name: [] for model in MODELS}
    for seed in runs.seeds(args):  # model by model within a seed, so that what is there is always of the same seeds
        for model in MODELS:
            found[model.name].append(measure(args, model, seed))
    results = {
        model: {step: runs.summary([one[step] for one in seeds]) for step in seeds[0]} for model, seeds in found.items()
    }
    runs.write_json(args.docs / "families.json", results)
    print("\n" + table_of(results))


if __name__ == "__main__":
    main()
