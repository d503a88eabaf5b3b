"""The flags of `train_custom_diffusion.py` and every check that needs no model.

Imports nothing heavy: `--help` and a wrong flag answer within a second, and nothing is written before all checks pass.
"""

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path

from custom_diffusion.checkpoint_names import find_checkpoint, list_checkpoints
from custom_diffusion.concepts import Concept, concept_problems, concepts_from_args, folder_problems
from custom_diffusion.versions import version_problems

LR_SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
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
LARGEST_SEED = 2**32 - 1  # NumPy's
LONGEST_TOKEN = 200  # bytes; with a suffix it must be a file name, of which file systems allow 255


class InputError(Exception):
    """Something the user gave cannot work. `problems` are lines that name the flag or file and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


def exit_with_problems(program: str, problems) -> None:
    """Print one line per problem (from the first process of each machine only) and exit with status 2."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for problem in problems:
            print(f"{program}: error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def modifier_pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The (modifier token, initializer token) pairs of `--modifier_token` and `--initializer_token`."""
    if not args.modifier_token:
        return []
    return list(zip(args.modifier_token.split("+"), args.initializer_token.split("+")))


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Concept]]:
    """Parse and check the command line.

    Returns:
        The flags, and the concepts they describe with their pictures found and decodable.
    Raises:
        SystemExit: status 2, after one line for every problem found.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    concepts, problems = concepts_from_args(args)
    problems = flag_problems(args) + problems
    for concept in concepts:
        problems += concept_problems(concept, args)
    if problems:
        exit_with_problems(parser.prog, dict.fromkeys(problems))
    return args, concepts


def flag_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags themselves, one line each; empty when nothing is."""
    problems = version_problems()
    problems += _number_problems(args)
    problems += _token_problems(args)
    problems += _model_problems(args)
    problems += _library_problems(args)
    problems += _hub_problems(args)
    problems += _output_problems(args)
    if args.real_prior and not args.with_prior_preservation:
        problems.append("--real_prior: needs --with_prior_preservation; add it, or leave --real_prior out")
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
        return [f"{flag}: is empty; give a folder with model_index.json or a Hub id"]
    if path.is_file():
        return [
            f"{flag}: '{name}' is a file; give a folder in the diffusers layout, with model_index.json, or a Hub id"
        ]
    if path.is_dir() and not (path / "model_index.json").is_file():
        return [f"{flag}: '{name}' is not a diffusers model, it has no model_index.json; give its folder or a Hub id"]
    if not path.exists() and name.startswith(("/", ".", "~")):
        return [f"{flag}: folder '{name}' does not exist; give a folder with model_index.json or a Hub id"]
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
    if args.enable_xformers_memory_efficient_attention:
        needs("--enable_xformers_memory_efficient_attention", "xformers")
    if args.use_8bit_adam:
        needs("--use_8bit_adam", "bitsandbytes")
    return problems


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
    if name is not None and name != "latest" and find_checkpoint(output_dir, name) is None:
        there = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
        problems.append(
            f"--resume_from_checkpoint: no checkpoint {name!r} in '{output_dir}' (there: {there}); "
            "name one of these, or 'latest'"
        )
    return problems


