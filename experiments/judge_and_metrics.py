# ruff: noqa: E402
# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Do `evaluate`'s scores see what the demo's judge sees? `python experiments/judge_and_metrics.py`.

Trains the demo's concept from several seeds, and scores the base model and every checkpoint twice: by the judge, who knows what is to
be seen, and by `evaluate`. Prints both side by side, and how far they rank alike; writes docs/judge_and_metrics.json. What is there is
used again. CLIP and DINO are downloaded, or given as folders; with random ones only the machinery can be seen.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "demo"), str(ROOT)]  # the small model's world and judge; the package, installed or not

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import concept
import numpy as np
import torch
import world
from torchmetrics.functional import spearman_corrcoef

import demo
from custom_diffusion import evaluate
from custom_diffusion.evaluation.report import SCORES
from custom_diffusion.files import list_checkpoints
from custom_diffusion.tools.evaluate import CLIP_MODEL, DINO_MODEL

WORD = "ktn"  # what the judge asks the base model for; the new word starts from it
PROMPTS = ["photo of a {}", *(f"photo of a {{}} on a {ground} background" for ground in world.BACKGROUNDS)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps; a checkpoint at every quarter")
    parser.add_argument("--num_images", type=int, default=5, help="of each prompt, for `evaluate`")
    parser.add_argument("--clip_model", default=CLIP_MODEL, help="folder or Hub id")
    parser.add_argument("--dino_model", default=DINO_MODEL, help="folder or Hub id")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "demo/output/judge_and_metrics")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser.parse_args()


def train(folder: Path, seed: int, args: argparse.Namespace) -> list[Path]:
    """The checkpoints of a run, which is trained if it is not there."""
    every = max(args.steps // 4, 1)
    if not list_checkpoints(folder / "weights"):
        folder.mkdir(parents=True, exist_ok=True)
        settings = demo.parse_args(["--seed", str(seed), "--steps", str(args.steps)])
        flags = ["--hflip", "--checkpointing_steps", str(every)]
        command = demo.training_command(folder / "weights", args.work_dir / "class_circle", flags, settings)
        with (folder / "training.log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=environment, stdout=log, stderr=log)
    return list_checkpoints(folder / "weights")


def judged(weights: Path | None, file: Path) -> dict[str, float]:
    """The judge's scores of weights, or of the base model."""
    if not file.is_file():
        pipeline = demo.load_pipeline(weights)
        file.write_text(json.dumps(concept.scores(pipeline, "<new1>" if weights else WORD, 0)))
    return json.loads(file.read_text())


def measure(seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """Scores of the base model and of each checkpoint, by the judge and by `evaluate`."""
    folder = args.work_dir / f"seed-{seed}"
    checkpoints = train(folder, seed, args)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    rows = evaluate(
        checkpoints,
        photos=ROOT / demo.PHOTOS,
        prompts=folder / "prompts.txt",
        concept="<new1> circle",
        with_base=True,
        class_images=args.work_dir / "class_circle",
        num_images=args.num_images,
        num_inference_steps=20,
        guidance_scale=3.0,
        seed=10_000 * seed,
        clip_model=args.clip_model,
        dino_model=args.dino_model,
        model=str(ROOT / demo.MODEL),
        output=folder / "scores",
    )
    results = []
    for row, weights in zip(rows, [None, *checkpoints]):
        judge = judged(weights, folder / f"judge-{row['steps']}.json")
        results.append({"seed": seed, "steps": row["steps"], **judge, **{score: row[score] for score in SCORES}})
    return results


def mean_and_error(values: list[float]) -> str:
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{error}"


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # so that the result does not depend on the machine
    if not (args.work_dir / "class_circle").is_dir():
        demo.retrieve_class_images(args.work_dir)
    results = [row for seed in range(args.num_seeds) for row in measure(seed, args)]
    args.docs.mkdir(exist_ok=True)
    told = {"clip_model": args.clip_model, "dino_model": args.dino_model, "results": results}
    (args.docs / "judge_and_metrics.json").write_text(json.dumps(told, indent=2) + "\n")
    judge = [name for name in results[0] if name not in ("seed", "steps", *SCORES)]
    names = [*judge, *SCORES]
    print("\n| steps | " + " | ".join([*judge, *(SCORES[score][0] for score in SCORES)]) + " |")
    print("|---" * (1 + len(names)) + "|")
    for steps in sorted({row["steps"] for row in results}):
        cells = [mean_and_error([row[name] for row in results if row["steps"] == steps]) for name in names]
        print(f"| {steps} | " + " | ".join(cells) + " |")
    print("\n| Spearman's rank correlation | " + " | ".join(SCORES[score][0] for score in SCORES) + " |")
    print("|---" * (1 + len(SCORES)) + "|")
    for name in judge:
        columns = {key: torch.tensor([float(row[key]) for row in results]) for key in (name, *SCORES)}
        cells = [f"{spearman_corrcoef(columns[name], columns[score]):.2f}" for score in SCORES]
        print(f"| the judge's {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
