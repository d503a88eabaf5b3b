"""What a run depends on: kept with its weights and checkpoints, and compared when it is resumed."""

import argparse
import math
from importlib.metadata import version

from custom_diffusion.cli.concepts import Concept
from custom_diffusion.model.source import wherever_called_from

# Flags that change the course of a run. Not here: where it writes, how it reports, how many processes compute it.
_COURSE = [
    "pretrained_model_name_or_path",
    "config_from",
    "revision",
    "variant",
    "tokenizer_name",
    "pretrained_vae_model_name_or_path",
    "prediction_type",
    "freeze_model",
    "initializer_token",
    "with_prior_preservation",
    "real_prior",
    "prior_loss_weight",
    "num_class_images",
    "center_crop",
    "hflip",
    "noaug",
    "seed",
    "learning_rate",
    "scale_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "use_8bit_adam",
    "max_grad_norm",
    "cache_latents",
]
# Recorded, but only their product with the number of processes matters.
_SHARES_OF_A_STEP = ("train_batch_size", "gradient_accumulation_steps")
# Settings that may name a folder of the user's computer, or else a Hub id.
PLACES = ("pretrained_model_name_or_path", "config_from", "tokenizer_name", "pretrained_vae_model_name_or_path")
# A checkpoint made under another value of these has other tensors, or tensors that mean something else.
_MUST_AGREE = ("freeze_model", "modifier_tokens", "model_configuration", "use_8bit_adam", "prediction_type")


def run_settings(
    args: argparse.Namespace,
    concepts: list[Concept],
    modifier_tokens: list[str],
    mixed_precision: str,
    samples_per_step: int,
    model_configuration: str,
    resolution: int,
    base_file: dict | None = None,
) -> dict:
    """Everything that the course of the run depends on, as plain JSON values.

    Args:
        mixed_precision: in effect, whether the flag or `accelerate config` says so.
        samples_per_step: of all processes together.
        model_configuration: `ModelShape.configuration`, which stays the same wherever the model lies.
        resolution: in effect, whether the flag says so or the model's family.
        base_file: `ModelShape.base_file`.
    """
    settings = {name: getattr(args, name) for name in (*_COURSE, *_SHARES_OF_A_STEP)}
    settings |= {
        "mixed_precision": mixed_precision,
        "samples_per_step": samples_per_step,
        "model_configuration": model_configuration,
        "modifier_tokens": modifier_tokens,
        "resolution": resolution,
        "base_file": base_file,
    }
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["max_train_steps"] = args.max_train_steps
        settings["num_train_epochs"] = args.num_train_epochs
    if args.cache_latents:
        settings["augmentations_per_image"] = args.augmentations_per_image
    settings["concepts"] = [
        {
            "instance_prompt": concept.instance_prompt,
            "photos": [path.name for path in concept.photos()],
            "class_prompt": concept.class_prompt if args.with_prior_preservation else None,
        }
        for concept in concepts
    ]
    return settings


def check_resumable(before: dict, now: dict, warn) -> None:
    """Compare a checkpoint's settings with those of the run that resumes it; `warn(line)` is called for each difference.

    Older checkpoints do not record `samples_per_step` and `model_configuration`; the flags behind them are compared then.

    Raises:
        ValueError: the checkpoint's weights do not fit.
    """
    must_agree = set(_MUST_AGREE)
    if "model_configuration" not in before:
        must_agree.add("pretrained_model_name_or_path")
    names = before.keys() | now.keys()
    names -= set(_SHARES_OF_A_STEP) if "samples_per_step" in before else {"samples_per_step"}
    names -= set() if "model_configuration" in before else {"model_configuration"}
    for name in sorted(name for name in names if before.get(name) != now.get(name)):
        line = f"{name} was {before.get(name)!r} in the checkpoint and is {now.get(name)!r} now"
        if name == "model_configuration":
            line = (
                f"its model, '{before['pretrained_model_name_or_path']}', has other configuration files than this one"
            )
        if name == "base_file":
            if before.get(name) is None or now[name] is None or _same_file(before[name], now[name]):
                continue  # a folder's copy in one file, whose configuration is compared; or another name
            line = f"its model was another file ({_told(before[name])}) than this one ({_told(now[name])})"
            raise ValueError(f"the checkpoint does not fit: {line}; use the same file, or another --output_dir")
        if name in must_agree:
            raise ValueError(f"the checkpoint does not fit: {line}; use the same flags, or another --output_dir")
        if name == "pretrained_model_name_or_path":
            warn(f"the base model moved, with the same configuration files: {line}")
        elif name == "samples_per_step":
            warn(f"resuming a different run: {line}; {_flags_that_keep(before[name], now)}")
        else:
            warn(f"resuming a different run: {line}")


def _same_file(one, other):
    return one | {"name": None} == other | {"name": None}


def _told(file):
    return f"'{file['name']}', {file['size']:,} bytes, header {file['header_sha256'][:12]}"


def _flags_that_keep(samples_per_step, now):
    """How to see as many samples a step as before, with the processes of now."""
    batch_size = now["train_batch_size"]
    num_processes = now["samples_per_step"] // (batch_size * now["gradient_accumulation_steps"])
    share, rest = divmod(samples_per_step, num_processes)
    if rest:
        return f"to keep it, use a number of processes that divides {samples_per_step}"
    batch_size = math.gcd(batch_size, share)
    return f"to keep it, use --train_batch_size {batch_size} --gradient_accumulation_steps {share // batch_size}"


def weights_config(
    settings: dict, step: int, validation_prompt: str | None, family: str, *, inpainting: bool = False
) -> dict:
    """The settings file of a trained folder, which the tools read. It names no photo: it is made to be handed on.

    Args:
        family: `Family.name`.
        inpainting: the base model is one.
    """
    concepts = [
        {name: value for name, value in concept.items() if name != "photos"} | {"num_photos": len(concept["photos"])}
        for concept in settings["concepts"]
    ]
    return {
        "base_model": wherever_called_from(settings["pretrained_model_name_or_path"]),
        "revision": settings["revision"],
        "variant": settings["variant"],
        "config_from": wherever_called_from(settings["config_from"]),
        "base_file": settings["base_file"],
        "family": family,
        "inpainting": inpainting,
        "freeze_model": settings["freeze_model"],
        "modifier_tokens": settings["modifier_tokens"],
        "concepts": concepts,
        "steps": step,
        "validation_prompt": validation_prompt,
        "settings": settings | {"concepts": concepts} | {name: wherever_called_from(settings[name]) for name in PLACES},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }
