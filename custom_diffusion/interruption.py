"""Stopping a run at the end of a step, in all processes: on SIGTERM or Ctrl-C, a loss that is no number, a full disk."""

import ctypes
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from custom_diffusion.checkpoints import last_good

_PR_SET_PDEATHSIG = 1


class RunStopped(Exception):
    """The run ends early. `status` is the exit status of the process."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class StopSignals:
    """Remembers the first SIGTERM or Ctrl-C instead of dying of it; a second Ctrl-C stops at once.

    Attributes:
        received: the signal's number, 0 before any.
    """

    def __init__(self):
        self.received = 0
        self._interrupted = False
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        if sys.platform == "linux" and launched:
            # `accelerate launch` dies of a SIGTERM without passing it on, and every launcher of a SIGKILL; the kernel
            # then sends this process one.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _remember(self, number, _):
        if number == signal.SIGINT and self._interrupted:
            os._exit(128 + number)
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.received = self.received or number


@dataclass(frozen=True)
class StepReport:
    """What all processes know of a step: losses and gradient norm, averaged, and the signal that any of them got.

    Attributes:
        finite: the losses are numbers, and so are the gradients, unless they are scaled and may overflow now and then.
        lr: the schedule's rate after the step. seconds: what it took.
    """

    step: int
    lr: float
    seconds: float
    finite: bool
    loss: float
    instance_loss: float
    prior_loss: float
    grad_norm: float
    stop_signal: int


class StepReports:
    """Averages what the processes report of each step, and brings it to the CPU without waiting for the GPU.

    Every process gets the same numbers, so all take the same decisions. Each step is reported once, in order.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._pending = None

    def exchange(
        self, step: int, losses: torch.Tensor, grad_norm: torch.Tensor, stop_signal: int, *, lr: float, seconds: float
    ) -> list[StepReport]:
        """Hand over this step's (3,) losses, gradient norm and signal.

        Returns:
            This step's report on a CPU. On a GPU that of the step before, if there is one, since this step is still being
            computed; `latest` waits for it.
        """
        signal_number = torch.full((1,), float(stop_signal), device=losses.device)
        own = torch.cat([losses, grad_norm.reshape(1), signal_number])
        gathered = self.accelerator.gather(own.unsqueeze(0))  # (processes, 5)
        values = torch.cat([gathered[:, :4].mean(dim=0), gathered[:, 4:].amax(dim=0)])
        before = self.latest()
        values, ready = start_copy(values)
        self._pending = (values, ready, {"step": step, "lr": lr, "seconds": seconds})
        return before if ready else self.latest()

    def latest(self) -> list[StepReport]:
        """What was handed over and not reported yet: at most one step's."""
        if self._pending is None:
            return []
        (values, ready, known), self._pending = self._pending, None
        if ready is not None:
            ready.synchronize()
        loss, instance_loss, prior_loss, grad_norm, stop_signal = values.tolist()
        finite = math.isfinite(loss) and (self.accelerator.scaler is not None or math.isfinite(grad_norm))
        return [
            StepReport(
                **known,
                finite=finite,
                loss=loss,
                instance_loss=instance_loss,
                prior_loss=prior_loss,
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


def write_together(accelerator: Accelerator, write, output_dir: Path) -> None:
    """Call `write` on the main process, while the others wait.

    Raises:
        RunStopped: in all processes, if it cannot write; the message says why.
    """
    problem = [None]
    if accelerator.is_main_process:
        try:
            write()
        except RunStopped as stop:
            problem[0] = str(stop)
        except OSError as error:
            problem[0] = f"cannot write to '{output_dir}': {error}. {last_good(output_dir)}"
    broadcast_object_list(problem)
    if problem[0]:
        raise RunStopped(problem[0])


def not_finite_message(what: str, value: float, step: int, output_dir: Path) -> str:
    return (
        f"the {what} is {value} at step {step}; nothing of it was saved. Lower --learning_rate, or use another "
        f"--mixed_precision. {last_good(output_dir)}"
    )


def interrupted_message(output_dir: Path, step: int) -> str:
    return (
        f"stopped by a signal after step {step}; saved '{output_dir / f'checkpoint-{step}'}'. "
        "To go on, repeat the command with --resume_from_checkpoint latest"
    )
