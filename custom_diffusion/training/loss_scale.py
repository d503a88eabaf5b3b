"""Which steps of --mixed_precision fp16 were skipped because their scaled gradients overflowed."""

import math
from pathlib import Path

import torch

from custom_diffusion.training.stopping import RunStopped, non_finite_message

SMALLEST_SCALE = 1e-4  # gradients that overflow even then are not finite at all


class LossScale:
    """Watches the gradient scaler's scale, which falls with each skipped step.

    accelerate's own `optimizer_step_was_skipped` misses them: it looks for calls of the optimizer, and a fused one is called
    every time and skips by itself.

    Args:
        scaler: None if gradients are not scaled; then no step is ever skipped.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None, output_dir: Path):
        self._scaler = scaler
        self._output_dir = output_dir
        self._scale = math.inf if scaler is None else scaler.get_scale()

    def fell(self, step: int) -> bool:
        """Whether the scale is smaller than when last asked. Optimizer step `step` is still to be done then.

        Raises:
            RunStopped: the gradients overflow whatever they are scaled by.
        """
        if self._scaler is None:
            return False
        before, self._scale = self._scale, self._scaler.get_scale()
        if self._scale < SMALLEST_SCALE:
            raise RunStopped(non_finite_message("gradient", math.nan, step, self._output_dir))
        return self._scale < before
