"""What all processes know of each step, brought to the CPU without waiting for a GPU."""

import math
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class StepReport:
    """Losses and gradient norm of a step, averaged over the processes, and the signal that any of them received.

    Attributes:
        lr: the schedule's rate after the step.
        seconds: from one step known to the next, without what is done between steps.
        finite: the loss and the gradients are finite.
        losses: by name, as `objective.custom_diffusion_losses` names them.
    """

    step: int
    lr: float
    seconds: float
    finite: bool
    losses: dict[str, float]
    grad_norm: float
    stop_signal: int


class StepReports:
    """Every process gets the same numbers, so all take the same decisions. Each step is reported once, in order."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._pending = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """The next step begins now: images and checkpoints between two steps are no part of it."""
        self._started = time.perf_counter()

    def exchange(
        self,
        step: int,
        losses: dict[str, torch.Tensor],
        grad_norm: torch.Tensor,
        stop_signal: int,
        *,
        lr: float,
    ) -> list[StepReport]:
        """Hand over this step's losses (scalars by name), gradient norm and signal.

        Returns:
            This step's report on a CPU. On a GPU that of the step before, if there is one, since this step is still being
            computed; `latest` waits for it.
        """
        signal_number = torch.full((), float(stop_signal), device=grad_norm.device)
        own = torch.stack([*losses.values(), grad_norm, signal_number])
        gathered = self.accelerator.gather(own.unsqueeze(0))  # (processes, losses + 2)
        values = torch.cat([gathered[:, :-1].mean(dim=0), gathered[:, -1:].amax(dim=0)])
        before = self.latest()
        values, ready = start_copy(values)
        self._pending = (values, ready, list(losses), {"step": step, "lr": lr})
        return before if ready else self.latest()

    def latest(self) -> list[StepReport]:
        """What was handed over and not reported yet: at most one step's."""
        if self._pending is None:
            return []
        (values, ready, names, known), self._pending = self._pending, None
        if ready is not None:
            ready.synchronize()
        seconds = time.perf_counter() - self._started
        self.restart_clock()
        *losses, grad_norm, stop_signal = values.tolist()
        losses = dict(zip(names, losses))
        finite = math.isfinite(losses["loss"]) and math.isfinite(grad_norm)
        return [
            StepReport(
                **known,
                seconds=seconds,
                finite=finite,
                losses=losses,
                grad_norm=grad_norm,
                stop_signal=int(stop_signal),
            )
        ]


def start_copy(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The values on the CPU, and the event after which they are there; None if they are already."""
    if not values.is_cuda:
        return values, None
    copied = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return copied, ready
