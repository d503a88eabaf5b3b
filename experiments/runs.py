# ruff: noqa: E402
# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Trainings of the small model that the experiments share: `python experiments/runs.py --num_seeds 12` makes and scores them.

A run is trained once, by the training script, into WORK_DIR/<concept>/seed-<N>/weights; whoever asks for it again gets that folder.
Broken off, the command goes on with the first run that is missing. What differs in flags or steps belongs into a WORK_DIR of
its own.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "demo"), str(ROOT)]  # the small model's world and judge; the package, installed or not
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import baselines
import concept as concepts
import numpy as np
import torch
import world
from concept import LOOKS, Base
from make_photos import concept_photos
from PIL import Image

import demo
from custom_diffusion.files import whole_file

MODEL = ROOT / demo.MODEL
SCRIPT = ROOT / "train_custom_diffusion.py"
VARIANTS = ROOT / "experiments/variants.py"
FLAGS = ("--noaug", "--cache_latents")
CHECKPOINTING_STEPS = 50
JOINT = "joint"
WORDS = {"circle": "<new1>", "square": "<new2>"}  # where both are in one folder


def once(file: Path, measure: Callable[[], dict | list]) -> dict | list:
    """What the JSON file says; where there is none, what `measure` returns, which is then kept there."""
    if not file.is_file():
        write_json(file, measure())
    return json.loads(file.read_text())


def write_json(file: Path, content: dict | list) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, None for a single value."""
    values = np.asarray(values, float)
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def cell(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error as a table has them; `sign` "+" for differences."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.1f}" if error is None else f"{mean:{sign}.1f} ± {error:.1f}"


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def run(*command: str, threads: int | None = None, log: Path | None = None) -> None:
    """`python COMMAND` from the repository's root."""
    print("$ " + shlex.join(["python", *command]), flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    if log is None:
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=environment)
        return
    with log.open("w") as file:
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=environment, stdout=file, stderr=file)


def photos(work_dir: Path, concept: str) -> Path:
    """The folder with five photos of the concept."""
    folder = work_dir / concept / "photos"
    if not folder.is_dir():
        drawn = concept_photos(LOOKS[concept], seed=3)
        folder.mkdir(parents=True)
        for i, photo in enumerate(drawn):
            Image.fromarray(photo).save(folder / f"{i}.png")
    return folder


def class_images(work_dir: Path, concept: str, num_images: int = demo.NUM_CLASS_IMAGES) -> Path:
    """The folder, in the layout of `retrieve.py`, with ordinary images of the concept's class, none of its colour."""
    folder = work_dir / concept / "class"
    if (folder / "urls.txt").is_file():
        return folder
    look, rng, captions = LOOKS[concept], np.random.default_rng(3), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    while len(captions) < num_images:
        thing, spec = world.random_sample(rng)
        if thing.shape != look.shape or world.hue_distance(thing.hue, look.hue) < 25.0:
            continue
        Image.fromarray(world.draw(thing)).save(folder / "images" / f"{len(captions)}.png")
        # Half of the captions name no colour, so that the bare class word does not take on the concept's.
        plain = world.Spec(spec.shape, None, spec.edge, spec.background)
        captions.append((spec if rng.random() < 0.5 else plain).caption())
    (folder / "caption.txt").write_text("".join(f"{caption}\n" for caption in captions))
    # Whole paths: the reference script looks for others where it was started.
    for name, line in (("images", f"{folder.resolve()}/images/{{}}.png\n"), ("urls", "https://example.org/{}.png\n")):
        (folder / f"{name}.txt").write_text("".join(line.format(i) for i in range(num_images)))
    return folder


def described_flags(work_dir: Path, concept: str) -> list[str]:
    """Each photo with its background in its prompt, over the flags of one concept or of JOINT."""
    words = WORDS if concept == JOINT else {concept: "<new1>"}
    entries = []
    for name, word in words.items():
        folder = (work_dir / name / "described").resolve()
        images = class_images(work_dir, name).resolve()
        entries += demo.described_photos(photos(work_dir, name), folder, name, images, word)
    flags = _concepts_flags(work_dir / concept / "described/concepts.json", entries)
    return flags if len(words) == 1 else [*flags, "--modifier_token", "+".join(words.values())]


def joint_flags(work_dir: Path, num_class_images: int) -> list[str]:
    """Both concepts in one run, over the flags of a single one."""
    entries = [
        {
            "instance_prompt": f"photo of a {word} {name}",
            "instance_data_dir": str(photos(work_dir, name).resolve()),
            "class_prompt": name,
            "class_data_dir": str(class_images(work_dir, name, num_class_images).resolve()),
        }
        for name, word in WORDS.items()
    ]
    flags = _concepts_flags(work_dir / JOINT / "concepts.json", entries)
    return [*flags, "--modifier_token", "+".join(WORDS.values())]


