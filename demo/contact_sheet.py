# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""One picture that shows the photos, the model before and the model after, large enough to look at."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, GAP, MARGIN = 112, 6, 24  # pixels
INK, FAINT, PAPER = (32, 32, 36), (110, 110, 118), (255, 255, 255)


def tiles(images: np.ndarray) -> Image.Image:
    """Images (N, 64, 64, 3) uint8 side by side, enlarged."""
    strip = Image.new("RGB", (len(images) * (TILE + GAP) - GAP, TILE), PAPER)
    for i, image in enumerate(images):
        strip.paste(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS), (i * (TILE + GAP), 0))
    return strip


def draw(photos: list[np.ndarray], rows: list[tuple[tuple[str, str], np.ndarray, np.ndarray]]) -> Image.Image:
    """The sheet. A row is (prompt before, prompt after), images before, images after."""
    title, label = ImageFont.load_default(20), ImageFont.load_default(14)
    half = 5 * (TILE + GAP) - GAP
    width = 2 * half + 3 * MARGIN
    row_height = TILE + 24 + MARGIN
    sheet = Image.new("RGB", (width, 2 * MARGIN + 48 + TILE + 44 + len(rows) * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    left, right, y = MARGIN, 2 * MARGIN + half, MARGIN
    pen.text((left, y), "The photos of <new1>", INK, title)
    pen.multiline_text(
        (right, y + 30),
        "Five photos of a thing for which the model has no words.\n"
        "Trained: the cross-attention's keys and values, and the\nembedding of the token <new1>. Nothing else.\n"
        "Each column below starts from the same noise, left and right.",
        FAINT, label, spacing=8,
    )  # fmt: skip
    y += 30
    sheet.paste(tiles(photos), (left, y))
    y += TILE + MARGIN
    pen.line((left, y, width - MARGIN, y), (220, 220, 224))
    y += 12
    pen.text((left, y), "Before", INK, title)
    pen.text((right, y), "After", INK, title)
    y += 32
    for prompts, before, after in rows:
        for x, prompt, images in ((left, prompts[0], before), (right, prompts[1], after)):
            pen.text((x, y), prompt, FAINT, label)
            sheet.paste(tiles(images), (x, y + 22))
        y += row_height
    return sheet
