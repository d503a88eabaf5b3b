"""Draw images with a trained concept.

custom-diffusion generate --weights cat --prompt "<new1> cat sitting in a bucket" --output cat.png
custom-diffusion generate --weights user/cat --prompt "<new1> cat" --num_images 4 --output images/
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from custom_diffusion.cli.tool_flags import (
    add_model_flags,
    check_prompts,
    drawing_problems,
    model_problems,
    weights_problems,
    writable_problems,
)
from custom_diffusion.errors import InputError, first_line
from custom_diffusion.files import whole_file
from custom_diffusion.images import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from custom_diffusion.weights.format import ConceptWeights

OUTPUT_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_flags(parser)
    add("--weights", help="trained folder, checkpoint folder or Hub id (default: draw with the base model alone)")
    add(
        "--scale",
        type=float,
        default=1.0,
        help="0 for the base model to 1 for the trained weights (default: %(default)s)",
    )
    add("--prompt", required=True, action="append", help="what to draw; repeat the flag for several prompts")
    add("--negative_prompt", help="what not to draw")
    add("--image", help="for inpainting models: the image file in which a hole is painted (default: all is painted)")
    add("--mask", help="image file that is white where --image is to be painted, black where it stays")
    add("--output", required=True, help="image file for one image, else a folder")
    add("--num_images", type=int, default=1, help="images per prompt (default: %(default)s)")
    add("--num_inference_steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    add("--guidance_scale", type=float, default=6.0, help="how strongly to follow the prompt (default: %(default)s)")
    add("--height", type=int, help="in pixels (default: the model's, or that of --image)")
    add("--width", type=int, help="in pixels (default: the model's, or that of --image)")
    add("--seed", type=int, default=42, help="the i-th image of a prompt has seed + i (default: %(default)s)")
    add("--precision", choices=["fp32", "fp16", "bf16"], help="default: fp16 on a GPU, else fp32")


def flag_problems(args: argparse.Namespace) -> list[str]:
    problems = model_problems(args)
    if args.weights is not None:
        problems += weights_problems("--weights", args.weights)
    elif args.model is None:
        problems.append("--weights: give trained weights, or a --model to draw with")
    problems += drawing_problems(args)
    for name in ("height", "width"):
        size = getattr(args, name)
        if size is not None and (size < 8 or size % 8):
            problems.append(f"--{name}: {size} is not a multiple of 8; try {max(round(size / 8), 1) * 8}")
    if (args.image is None) != (args.mask is None):
        problems.append("--image, --mask: one is of no use without the other; give both or neither")
    problems += [
        f"--{name}: '{getattr(args, name)}' is no file that is there; name an image"
        for name in ("image", "mask")
        if getattr(args, name) is not None and not Path(getattr(args, name)).is_file()
    ]
    problems += [f"--prompt: {prompt!r} is empty; say what to draw" for prompt in args.prompt if not prompt.strip()]
    return problems + _output_problems(Path(args.output), args.num_images * len(args.prompt))


def _output_problems(output, count):
    problems = []
    if output.suffix.lower() in IMAGE_SUFFIXES - OUTPUT_FORMATS.keys():
        problems.append(f"--output: cannot write {output.suffix}; name a file that ends in {', '.join(OUTPUT_FORMATS)}")
    elif output.suffix.lower() in OUTPUT_FORMATS:
        if count > 1:
            problems.append(f"--output: '{output}' is one file for {count} images; name a folder")
        elif output.is_dir():
            problems.append(f"--output: '{output}' is a folder; name a file or another folder")
    elif output.is_file():
        problems.append(f"--output: '{output}' is a file; name a folder, or a file that ends in .png")
    return problems + writable_problems(str(output))


def main(args: argparse.Namespace) -> None:
    """Draw every image; say where each is."""
    flags = {name: value for name, value in vars(args).items() if name != "tool"}
    generate(flags.pop("weights"), flags.pop("prompt"), **flags)


def generate(
    weights: ConceptWeights | str | Path | None,
    prompt: str | list[str],
    *,
    output: str | Path,
    scale: float = 1.0,
    negative_prompt: str | None = None,
    image: str | Path | None = None,
    mask: str | Path | None = None,
    num_images: int = 1,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    height: int | None = None,
    width: int | None = None,
    seed: int = 42,
    precision: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    config_from: str | None = None,
) -> list[Path]:
    """Draw images and write each when it is done.

    Args:
        weights: trained folder, checkpoint folder, Hub id, weights already read, or None for the base model alone.
        prompt: one or several. num_images: of each; the i-th has the noise of seed + i, on any device.
        image, mask: for inpainting models, files of an image and of where to paint in it (white); by default all is painted.
        output: an image file for one image, else a folder.
        scale: between 0, the base model's weights, and 1, the trained ones, as in `load_custom_diffusion`.
        height, width: pixels. precision: "fp32", "fp16", "bf16", by default fp16 on a GPU and else fp32.
        model, revision, variant: the base model, by default the one that the weights name.
        config_from: folder or Hub id that has the configuration and tokenizers of a base model in one file.
    Returns:
        The image files.
    Raises:
        InputError: the weights or the model cannot be used, or a prompt has a word like <new9> that the weights lack.
    """
    import torch

    from custom_diffusion.model.loading import load_pipeline
    from custom_diffusion.model.source import base_of, check_num_inference_steps
    from custom_diffusion.weights.format import as_weights
    from custom_diffusion.weights.pipeline import load_custom_diffusion

    prompts = [prompt] if isinstance(prompt, str) else prompt
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if weights is not None:
        weights = as_weights(weights, "--weights")
        check_prompts("--prompt", prompts, list(weights.tokens))
        check_prompts("--negative_prompt", [negative_prompt or ""], list(weights.tokens))
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes[precision or ("fp16" if device.type == "cuda" else "fp32")]
    source = base_of({} if weights is None else weights.config, model, revision, variant, config_from)
    check_num_inference_steps(source, num_inference_steps)
    pipe = load_pipeline(source, dtype)
    if weights is not None:
        try:
            load_custom_diffusion(pipe, weights, scale=scale)
        except ValueError as error:
            raise InputError(f"--weights: {error}") from None
    options = {"height": height, "width": width} | drawn_into(pipe, image, mask, height, width)
    pipe.to(device)
    paths = image_paths(Path(output), len(prompts), num_images)
    for number, path in enumerate(paths):
        pipe.set_progress_bar_config(desc=path.name, disable=not sys.stderr.isatty())
        drawn = pipe(
            prompts[number // num_images],
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            # On the CPU: the same noise whatever the device.
            generator=torch.Generator().manual_seed(seed + number % num_images),
            **options,
        ).images[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            drawn.save(temporary, format=OUTPUT_FORMATS[path.suffix.lower()])
        print(path, flush=True)
    return paths


def drawn_into(
    pipe: DiffusionPipeline, image: str | Path | None, mask: str | Path | None, height: int | None, width: int | None
) -> dict:
    """What an inpainting pipeline is called with beside prompts; nothing for others. Raises InputError."""
    from custom_diffusion.images import open_image
    from custom_diffusion.model.inpainting import all_hole, paints_holes

    if image is None:
        return all_hole(pipe, height, width)
    if not paints_holes(pipe.unet.config):
        raise InputError("--image: this is no inpainting model, it draws whole images; leave --image and --mask out")
    opened = {}
    for name, path in (("image", image), ("mask", mask)):
        try:
            opened[name] = open_image(Path(path))
        except Exception as error:  # Pillow's readers raise many types on foreign bytes
            raise InputError(f"--{name}: '{path}' cannot be read as an image ({first_line(error)})") from None
    size = {
        "height": height or opened["image"].height // pipe.vae_scale_factor * pipe.vae_scale_factor,
        "width": width or opened["image"].width // pipe.vae_scale_factor * pipe.vae_scale_factor,
    }
    return {"image": opened["image"], "mask_image": opened["mask"].convert("L"), "strength": 1.0} | size


def image_paths(output: Path, num_prompts: int, num_images: int) -> list[Path]:
    """Where each image goes: prompt by prompt, `<prompt>-<index>.png`, or `<index>.png` with one prompt."""
    if output.suffix.lower() in OUTPUT_FORMATS:
        return [output]
    if num_prompts == 1:
        return [output / f"{index}.png" for index in range(num_images)]
    return [output / f"{number}-{index}.png" for number in range(num_prompts) for index in range(num_images)]
