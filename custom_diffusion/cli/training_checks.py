"""What can be wrong with the flags of `train_custom_diffusion.py`, as far as it shows without a model. Imports nothing heavy."""

import argparse
import importlib.util
import math
import os
from pathlib import Path

from custom_diffusion.cli.base_model import (
    cannot_be_hub_id,
    needless_config_problems,
    single_file_problems,
    what_folder_is,
)
from custom_diffusion.cli.concepts import folder_problems
from custom_diffusion.cli.versions import version_problems
from custom_diffusion.errors import first_line
from custom_diffusion.families import SUPPORTED
from custom_diffusion.files import MODEL_INDEX, find_checkpoint, is_recoverable, list_checkpoints
from custom_diffusion.single_file import is_single_file, vae_in

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml"}  # name -> module to install
POSITIVE = [
    "num_class_images",
    "resolution",
    "train_batch_size",
    "sample_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "gradient_accumulation_steps",
    "validation_steps",
    "learning_rate",
    "adam_epsilon",
    "max_grad_norm",
    "augmentations_per_image",
]
NOT_NEGATIVE = [
    "seed",
    "num_validation_images",
    "prior_loss_weight",
    "dataloader_num_workers",
    "lr_warmup_steps",
    "adam_weight_decay",
]
SHARES = ("adam_beta1", "adam_beta2")  # in [0, 1)
MAY_BE_INFINITE = ("max_grad_norm",)  # no clipping
# Ways of training that `accelerate config` offers and this script does not have, by the variable that asks for them.
NOT_OFFERED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
LARGEST_SEED = 2**32 - 1  # NumPy's
LONGEST_TOKEN = 200  # bytes; with a suffix it must be a file name, of which file systems allow 255


