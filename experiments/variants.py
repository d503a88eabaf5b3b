# ruff: noqa: E402
# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""The training script with one thing changed, for experiments that ask what it matters: `python variants.py NAME FLAG...`."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from custom_diffusion.model.concept_model import ConceptModel
from custom_diffusion.training import samples
from custom_diffusion.training.augmentation import photo_mask


def pass_photos_off_as_whole() -> None:
    """However a photo is cropped, an SDXL is told that it is not."""
    samples.photo_time_ids = lambda augmentation, photo, original, size: torch.tensor(
        [size, size, 0.0, 0.0, size, size]
    )


def mask_the_border() -> None:
    """The loss leaves out a border of one latent cell, whether or not there is padding."""
    samples.photo_mask = lambda augmentation, *sizes: photo_mask(replace(augmentation, padded=True), *sizes)


def keep_the_last_word() -> None:
    """The last of several new words has no gradient, as in the reference script before March 2024."""
    make = ConceptModel.__init__

    def make_with_a_fixed_row(self, unet, text):
        make(self, unet, text)
        for rows in text.trained_rows():
            rows.register_hook(lambda gradient: torch.cat([gradient[:-1], torch.zeros_like(gradient[-1:])]))

    ConceptModel.__init__ = make_with_a_fixed_row


VARIANTS = {
    "photos-as-whole": pass_photos_off_as_whole, "border": mask_the_border, "last-word-fixed": keep_the_last_word,
}  # fmt: skip

if __name__ == "__main__":
    VARIANTS[sys.argv.pop(1)]()
    sys.argv[0] = str(ROOT / "train_custom_diffusion.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