def _concepts_flags(file, entries):
    write_json(file, entries)
    return ["--concepts_list", str(file.resolve())]


def trained(
    work_dir: Path,
    concept: str,
    seed: int,
    steps: int = 1000,
    flags: Sequence[str] = FLAGS,
    threads: int = 1,
    model: Path = MODEL,
    script: tuple[Path | str, ...] = (SCRIPT,),
) -> Path:
    """The folder of trained weights, trained now if they are not there.

    Args:
        concept: name in LOOKS, for <new1>; or JOINT, for both in one run, with the words of WORDS.
        flags: of the training script, besides and over those of the demo.
        script: what trains, the words before the flags; a peer's may stand in that knows the same flags.
    Raises:
        SystemExit: what is there was trained otherwise. The number of threads may differ, though it moves scores a little.
    """
    folder = (work_dir / concept / f"seed-{seed}").resolve()
    settings = {"seed": seed, "steps": steps, "flags": list(flags), "model": baselines.fingerprint(model)}
    settings["script"] = SCRIPT.name if script == (SCRIPT,) else " ".join(map(str, script))
    note = folder / "run.json"
    if note.is_file():
        before = json.loads(note.read_text())
        differing = [key for key, value in settings.items() if before.get(key) != value]
        if differing:
            raise SystemExit(f"{folder} was trained with another {', '.join(differing)}: give another --work_dir")
        return folder / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    of = next(iter(LOOKS)) if concept == JOINT else concept
    # A peer's checkpoints are large, and it may refuse class images that it does not show.
    ours = script[0] in (SCRIPT, VARIANTS)
    every, num_class_images = (CHECKPOINTING_STEPS, demo.NUM_CLASS_IMAGES) if ours else (steps + 1, demo.SHOWN)
    command = demo.training_flags(
        folder / "weights", of, photos(work_dir, of).resolve(), class_images(work_dir, of, num_class_images).resolve(),
        steps, seed=seed, model=model.resolve(),
    )  # fmt: skip
    command += ["--checkpointing_steps", str(every)]
    command += [*(joint_flags(work_dir, num_class_images) if concept == JOINT else []), *flags]
    run(*map(str, script), *command, threads=threads, log=folder / "training.log")
    write_json(note, settings | {"threads": threads})
    return folder / "weights"


def scored(
    weights: Path | None, seed: int, base: Base, model: Path = MODEL, file: Path | None = None, word: str = "<new1>"
) -> dict[str, float]:
    """`concept.scores` of a run of `trained`, or without weights of the model itself, kept beside the weights or in `file`.

    Each seed has images of its own, as they vary too.
    """

    def measure():
        return concepts.scores(demo.load_pipeline(weights, model.resolve()), word, seed, base)

    return once(file or weights.parent / "scores.json", measure)


def absolute(text: str) -> Path:
    """A flag's path as commands that run from the repository's root find it too."""
    return Path(text).resolve()


def add_flags(parser: argparse.ArgumentParser, work_dir: str, num_seeds: int) -> None:
    """What every experiment asks."""
    parser.add_argument(
        "--work_dir", type=absolute, default=ROOT / "demo/output" / work_dir, help="what is there is used again"
    )
    parser.add_argument("--model", type=absolute, default=MODEL)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--num_seeds", type=int, default=num_seeds)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=1, help="of each process; there is one at a time")


def seeds(args: argparse.Namespace) -> range:
    return range(args.first_seed, args.first_seed + args.num_seeds)


def summary(runs: list[dict[str, float]]) -> dict[str, dict]:
    """Of each score its mean, standard error and values."""
    columns = {key: [one[key] for one in runs] for key in runs[0]}
    names = ("mean", "standard error")
    return {key: dict(zip(names, mean_and_error(values))) | {"values": values} for key, values in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, "runs", num_seeds=12)
    parser.add_argument("--concepts", nargs="+", choices=list(LOOKS), default=list(LOOKS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bases = baselines.read(args.model)
    results = {name: [] for name in args.concepts}
    for seed in seeds(args):  # concept by concept within a seed, so that what is there is always of the same seeds
        for name in args.concepts:
            weights = trained(args.work_dir, name, seed, args.steps, threads=args.threads, model=args.model)
            results[name].append(scored(weights, seed, bases[name], args.model))
    write_json(args.work_dir / "scores.json", {name: summary(runs) for name, runs in results.items()})
    heads = ["of 100", *results]
    keys = results[args.concepts[0]][0]
    print(
        "\n"
        + table([heads, *([key, *(cell([one[key] for one in results[name]]) for name in results)] for key in keys)])
    )


if __name__ == "__main__":
    main()
