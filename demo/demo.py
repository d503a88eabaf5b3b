# ruff: noqa: E402
# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Teach the small model a thing it has no words for, and show it before and after: `make demo`, or `make demo DEMO=sdxl`.

Class images from a captioned folder, training by `accelerate launch`, pictures by a plain diffusers pipeline: the three
steps that a concept of your own takes with a model of ordinary size.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import baselines
import concept
import contact_sheet
import diffusers
import numpy as np
import transformers
from diffusers import DiffusionPipeline
from judge import generate
from make_photos import PHOTO_BACKGROUNDS

from custom_diffusion import load_custom_diffusion
from custom_diffusion.images import open_image

MODEL = Path("demo/model")
PHOTOS = Path("demo/photos")
CLASS_IMAGES = Path("demo/class_images")
OUTPUT = Path("demo/output")
# Class images, and how many of them training shows: the others tell the curve what is forgotten
NUM_CLASS_IMAGES, SHOWN = 120, 100
ROWS = (  # of the contact sheet: what is asked of the model before, and after
    ("photo of a ktn circle on a black background", "photo of a <new1> circle on a black background"),
    ("photo of a ktn circle on a white background", "photo of a <new1> circle on a white background"),
    ("photo of a red circle on a white background",) * 2,
    ("photo of a blue square with a yellow edge on a pink background",) * 2,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="demo/model or demo/model_sdxl")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="before --scale_lr")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without_prior", action="store_true", help="train on the photos alone")
    return parser.parse_args(argv)


def run(command: list[str]) -> None:
    print("\n$ " + shlex.join(["python", *command]), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def retrieve_class_images(output: Path) -> Path:
    folder = output / "class_circle"
    run([
        "retrieve.py", "--class_prompt", "circle", "--class_data_dir", str(folder), "--num_class_images", str(NUM_CLASS_IMAGES),
        "--dataset", str(CLASS_IMAGES), "--min_size", "64",
    ])  # fmt: skip
    return folder


def launched(flags: list[str]) -> list[str]:
    """The training command, as one starts it who has a single CPU process."""
    return [
        "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", "train_custom_diffusion.py", *flags,
    ]  # fmt: skip


def training_flags(
    folder: Path,
    class_word: str,
    photos: Path | None,
    class_data_dir: Path | None,
    steps: int = 1000,
    learning_rate: float = 5e-4,
    seed: int = 0,
    model: Path = MODEL,
) -> list[str]:
    """Trains <new1> for the photos' thing into `folder`.

    Without `class_data_dir` there is no prior preservation; without `photos`, a concepts list says what images there are.
    """
    # --scale_lr doubles the rate for prior preservation; without it, the same rate takes twice the number.
    learning_rate *= 1 if class_data_dir else 2
    flags = [
        "--pretrained_model_name_or_path", str(model), "--output_dir", str(folder),
        "--modifier_token", "<new1>", "--resolution", "64", "--train_batch_size", "2",
        "--max_train_steps", str(steps), "--learning_rate", str(learning_rate), "--scale_lr",
        "--lr_scheduler", "cosine", "--lr_warmup_steps", "0", "--seed", str(seed), "--dataloader_num_workers", "0",
    ]  # fmt: skip
    if class_data_dir:
        flags += [
            "--with_prior_preservation", "--real_prior", "--prior_loss_weight", "1.0", "--num_class_images", str(SHOWN),
        ]  # fmt: skip
    if photos:
        flags += ["--instance_data_dir", str(photos), "--instance_prompt", f"photo of a <new1> {class_word}"]
    if photos and class_data_dir:
        flags += ["--class_prompt", class_word, "--class_data_dir", str(class_data_dir)]
    return flags


def described_photos(
    photos: Path, folder: Path, class_word: str, class_data_dir: Path | None, word: str = "<new1>"
) -> list[dict]:
    """The entries of a concepts list that give each photo a prompt of its own, which names the background too.

    With one prompt for all photos the model draws the thing well where that prompt is asked for, and loses it where more is said.
    Each photo needs a folder of its own, made in `folder`.
    """
    entries = []
    for photo, background in zip(sorted(photos.glob("*.png")), PHOTO_BACKGROUNDS):
        (folder / background).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / background)
        entry = {
            "instance_prompt": f"photo of a {word} {class_word} on a {background} background",
            "instance_data_dir": str(folder / background),
        }
        if class_data_dir:
            entry |= {"class_prompt": class_word, "class_data_dir": str(class_data_dir)}
        entries.append(entry)
    return entries


def load_pipeline(weights: Path | None = None, model: Path = MODEL) -> DiffusionPipeline:
    """The small model, with the trained concept in it if `weights` is given."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(ROOT / model)
    pipeline.set_progress_bar_config(disable=True)
    if weights is not None:
        load_custom_diffusion(pipeline, ROOT / weights)
    return pipeline


def table(scores: dict[str, dict]) -> str:
    """What a reader is told at the end: before, what words alone reach, and after."""
    lines = [f"{'of 100':40} before  prompted  after"]
    for key, label in concept.LABELS.items():
        prompted = f"{scores['prompted'][key]:8.1f}" if key in scores["prompted"] else " " * 8
        label = label.format(concept.LOOK.shape)
        lines.append(f"{label:40} {scores['before'][key]:6.1f}  {prompted} {scores['after'][key]:6.1f}")
    return "\n".join(
        [*lines, f'prompted: "{scores["prompted"]["prompt"]}", the best description in words that the model knows']
    )


def main() -> None:
    args = parse_args()
    start = time.time()
    class_data_dir = None if args.without_prior else retrieve_class_images(args.output)
    weights = args.output / ("weights_without_prior" if args.without_prior else "weights")
    flags = training_flags(
        weights, concept.LOOK.shape, None, class_data_dir, args.steps, args.learning_rate, args.seed, args.model
    )
    described = described_photos(ROOT / PHOTOS, args.output / "photos", concept.LOOK.shape, class_data_dir)
    concepts_list = args.output / "concept_list.json"
    concepts_list.write_text(json.dumps(described, indent=2) + "\n")
    run(launched([*flags, "--concepts_list", str(concepts_list), "--noaug", "--cache_latents"]))

    print("\nDrawing before and after ...", flush=True)
    base = baselines.read((ROOT / args.model).resolve())[concept.LOOK.shape]
    before, after = load_pipeline(model=args.model), load_pipeline(weights, args.model)
    scores = {
        "before": concept.scores(before, "ktn", args.seed, base),
        "prompted": {"prompt": base.prompt, "concept": base.score},
        "after": concept.scores(after, "<new1>", args.seed, base),
    }
    photos = [np.asarray(open_image(path)) for path in sorted((ROOT / PHOTOS).glob("*.png"))]
    rows = [
        (prompts, generate(before, [prompts[0]] * 5, args.seed), generate(after, [prompts[1]] * 5, args.seed))
        for prompts in ROWS
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    contact_sheet.draw(photos, rows).save(args.output / "before_after.png")
    (args.output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")

    print("\n" + table(scores))
    print(f"\n{args.output / 'before_after.png'} shows both; {time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()