def build_parser() -> argparse.ArgumentParser:
    """The flags of the reference script, with its names and defaults, and our few of our own at the end."""
    parser = argparse.ArgumentParser(
        prog="train_custom_diffusion.py",
        description="Teach a Stable Diffusion model a new concept from a few photos (Custom Diffusion).",
    )

    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="Folder or Hub id of a Stable Diffusion 1.x or 2.x model.",
    )
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help="Variant of the model's weight files, for example fp16.")
    add("--tokenizer_name", help="Tokenizer folder or Hub id, if not the model's own.")
    add(
        "--freeze_model",
        default="crossattn_kv",
        choices=["crossattn_kv", "crossattn"],
        help="Train the cross-attention keys and values, or all of the cross-attention.",
    )
    add("--modifier_token", help="New words to teach, joined by '+', for example '<new1>+<new2>'.")
    add("--initializer_token", default="ktn+pll+ucd", help="Words whose embeddings the new ones start from.")

    group = parser.add_argument_group("concepts")
    add = group.add_argument
    add("--instance_data_dir", help="Folder with the photos of the concept.")
    add("--instance_prompt", help="What the photos show, with the new word: 'photo of a <new1> cat'.")
    add("--class_data_dir", help="Folder of the class images.")
    add("--class_prompt", help="The class of the concept: 'cat'.")
    add("--concepts_list", help="JSON list of concepts; replaces the four flags above.")
    add(
        "--with_prior_preservation",
        action="store_true",
        help="Train on class images too, so that the class is not forgotten.",
    )
    add(
        "--real_prior",
        action="store_true",
        help="The class images are those that retrieve.py fetched, with their captions.",
    )
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the class images' loss.")
    add(
        "--num_class_images",
        type=int,
        default=200,
        help="Class images per concept; missing ones are generated without --real_prior.",
    )
    add("--sample_batch_size", type=int, default=4, help="Class images generated at a time, per process.")
    add(
        "--prior_generation_precision",
        choices=["no", "fp32", "fp16", "bf16"],
        help="Precision for generating class images (default: fp16 on a GPU, else fp32).",
    )

    group = parser.add_argument_group("pictures")
    add = group.add_argument
    add("--resolution", type=int, default=512, help="Side of the training pictures in pixels.")
    add("--center_crop", action="store_true", help="Crop pictures to a square at the centre instead of at random.")
    add("--hflip", action="store_true", help="Flip pictures at random.")
    add("--noaug", action="store_true", help="Do not vary the size of the photos (faces).")
    add(
        "--dataloader_num_workers",
        type=int,
        default=2,
        help="Processes that load pictures; any number gives the same run.",
    )

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--output_dir", default="custom-diffusion-model", help="Folder for the weights, checkpoints, samples and logs.")
    add("--seed", type=int, default=42, help="Seed of everything random.")
    add(
        "--train_batch_size",
        type=int,
        default=4,
        help="Photos (and as many class images) per process and forward pass.",
    )
    add("--gradient_accumulation_steps", type=int, default=1, help="Forward passes per optimizer step.")
    add("--num_train_epochs", type=int, default=1, help="Passes over the pictures, unless --max_train_steps is given.")
    add("--max_train_steps", type=int, help="Optimizer steps; replaces --num_train_epochs.")
    add("--learning_rate", type=float, default=1e-5, help="Peak learning rate, before --scale_lr.")
    add(
        "--scale_lr",
        action="store_true",
        help="Multiply the rate by accumulation x batch x processes, and by 2 with prior preservation.",
    )
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="Course of the learning rate.")
    add("--lr_warmup_steps", type=int, default=500, help="Steps of warm-up, for the schedules that have one.")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's beta1.")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's beta2.")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay.")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon.")
    add("--use_8bit_adam", action="store_true", help="8-bit AdamW of bitsandbytes.")
    add("--max_grad_norm", type=float, default=1.0, help="Clip the gradient norm to this.")
    add("--set_grads_to_none", action="store_true", help="Accepted; gradients are always freed between steps.")

    group = parser.add_argument_group("checkpoints and output")
    add = group.add_argument
    add("--checkpointing_steps", type=int, default=250, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Checkpoints to keep; older ones are removed.")
    add("--resume_from_checkpoint", help="Name of a checkpoint in the output folder, or 'latest'.")
    add("--no_safe_serialization", action="store_true", help="Write .bin files only, no .safetensors.")
    add("--validation_prompt", help="Draw this prompt during training.")
    add("--num_validation_images", type=int, default=2, help="Pictures drawn each time.")
    add("--validation_steps", type=int, default=50, help="Steps between drawings.")
    add("--logging_dir", default="logs", help="Folder for tracker files, inside the output folder.")
    add("--report_to", default="tensorboard", choices=[*TRACKERS, "all"], help="Tracker for losses and pictures.")
    add("--push_to_hub", action="store_true", help="Upload weights, samples and a model card at the end.")
    add("--hub_token", help="Hub token, if not logged in.")
    add("--hub_model_id", help="Hub repository (default: the output folder's name).")

    group = parser.add_argument_group("hardware")
    add = group.add_argument
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Precision of the frozen weights and the arithmetic (default: what `accelerate config` says).",
    )
    add("--gradient_checkpointing", action="store_true", help="Less memory for more time.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs.")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="Attention of xformers.")
    add("--local_rank", type=int, default=-1, help="Accepted for older launchers; the launcher's environment decides.")

    group = parser.add_argument_group("speed")
    add = group.add_argument
    add(
        "--cache_latents",
        action="store_true",
        help="Encode each class image once and each photo from a fixed pool of augmentations: faster, less variety.",
    )
    add("--augmentations_per_image", type=int, default=32, help="Size of that pool, per photo.")
    add(
        "--cuda_graphs",
        action="store_true",
        help="Record the UNet's forward and backward pass once, and replay them: nothing waits for kernels to be launched.",
    )
    return parser
