"""Count the memory of a training step for a model and flags, without running it.

  custom-diffusion memory --model sd1 --train_batch_size 2 --with_prior_preservation --mixed_precision bf16
  custom-diffusion memory --model path/to/my/model --mixed_precision bf16 --gradient_checkpointing

Only the model's configuration is read, and every tensor is counted by its shape: no weights, no GPU. The flags are those of training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from custom_diffusion.cli.base_model import cannot_be_hub_id, needless_config_problems, single_file_problems
from custom_diffusion.files import MODEL_INDEX
from custom_diffusion.single_file import is_single_file

if TYPE_CHECKING:
    from custom_diffusion.training.step_memory import StepMemory

CARDS = (8, 12, 16, 24)  # GB
# What CUDA and its libraries take for themselves, about: their code, and work space for convolutions and matrix products.
CUDA_BYTES = 0.7e9
PUBLISHED = Path(__file__).resolve().parent.parent / "model/published"


def published() -> list[str]:
    """Names of models whose configuration needs no network."""
    return sorted(folder.name for folder in PUBLISHED.iterdir() if folder.is_dir())


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help=f"folder, single file or Hub id, or the size of a published one: {', '.join(published())}",
    )
    parser.add_argument("--revision", help="branch, tag or commit of --model on the Hub")
    parser.add_argument(
        "--config_from",
        help="for a --model that is a single file: diffusers folder or Hub id with its configuration (default: its family's)",
    )
    parser.add_argument("--resolution", type=int, help="side of the images in pixels (default: the model's own)")
    parser.add_argument("--train_batch_size", type=int, default=4, help="photos of a batch (default: %(default)s)")
    parser.add_argument("--with_prior_preservation", action="store_true", help="as many class images on top")
    parser.add_argument("--freeze_model", default="crossattn_kv", choices=["crossattn_kv", "crossattn"])
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--use_8bit_adam", action="store_true")


def flag_problems(args: argparse.Namespace) -> list[str]:
    problems = [
        f"--{name}: {value} must be 1 or more"
        for name in ("resolution", "train_batch_size")
        if (value := getattr(args, name)) is not None and value < 1
    ]
    if is_single_file(args.model):
        return problems + single_file_problems("--model", args.model, args)
    problems += needless_config_problems("--model", args.model, args)
    folder = Path(args.model)
    if folder.is_dir() and not (folder / MODEL_INDEX).is_file():
        problems.append(f"--model: '{args.model}' has no {MODEL_INDEX}; give a model in the diffusers layout")
    elif not folder.is_dir() and cannot_be_hub_id(args.model):
        problems.append(
            f"--model: folder '{args.model}' does not exist; give a folder, a Hub id or {', '.join(published())}"
        )
    return problems


def main(args: argparse.Namespace) -> None:
    """Count, and print what takes how much and on which cards it fits."""
    flags = {name: value for name, value in vars(args).items() if name != "tool"}
    print(report(memory(flags.pop("model"), **flags)))


def memory(
    model: str | Path,
    *,
    revision: str | None = None,
    config_from: str | None = None,
    resolution: int | None = None,
    train_batch_size: int = 4,
    with_prior_preservation: bool = False,
    freeze_model: str = "crossattn_kv",
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    use_8bit_adam: bool = False,
) -> StepMemory:
    """The memory of a training step, in bytes, on tensors that have shapes and no values.

    Args:
        model: folder, single file, Hub id, or one of `published()`. config_from: what describes a single file. The others: as the flags of training.
    Raises:
        InputError: the model's configuration cannot be read, or the resolution does not fit it.
    """
    from custom_diffusion.model.source import ModelSource
    from custom_diffusion.training.step_memory import StepSettings, count_step

    if not Path(model).is_dir() and str(model) in published():
        model = PUBLISHED / str(model)
    settings = StepSettings(
        num_photos=train_batch_size,
        num_images=train_batch_size * (2 if with_prior_preservation else 1),
        resolution=resolution,
        freeze_model=freeze_model,
        precision=mixed_precision,
        checkpointing=gradient_checkpointing,
        use_8bit_adam=use_8bit_adam,
    )
    return count_step(ModelSource(str(model), revision, config_from=config_from), settings)


def report(step: StepMemory) -> str:
    """A line for each thing that takes memory, then the cards that have as much."""
    lines = [
        ("UNet", step.unet),
        ("text encoders", step.text),
        ("VAE's encoder", step.vae),
        ("AdamW's state", step.optimizer),
        ("gradients", step.gradients),
        ("kept for the backward pass", step.kept),
        ("while it runs, besides", step.passes - step.kept),
    ]
    if step.encoding > step.passes + step.gradients:
        lines[4:] = [("encoding images, more than training on them", step.encoding)]
    lines += [("sum", step.total), ("CUDA itself, about", CUDA_BYTES)]
    rows = [f"{what:<44}{size / 1e9:6.2f} GB" for what, size in lines]
    fitting = [card for card in CARDS if step.total + CUDA_BYTES <= card * 1e9]
    cards = f"cards of {fitting[0]} GB and more" if fitting else f"no card of {', '.join(map(str, CARDS))} GB"
    return "\n".join([*rows, f"fits {cards}, by this count"])