def flag_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags themselves, one line each; empty when nothing is."""
    problems = version_problems() + _launch_problems(args)
    problems += _number_problems(args)
    problems += _token_problems(args)
    problems += _model_problems(args) + _vae_problems(args)
    problems += _library_problems(args)
    problems += _hub_problems(args)
    problems += _output_problems(args)
    if args.real_prior and not args.with_prior_preservation:
        problems.append("--real_prior: needs --with_prior_preservation; add it, or leave --real_prior out")
    return problems


def _launch_problems(args):
    """What `accelerate launch` was configured to do and cannot be done."""
    problems = [
        f"accelerate config: {name} splits models that are too large for one GPU, which this script neither needs nor "
        "supports; answer no to it, or start the script with `accelerate launch --multi_gpu`, on a single GPU with `python`"
        for variable, name in NOT_OFFERED.items()
        if os.environ.get(variable, "false").lower() == "true"
    ]
    if args.mixed_precision is None and os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() == "fp8":
        problems.append(
            "accelerate config: fp8 is no precision of this script; give --mixed_precision bf16, fp16 or no"
        )
    return problems


def _number_problems(args):
    problems = []
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value) and name not in MAY_BE_INFINITE:
            problems.append(f"--{name}: {value} must be a finite number")
        elif name in POSITIVE and value is not None and not value > 0:
            problems.append(f"--{name}: {value} must be greater than 0")
        elif name in NOT_NEGATIVE and not value >= 0:
            problems.append(f"--{name}: {value} must be 0 or more")
        elif name in SHARES and not 0 <= value < 1:
            problems.append(f"--{name}: {value} must be at least 0 and less than 1")
    if args.seed > LARGEST_SEED:
        problems.append(f"--seed: {args.seed} must be at most {LARGEST_SEED}")
    return problems


def _token_problems(args):
    if args.modifier_token is None:
        return []
    problems = []
    tokens = args.modifier_token.split("+")
    for token in tokens:
        if not token or any(c.isspace() or not c.isprintable() for c in token):
            problems.append(f"--modifier_token: {token!r} is empty or has white space; write for example '<new1>'")
        elif any(c in token for c in "/\\") or token.startswith(".") or len(token.encode()) > LONGEST_TOKEN:
            problems.append(f"--modifier_token: {token!r} cannot be a file name; write for example '<new1>'")
    for token in sorted({t for t in tokens if tokens.count(t) > 1}):
        problems.append(f"--modifier_token: {token!r} is given more than once; each concept needs a token of its own")
    for token in tokens:
        # The tokenizer takes the longest token that fits, and the shorter one would never be learned.
        if longer := [t for t in tokens if token and token in t and t != token]:
            problems.append(f"--modifier_token: {token!r} is part of {longer[0]!r}; write for example '<new1>+<new2>'")
    initializers = args.initializer_token.split("+")
    if len(initializers) < len(tokens):
        problems.append(
            f"--initializer_token: {len(initializers)} for {len(tokens)} modifier tokens; give one for each, joined by '+'"
        )
    if not all(initializers):
        problems.append(
            f"--initializer_token: {args.initializer_token!r} has an empty part; write for example 'ktn+pll'"
        )
    return problems


def _model_problems(args):
    """What can be seen of the model at once, without asking the Hub."""
    flag, name = "--pretrained_model_name_or_path", args.pretrained_model_name_or_path
    path = Path(name).expanduser()
    if not name.strip():
        return [f"{flag}: is empty; give a folder with {MODEL_INDEX} or a Hub id"]
    if is_single_file(name):
        return single_file_problems(flag, name, args)
    problems = needless_config_problems(flag, name, args)
    if path.is_dir() and not (path / MODEL_INDEX).is_file():
        what = what_folder_is(path)
        reason = f"not a diffusers model, it has no {MODEL_INDEX}; give its folder or a Hub id"
        problems.append(f"{flag}: '{name}' is {reason if what is None else f'{what}; {SUPPORTED}'}")
    elif not path.exists() and cannot_be_hub_id(name):
        problems.append(f"{flag}: folder '{name}' does not exist; give a folder with {MODEL_INDEX} or a Hub id")
    return problems


def _vae_problems(args):
    flag, name = "--pretrained_vae_model_name_or_path", args.pretrained_vae_model_name_or_path
    if name is None:
        return []
    if is_single_file(name):
        try:
            vae_in(name)
        except ValueError as error:
            return [f"{flag}: '{name}' {error}"]
        return []
    path = Path(name).expanduser()
    if not name.strip() or (not path.exists() and cannot_be_hub_id(name)):
        return [
            f"{flag}: '{name}' is no folder; give a VAE's folder, with its config.json, its .safetensors file, or a Hub id"
        ]
    if path.is_dir() and not (path / "config.json").is_file():
        return [
            f"{flag}: '{name}' has no config.json; give the VAE's own folder, for example '{name}/vae', or a Hub id"
        ]
    return []


def _library_problems(args):
    problems = []

    def needs(flag, module):
        if importlib.util.find_spec(module) is None:
            problems.append(
                f"{flag}: the package {module!r} is not installed; run `pip install {module}`, or leave it out"
            )

    if args.report_to in TRACKERS:
        needs(f"--report_to {args.report_to}", TRACKERS[args.report_to])
    if args.report_to in ("wandb", "all") and importlib.util.find_spec("wandb") is not None:
        problems += _wandb_problems(f"--report_to {args.report_to}")
    if args.enable_xformers_memory_efficient_attention:
        needs("--enable_xformers_memory_efficient_attention", "xformers")
    if args.use_8bit_adam:
        needs("--use_8bit_adam", "bitsandbytes")
    return problems


def _wandb_problems(flag):
    """A line if wandb would ask for a login, which it does only when everything is loaded."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return []
    try:
        logged_in = wandb.login(prompt=False)
    except TypeError:  # before wandb 0.24 or so, this asked for nothing either
        logged_in = wandb.api.api_key
    except Exception as error:  # wandb has many types of its own
        return [f"{flag}: {first_line(error)}; run `wandb login`, or set WANDB_MODE=offline"]
    return [] if logged_in else [f"{flag}: not logged in; run `wandb login`, or set WANDB_MODE=offline"]


def _hub_problems(args):
    problems = []
    if args.hub_token is not None and args.report_to in ("wandb", "all"):
        problems.append(
            "--hub_token: with --report_to wandb the token would be stored in the run's public configuration; "
            "leave the flag out and run `hf auth login` instead"
        )
    if args.push_to_hub:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        if not (args.hub_token or get_token()):
            problems.append("--push_to_hub: not logged in to the Hub; run `hf auth login` first, or give --hub_token")
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            problems.append(f"--hub_model_id: {repo_id!r} cannot be a repository; write 'name' or 'user/name'")
    return problems


def _output_problems(args):
    if not args.output_dir.strip():
        return ["--output_dir: is empty; name a folder"]
    output_dir = Path(args.output_dir)
    problems = folder_problems("--output_dir", output_dir)
    if not problems:
        problems = folder_problems("--logging_dir", output_dir / args.logging_dir)
    name = args.resume_from_checkpoint
    if name in (None, "latest") or is_recoverable(output_dir / name):
        return problems
    if find_checkpoint(output_dir, name) is None:
        there = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
        problems.append(
            f"--resume_from_checkpoint: no checkpoint {name!r} in '{output_dir}' (there: {there}); "
            "name one of these, or 'latest'"
        )
    return problems
