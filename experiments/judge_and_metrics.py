# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Do `evaluate`'s scores see what the demo's judge sees? `python experiments/judge_and_metrics.py`.

Trains the demo's concept from several seeds, and scores the base model, two checkpoints of each run and its end twice: by the judge, who
knows what is to be seen, and by `evaluate`. Prints both side by side, and how far they rank alike; writes docs/judge_and_metrics.json.
`evaluate` gets the small models of `small_clip.py`, or others by the flags. What is there is used again.
"""

import argparse
from pathlib import Path

import runs  # finds the demo
import small_clip
import torch
import world
from concept import LABELS, LOOK
from torchmetrics.functional import spearman_corrcoef

from custom_diffusion import evaluate
from custom_diffusion.evaluation.report import SCORES
from custom_diffusion.files import checkpoint_path

CHECKPOINTS = (100, 250)  # steps, besides the end
WORD = "ktn"  # what the judge asks the base model for; the new word starts from it
PROMPTS = ["photo of a {}", *(f"photo of a {{}} on a {ground} background" for ground in world.BACKGROUNDS)]
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0}  # as the judge has it drawn
JUDGE, METRICS = tuple(LABELS), tuple(SCORES)
SHOWN = {metric: (f"{name}, x 100", 100) for metric, (name, _) in SCORES.items()} | {
    "kid_clip": (SCORES["kid_clip"][0], 1)
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "judge_and_metrics", num_seeds=8)
    parser.set_defaults(steps=500)
    parser.add_argument("--num_images", type=int, default=3, help="of each prompt, for `evaluate`")
    parser.add_argument(
        "--clip_model", help="folder or Hub id, like openai/clip-vit-base-patch32; the small one otherwise"
    )
    parser.add_argument("--dino_model", help="folder or Hub id, like facebook/dino-vits16; the small one otherwise")
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def encoders(args: argparse.Namespace) -> tuple[str, str]:
    """Folders or Hub ids of CLIP and DINO; small ones are trained if one is not given."""
    if args.clip_model and args.dino_model:
        return args.clip_model, args.dino_model
    clip, vit = small_clip.trained(args.work_dir / "small_clip")
    return args.clip_model or str(clip), args.dino_model or str(vit)


def measure(args: argparse.Namespace, seed: int, base: runs.Base, clip_model: str, dino_model: str) -> list[dict]:
    """Scores of the base model, of the checkpoints and of the end of one run, by the judge and by `evaluate`."""
    weights = runs.trained(args.work_dir, LOOK.shape, seed, args.steps, threads=args.threads, model=args.model)
    folder = args.work_dir / "judge_and_metrics" / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    taught = {step: checkpoint_path(weights, step) for step in CHECKPOINTS if step < args.steps} | {args.steps: weights}
    judged = {0: runs.scored(None, seed, base, args.model, folder / "base.json", WORD)}
    for step, one in taught.items():
        judged[step] = runs.scored(one, seed, base, args.model, weights.parent / f"scores-{step}.json")
    rows = evaluate(
        list(taught.values()),
        photos=runs.photos(args.work_dir, LOOK.shape),
        prompts=folder / "prompts.txt",
        with_base=True,
        class_images=runs.class_images(args.work_dir, LOOK.shape),
        num_images=args.num_images,
        **DRAWING,
        seed=10_000 * seed,
        clip_model=clip_model,
        dino_model=dino_model,
        model=str(args.model),
        output=folder / "evaluate",
    )
    return [
        {"seed": seed, "steps": step, **{key: judge[key] for key in JUDGE}, **{key: row[key] for key in METRICS}}
        for (step, judge), row in zip(judged.items(), rows)
    ]


def correlations(rows: list[dict]) -> dict[str, dict[str, float | None]]:
    """Spearman's rank correlation of each of the judge's scores with each metric; None where one of them never changes."""

    def correlation(*names):
        columns = [torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names]
        if any((column == column[0]).all() for column in columns):
            return None
        return spearman_corrcoef(*columns).item()

    return {score: {metric: correlation(score, metric) for metric in METRICS} for score in JUDGE}


def table_of_scores(rows: list[dict]) -> str:
    """Markdown: means with standard errors by the number of steps."""
    shown = {**{score: (score, 1) for score in JUDGE}, **SHOWN}
    lines = [["steps", *(head for head, _ in shown.values())]]
    for steps in sorted({row["steps"] for row in rows}):
        there = [row for row in rows if row["steps"] == steps]
        lines.append(
            [str(steps), *(runs.cell([scale * row[key] for row in there]) for key, (_, scale) in shown.items())]
        )
    return runs.table(lines)


def table_of_correlations(found: dict[str, dict[str, dict]]) -> str:
    """Markdown: a line for each of the judge's scores, of each set of rows."""
    lines = [["rank correlation", "rows", *(name for name, _ in SCORES.values())]]
    for rows, by_score in found.items():
        for score, by_metric in by_score.items():
            cells = ["" if value is None else f"{value:+.2f}" for value in by_metric.values()]
            lines.append([score, rows, *cells])
    return runs.table(lines)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    clip_model, dino_model = encoders(args)
    base = runs.baselines.read(args.model)[LOOK.shape]
    rows = [row for seed in runs.seeds(args) for row in measure(args, seed, base, clip_model, dino_model)]
    found = {"all": correlations(rows), "trained": correlations([row for row in rows if row["steps"]])}
    runs.write_json(args.docs / "judge_and_metrics.json", {"correlations": found, "rows": rows})
    print("\n" + table_of_scores(rows))
    print("\n" + table_of_correlations(found))


if __name__ == "__main__":
    main()
