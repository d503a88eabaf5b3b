# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""What `load_custom_diffusion(..., scale=)` does: one concept drawn at several scales from the same noise, docs/scales.png.

python experiments/scales.py --first_seed 1
"""

import argparse
from pathlib import Path

import numpy as np
import runs  # finds the demo
import torch
from judge import generate
from PIL import Image, ImageDraw, ImageFont

import demo
from custom_diffusion import load_custom_diffusion

CONCEPT = "circle"
SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PROMPTS = tuple(f"photo of a <new1> {CONCEPT} on a {ground} background" for ground in ("white", "pink", "brown"))
TILE, HEAD = 112, 28  # pixels


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_flags(parser, "runs", num_seeds=1)
    parser.add_argument("--docs", type=Path, default=runs.ROOT / "docs")
    return parser.parse_args()


def strip(images: list[np.ndarray]) -> Image.Image:
    """A column for each scale, a row for each prompt; `images`: of each scale (num_prompts, 64, 64, 3) uint8."""
    sheet = Image.new("RGB", (TILE * len(SCALES), HEAD + TILE * len(PROMPTS)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, (scale, drawn) in enumerate(zip(SCALES, images)):
        pen.text(((column + 0.5) * TILE, HEAD / 2), f"{scale:g}", "black", font, anchor="mm")
        for row, image in enumerate(drawn):
            tile = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * TILE, HEAD + row * TILE))
    return sheet


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    seed = args.first_seed
    weights = runs.trained(args.work_dir, CONCEPT, seed, args.steps, threads=args.threads, model=args.model)
    pipe, images = demo.load_pipeline(model=args.model), []
    for scale in SCALES:
        load_custom_diffusion(pipe, weights, scale=scale)
        images.append(generate(pipe, list(PROMPTS), seed))
    strip(images).save(args.docs / "scales.png", optimize=True)


if __name__ == "__main__":
    main()
