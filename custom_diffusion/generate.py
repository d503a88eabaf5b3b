"""Draw pictures with a trained concept."""

# ruff: noqa: E402 (flags are parsed before the imports that take seconds)

import argparse
import re
from pathlib import Path

from custom_diffusion.args import InputError
from custom_diffusion.command import (
    PICTURE_SUFFIXES,
    add_model_flags,
    make_parser,
    model_problems,
    parse,
    run,
    weights_problems,
    writable_problems,
)

EXAMPLE = """

  python -m custom_diffusion.generate --weights logs/cat --prompt "<new1> cat sitting in a bucket" --output cat.png
  python -m custom_diffusion.generate --weights user/cat --prompt "<new1> cat" --num_images 4 --output pictures/
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("generate", __doc__ + EXAMPLE)
    add = parser.add_argument
    add_model_flags(parser)
    add("--weights", help="trained folder, checkpoint folder or Hub id (default: draw with the base model alone)")
    add("--prompt", required=True, action="append", help="what to draw; repeat the flag for several prompts")
    add("--negative_prompt", help="what not to draw")
    add("--output", required=True, help="picture file for one picture, else a folder")
    add("--num_images", type=int, default=1, help="pictures per prompt (default: %(default)s)")
    add("--num_inference_steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    add("--guidance_scale", type=float, default=6.0, help="how strongly to follow the prompt (default: %(default)s)")
    add("--height", type=int, help="in pixels (default: the model's)")
    add("--width", type=int, help="in pixels (default: the model's)")
    add("--seed", type=int, default=42, help="the i-th picture of a prompt has seed + i (default: %(default)s)")
    add("--precision", choices=["fp32", "fp16", "bf16"], help="default: fp16 on a GPU, else fp32")
    return parse(parser, argv, _problems)


def _problems(args):
    problems = model_problems(args)
    if args.weights is not None:
        problems += weights_problems("--weights", args.weights)
    elif args.model is None:
        problems.append("--weights: give trained weights, or a --model to draw with")
    for name in ("num_images", "num_inference_steps"):
        if getattr(args, name) < 1:
            problems.append(f"--{name}: {getattr(args, name)} must be 1 or more")
    for name in ("height", "width"):
        size = getattr(args, name)
        if size is not None and (size < 8 or size % 8):
            problems.append(f"--{name}: {size} is not a multiple of 8; try {max(round(size / 8), 1) * 8}")
    if args.seed < 0:
        problems.append(f"--seed: {args.seed} must be 0 or more")
    problems += [f"--prompt: {prompt!r} is empty; say what to draw" for prompt in args.prompt if not prompt.strip()]
    output, count = Path(args.output), args.num_images * len(args.prompt)
    if output.suffix.lower() in PICTURE_SUFFIXES:
        if count > 1:
            problems.append(f"--output: '{output}' is one file for {count} pictures; name a folder")
        elif output.is_dir():
            problems.append(f"--output: '{output}' is a folder; name a file or another folder")
    elif output.is_file():
        problems.append(f"--output: '{output}' is a file; name a folder, or a file that ends in .png")
    return problems + writable_problems(args.output)


if __name__ == "__main__":
    args = parse_args()

import torch

from custom_diffusion.base_model import base_of, load_pipeline, read_concept
from custom_diffusion.files import whole_file
from custom_diffusion.weights import load_custom_diffusion

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(args: argparse.Namespace) -> None:
    """Draw every picture and write each when it is done."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    config = {}
    if args.weights is not None:
        weights = read_concept("--weights", args.weights)
        check_prompts(args.prompt, list(weights.tokens))
        config = weights.config
    precision = args.precision or ("fp16" if device.type == "cuda" else "fp32")
    pipe = load_pipeline(base_of(args, config), DTYPES[precision])
    if args.weights is not None:
        try:
            load_custom_diffusion(pipe, args.weights)
        except ValueError as error:
            raise InputError(f"--weights: {error}") from None
    pipe.to(device)
    paths = picture_paths(Path(args.output), len(args.prompt), args.num_images)
    for number, prompt in enumerate(args.prompt):
        for index in range(args.num_images):
            path = paths[number * args.num_images + index]
            pipe.set_progress_bar_config(desc=path.name)
            image = pipe(
                prompt,
                negative_prompt=args.negative_prompt,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                height=args.height,
                width=args.width,
                # On the CPU: the same noise whatever the device.
                generator=torch.Generator().manual_seed(args.seed + index),
            ).images[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                image.save(temporary, format="PNG" if path.suffix.lower() == ".png" else path.suffix[1:])
            print(path)


def check_prompts(prompts: list[str], tokens: list[str]) -> None:
    """Raises InputError for a word like <new9> that the weights do not know: it would be drawn as noise."""
    for prompt in prompts:
        for word in re.findall(r"<[^<>\s]+>", prompt):
            if word not in tokens:
                known = ", ".join(tokens) or "no token"
                raise InputError(f"--prompt: {prompt!r} has {word}, but the weights bring {known}")


def picture_paths(output: Path, num_prompts: int, num_images: int) -> list[Path]:
    """Where each picture goes: prompt by prompt, `<prompt>-<index>.png`, or `<index>.png` with one prompt."""
    if output.suffix.lower() in PICTURE_SUFFIXES:
        return [output]
    if num_prompts == 1:
        return [output / f"{index}.png" for index in range(num_images)]
    return [output / f"{number}-{index}.png" for number in range(num_prompts) for index in range(num_images)]


if __name__ == "__main__":
    run("generate", main, args)
