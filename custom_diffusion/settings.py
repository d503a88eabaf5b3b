"""What a run depends on: kept with its weights and checkpoints, and compared when it is resumed."""

import argparse
from importlib.metadata import version

from custom_diffusion.args import modifier_pairs
from custom_diffusion.concepts import Concept

# Flags that change the course of a run. Not here: where it writes, how it reports, how many processes compute it.
_COURSE = [
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "tokenizer_name",
    "freeze_model",
    "initializer_token",
    "with_prior_preservation",
    "real_prior",
    "prior_loss_weight",
    "num_class_images",
    "resolution",
    "center_crop",
    "hflip",
    "noaug",
    "seed",
    "train_batch_size",
    "gradient_accumulation_steps",
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
# A checkpoint made under another value of these has other tensors, or tensors that mean something else.
_MUST_AGREE = ("freeze_model", "modifier_tokens", "pretrained_model_name_or_path", "use_8bit_adam")


def run_settings(args: argparse.Namespace, concepts: list[Concept], mixed_precision: str) -> dict:
    """Everything that the course of the run depends on, as plain JSON values.

    Args:
        mixed_precision: in effect, whether the flag or `accelerate config` says so.
    """
    settings = {name: getattr(args, name) for name in _COURSE} | {"mixed_precision": mixed_precision}
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["max_train_steps"] = args.max_train_steps
        settings["num_train_epochs"] = args.num_train_epochs
    if args.cache_latents:
        settings["augmentations_per_image"] = args.augmentations_per_image
    settings["modifier_tokens"] = [token for token, _ in modifier_pairs(args)]
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

    Raises:
        ValueError: the checkpoint's weights do not fit.
    """
    different = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    for name in different:
        line = f"{name} was {before.get(name)!r} in the checkpoint and is {now.get(name)!r} now"
        if name in _MUST_AGREE:
            raise ValueError(f"the checkpoint does not fit: {line}; use the same flags, or another --output_dir")
        warn(f"resuming a different run: {line}")


def weights_config(settings: dict, step: int) -> dict:
    """The settings file of a trained folder: what `custom_diffusion.weights` and the tools read."""
    return {
        "base_model": settings["pretrained_model_name_or_path"],
        "revision": settings["revision"],
        "variant": settings["variant"],
        "freeze_model": settings["freeze_model"],
        "modifier_tokens": settings["modifier_tokens"],
        "concepts": settings["concepts"],
        "steps": step,
        "settings": settings,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }
