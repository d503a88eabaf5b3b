"""The flags of `train_custom_diffusion.py`.

Imports nothing heavy: `--help` and a wrong flag answer within a second, and nothing is written before all checks pass.
"""

import argparse

from custom_diffusion.cli.concepts import Concept, concept_problems, concepts_from_args
from custom_diffusion.cli.report import exit_with_problems
from custom_diffusion.cli.training_checks import TRACKERS, flag_problems

LR_SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


def modifier_pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The (modifier token, initializer token) pairs of `--modifier_token` and `--initializer_token`."""
    if not args.modifier_token:
        return []
    return list(zip(args.modifier_token.split("+"), args.initializer_token.split("+")))


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Concept]]:
    """Parse and check the command line.

    Returns:
        The flags, and the concepts they describe with their images found and decodable.
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
        help="Folder, Hub id or .safetensors file of a Stable Diffusion 1.x, 2.x or XL model.",
    )
    add(
        "--config_from",
        help="Folder or Hub id whose configuration and tokenizers belong to a single file (default: its family's own).",
    )
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help="Variant of the model's weight files, for example fp16.")
    add("--tokenizer_name", help="Tokenizer folder or Hub id, if not the model's own (for XL: its first).")
    add("--pretrained_vae_model_name_or_path", help="VAE folder, .safetensors file or Hub id, if not the model's own.")
    add(
        "--prediction_type",
        choices=["epsilon", "v_prediction"],
        help="What the model predicts, if not what its scheduler's configuration says.",
    )
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

    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--resolution", type=int, help="Side of the training images in pixels (default: 512; for XL: 1024).")
    add("--center_crop", action="store_true", help="Crop images to a square at the centre instead of at random.")
    add("--hflip", action="store_true", help="Flip images at random.")
    add("--noaug", action="store_true", help="Do not vary the size of the photos (faces).")
    add(
        "--dataloader_num_workers",
        type=int,
        default=2,
        help="Processes that load images; any number gives the same run.",
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
    add("--num_train_epochs", type=int, default=1, help="Passes over the images, unless --max_train_steps is given.")
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
    add(
        "--keep_best",
        action="store_true",
        help="Write a checkpoint whenever the losses on the fixed set are the best so far, and never remove the best one.",
    )
    add("--resume_from_checkpoint", help="Name of a checkpoint in the output folder, or 'latest'.")
    add("--no_safe_serialization", action="store_true", help="Write .bin files only, no .safetensors.")
    add("--validation_prompt", help="Draw this prompt during training.")
    add("--num_validation_images", type=int, default=2, help="Images drawn each time.")
    add("--validation_steps", type=int, default=50, help="Steps between drawings.")
    add("--logging_dir", default="logs", help="Folder for TensorBoard's files, inside the output folder.")
    add("--report_to", default="tensorboard", choices=[*TRACKERS, "all", "none"], help="Tracker for losses and images.")
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
