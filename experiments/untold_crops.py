# ruff: noqa: E402
# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""The training script, but every photo is passed off as whole: what `micro_conditioning.py` compares it with."""

import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from custom_diffusion.training import samples

samples.photo_time_ids = lambda augmentation, photo, original, size: torch.tensor([size, size, 0.0, 0.0, size, size])
sys.argv[0] = str(ROOT / "train_custom_diffusion.py")
runpy.run_path(sys.argv[0], run_name="__main__")
