"""Stopping a run, in all processes together: on SIGTERM or Ctrl-C, a non-finite loss, a full disk, or when one has died."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from custom_diffusion.training.checkpoints import last_good

LOST_PROCESS = "another process of this run has ended, or cannot be reached"


class RunStopped(Exception):
    """The run ends early. `status` is the exit status of the process."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class ProcessLost(RunStopped):
    """Another process of the run has died. Raised in each of those that are left, and told by each."""


@contextmanager
def lost_process_told(what_is_safe: str) -> Iterator[None]:
    """Raises ProcessLost, which says `what_is_safe`, if the block waits for a process that has died."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise ProcessLost(f"{LOST_PROCESS}; {what_is_safe}") from None


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error means that another process of the run is gone. gloo's have no type of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


class StopSignals:
    """What SIGTERM and Ctrl-C do. Until they are asked to do otherwise, they simply end the process.

    Attributes:
        received: the signal's number, 0 before any.
    """

    def __init__(self):
        self.received = 0
        self._interrupted = False

    def remember(self) -> None:
        """From now on keep the first signal for later in `received`; a second Ctrl-C ends the process at once."""
        self._handle(self._remember)

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """`remember` for the length of a block."""
        self.remember()
        try:
            yield
        finally:
            self._handle(signal.SIG_DFL)

    def end_at_once(self, message: str) -> None:
        """From now on, and if one was received before, a signal ends the process, after this message."""

        def end(number, _):
            if int(os.environ.get("RANK", 0)) == 0:
                tqdm.write(message, file=sys.stderr)
            os._exit(128 + number)

        self._handle(end)
        if self.received:
            end(self.received, None)

    def _handle(self, handler):
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, handler)

    def _remember(self, number, _):
        if number == signal.SIGINT and self._interrupted:
            os._exit(128 + number)
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.received = self.received or number


def write_together(accelerator: Accelerator, output_dir: Path, write: Callable, *args) -> None:
    """Call `write(*args)` on the main process, while the others wait.

    Raises:
        RunStopped: in all processes, if it cannot write; the message says why.
    """
    problem = [None]
    if accelerator.is_main_process:
        try:
            write(*args)
        except RunStopped as stop:
            problem[0] = str(stop)
        except OSError as error:
            problem[0] = f"cannot write to '{output_dir}': {error}. {last_good(output_dir)}"
    broadcast_object_list(problem)
    if problem[0]:
        raise RunStopped(problem[0])


def non_finite_message(what: str, value: float, step: int, output_dir: Path) -> str:
    return (
        f"the {what} is {value} at step {step}; nothing of it was saved. Lower --learning_rate, or use another "
        f"--mixed_precision. {last_good(output_dir)}"
    )


def interrupted_message(output_dir: Path, step: int) -> str:
    return (
        f"stopped by a signal after step {step}; saved '{output_dir / f'checkpoint-{step}'}'. "
        "To go on, repeat the command with --resume_from_checkpoint latest"
    )
