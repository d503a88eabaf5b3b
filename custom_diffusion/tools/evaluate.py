"""Score trained concepts: like the photos, true to the prompt, and what is forgotten.

custom-diffusion evaluate cat cat/checkpoint-100 --with_base --photos data/cat --output scores
custom-diffusion evaluate cat --photos data/cat --class_images real_reg/samples_cat --output scores
custom-diffusion evaluate --dataset customconcept101 --data customconcept101 --output benchmark

Draws every prompt with all of them, from the same noise, and writes images, results.json, results.csv and a page, index.html. Run
again after a stop, it goes on; run with more folders, prompts or images, it draws only those.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from custom_diffusion.cli.concepts import decode_problems
from custom_diffusion.cli.tool_flags import (
    add_model_flags,
    cannot_be_hub_id,
    drawing_problems,
    model_problems,
    weights_problems,
    writable_problems,
)
from custom_diffusion.errors import InputError
from custom_diffusion.evaluation.benchmark import (
    MODEL,
    comparison,
    is_trained,
    read_customconcept101,
    train_concept,
    training_command,
    weights_folder,
)
from custom_diffusion.evaluation.prompts import MOST_IMAGES, PROMPT_SETS, read_prompts
from custom_diffusion.evaluation.references import find_class_images, find_photos
from custom_diffusion.evaluation.report import PAGE, foreign_results, text_table, write_results

if TYPE_CHECKING:
    from custom_diffusion.weights.format import ConceptWeights

CLIP_MODEL, DINO_MODEL = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
NO_PHOTOS = "--photos: is missing; name the folder of the concept's photos"
NO_DATA = "--data: is missing; name the folder that holds the dataset"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("weights", nargs="*", help="trained folders, checkpoint folders or Hub ids; none for the base model alone")
    add("--photos", help="folder of the concept's photos")
    add("--output", required=True, help="folder for images, results and page; one of an earlier call is gone on with")
    add(
        "--prompts",
        default="things",
        help=f"file, one a line, {{}} for the concept; or {', '.join(PROMPT_SETS)} (default: %(default)s)",
    )
    add(
        "--concept",
        help="what {} stands for (default: the weights' instance prompt from its modifier token on); "
        "without a new word, what the base model calls it",
    )
    add("--with_base", action="store_true", help="score the base model too")
    add("--num_images", type=int, default=5, help="images per prompt (default: %(default)s)")
    add("--class_images", help="folder of real class images, to see what is forgotten")
    add("--clip_model", default=CLIP_MODEL, help="folder or Hub id (default: %(default)s)")
    add("--dino_model", default=DINO_MODEL, help="folder or Hub id (default: %(default)s)")
    add("--num_inference_steps", type=int, default=50, help="DDPM steps (default: %(default)s)")
    add("--guidance_scale", type=float, default=6.0, help="how strongly to follow the prompt (default: %(default)s)")
    add("--resolution", type=int, help="side of the images in pixels (default: the model's)")
    add("--seed", type=int, default=42, help="of the noise, which is the same for all weights (default: %(default)s)")
    add("--dataset", choices=["customconcept101"], help="run this benchmark over --data, with weights under --output")
    add("--data", help="the benchmark's folder: dataset.json, prompts/, benchmark_dataset/")
    add(
        "--train",
        nargs="?",
        const="",
        metavar="FLAGS",
        help="train the benchmark's concepts that are not; FLAGS are added",
    )
    add_model_flags(parser)


def flag_problems(args: argparse.Namespace) -> list[str]:
    problems = model_problems(args) + drawing_problems(args, MOST_IMAGES)
    if args.resolution is not None and (args.resolution < 8 or args.resolution % 8):
        nearest = max(round(args.resolution / 8), 1) * 8
        problems.append(f"--resolution: {args.resolution} is not a multiple of 8; try {nearest}")
    for name in ("clip_model", "dino_model"):
        path = getattr(args, name)
        if not Path(path).is_dir() and cannot_be_hub_id(path):
            problems.append(f"--{name}: folder '{path}' does not exist; give a folder or a Hub id")
    if Path(args.output).is_file():
        problems.append(f"--output: '{args.output}' is a file; name a folder")
    problems += writable_problems(args.output) or foreign_results(Path(args.output))
    return problems + (_dataset_problems if args.dataset else _subject_problems)(args)


def _subject_problems(args):
    problems = [f"--{n}: needs --dataset" for n in ("data", "train") if getattr(args, n) is not None]
    for path in args.weights:
        problems += weights_problems("weights", path)
    if not args.weights and args.model is None:
        problems.append("weights: give trained weights, or a --model to score")
    if args.photos is None:
        problems.append(NO_PHOTOS)
    for read, name in (
        (_read_photos, args.photos),
        (_read_class_images, args.class_images),
        (read_prompts, args.prompts),
    ):
        try:
            if name is not None:
                read(name)
        except InputError as error:
            problems += error.problems
    return problems


def _read_photos(folder):
    _decode("--photos", find_photos(folder))


def _read_class_images(folder):
    _decode("--class_images", [path for path, _ in find_class_images(folder)])


def _decode(name, paths):
    if problems := decode_problems(name, paths):
        raise InputError(*problems)


def _dataset_problems(args):
    given = [n for n in ("weights", "photos", "concept", "with_base", "class_images") if getattr(args, n)]
    given += ["prompts"] if args.prompts != "things" else []
    names = [name if name == "weights" else f"--{name}" for name in given]
    problems = [f"{name}: --dataset brings its own; leave it out" for name in names]
    if args.data is None:
        problems.append(NO_DATA)
    try:
        shlex.split(args.train or "")
    except ValueError as error:
        problems.append(f"--train: {args.train!r} cannot be split into flags ({error})")
    return problems


def main(args: argparse.Namespace) -> None:
    """Print the scores, and where the page is."""
    rows = evaluate(**{name: value for name, value in vars(args).items() if name != "tool"})
    if args.dataset is None:
        print(text_table(rows))
        print(f"\n{Path(args.output) / PAGE}")


def evaluate(
    weights: ConceptWeights | str | Path | Sequence[ConceptWeights | str | Path] | None = None,
    *,
    output: str | Path,
    photos: str | Path | None = None,
    prompts: str | Path = "things",
    concept: str | None = None,
    with_base: bool = False,
    num_images: int = 5,
    class_images: str | Path | None = None,
    clip_model: str = CLIP_MODEL,
    dino_model: str = DINO_MODEL,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    resolution: int | None = None,
    seed: int = 42,
    dataset: str | None = None,
    data: str | Path | None = None,
    train: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    config_from: str | None = None,
) -> list[dict]:
    """Draw the prompts and score what comes out.

    Args:
        weights: trained folder, checkpoint folder, Hub id or weights already read, one or several; none for the base model.
        photos: folder of the concept's photos, needed but with `dataset`. class_images: of its class; adds what is forgotten.
        output: folder for images, results.json, results.csv and the page. What it holds of an earlier call is used again.
        prompts: text file, or "things", "faces", "styles". num_images: of each prompt.
        concept: what `{}` stands for, by default the instance prompt from its modifier token on. Without a new word in it, what
            the base model calls it, by default the same without the new word, or where that is nothing, the class prompt.
        dataset: "customconcept101" for the benchmark in the folder `data`, which brings photos and prompts. Prints the training
            command of what is not trained yet; `train` runs it, with these flags added.
        with_base: score the base model too. model, revision, variant: it, by default the one that the weights name.
        config_from: folder or Hub id that has the configuration and tokenizers of a base model in one file.
    Returns:
        The results of results.json, one for the base model and each of the weights, or for each trained concept of the dataset:
        name, steps, mean scores with standard errors over prompts, and the scores of each image.
    Raises:
        InputError: something cannot be used, or was drawn with other settings. Nothing has been drawn then.
    """
    from custom_diffusion.evaluation.run import Models, evaluate_subjects

    if problems := foreign_results(Path(output)):
        raise InputError(*problems)
    models, source = Models(clip_model, dino_model), (model, revision, variant, config_from)
    settings = {"num_images": num_images, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    settings |= {"resolution": resolution, "seed": seed}
    if dataset is not None:
        if data is None:
            raise InputError(NO_DATA)
        extra = None if train is None else shlex.split(train)
        return _benchmark(read_customconcept101(data), extra, models, Path(output), source, **settings)
    if photos is None:
        raise InputError(NO_PHOTOS)
    given = [] if weights is None else list(weights) if isinstance(weights, (list, tuple)) else [weights]
    return evaluate_subjects(
        models, given, Path(output), photos=photos, prompts=prompts, concept=concept, with_base=with_base,
        class_images=class_images, source=source, **settings,
    )  # fmt: skip


def _benchmark(concepts, train_flags, models, output, source, **settings):
    """Train what is asked for, score every concept that is trained, print the comparison; returns the scores.

    Args:
        train_flags: more flags for training; None to print the commands of what is not trained yet, and train nothing.
    Raises:
        InputError: a training failed.
    """
    from custom_diffusion.evaluation.run import evaluate_subjects

    if train_flags is not None:
        models.encoders()  # what is wrong with them is told before hours of training
    model, *versions = source
    names = ("revision", "variant", "config_from")
    flags = [f"--{name}={value}" for name, value in zip(names, versions) if value is not None]
    flags += [f"--resolution={settings['resolution'] or 512}", *(train_flags or [])]
    for concept in concepts:
        if not is_trained(output, concept):
            command = training_command(concept, output, model or MODEL, flags)
            print(shlex.join(["python", *command]), flush=True)
            if train_flags is not None:
                train_concept(concept, command)
    rows = []
    trained = [concept for concept in concepts if is_trained(output, concept)]
    for concept in trained:
        weights, folder = weights_folder(output, concept), output / concept.name / "scores"
        rows += evaluate_subjects(
            models, [weights], folder, photos=concept.photos, prompts=concept.prompts, concept=None, with_base=False,
            class_images=None, source=source, **settings,
        )  # fmt: skip
        print(f"{concept.name}: {folder / PAGE}", flush=True)
    if rows:
        write_results(output, {"dataset": "customconcept101", **settings}, rows)
        print("\n" + comparison(rows, len(concepts)))
    return rows
