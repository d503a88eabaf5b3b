"""Processes with a limit: watched training runs, and functions; nothing that goes wrong in one ends the script that started it."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from make_model import ROOT
from watched import call_forked, run_forked

WATCHED = ROOT / "benchmarks/watched.py"


class NoTime(Exception):
    """There is less time left than a run takes."""


class Runner:
    """Starts runs and waits for them.

    A forked process has everything imported already, which saves seconds a run. Where a device does not bear that, as the first
    process tells, each is started anew.

    Args:
        folder: for logs and records.
        seconds: in which all must be done.
        patience: what every limit is multiplied by, for slow machines.
    """

    def __init__(self, folder: Path, seconds: float, patience: float = 1.0):
        self.folder, self.patience = folder, patience
        folder.mkdir(parents=True, exist_ok=True)
        self._end = time.monotonic() + seconds
        self._number = 0
        # So that nobody asks the driver itself before a process is forked, which would spoil it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        sys.path.insert(0, str(ROOT))
        paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(["forked_imports"])
        self.forks = True

    def start_anew(self) -> None:
        """From now on no process is forked."""
        self.forks, self._server = False, multiprocessing.get_context("spawn")

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def call(self, name: str, function, *args, limit: float) -> str:
        """Call a function in a forked process: "ok", or what went wrong."""
        limit, log = self._limit(limit), self._place(name, "log")
        process = self._server.Process(target=call_forked, args=(str(log), function, *args))
        process.start()
        status, _ = wait(process, log, limit)
        return status

    def run(self, name: str, argv: list[str], *, limit: float, fork: bool = True, **watch) -> dict:
        """Run a training script, watched.

        Args:
            argv: the script and its flags. limit: in seconds.
            fork: unless the time from launch to exit is to be measured, or bitsandbytes is needed.
            watch: of `watched.Watch`.
        Returns:
            status ("ok", or what went wrong), seconds from launch to exit and to the first step, of each step after it (the times
            between their reports), memory in bytes, and what was watched.
        """
        limit, log = self._limit(limit), self._place(name, "log")
        watch = {"record": str(self._place(name, "json"))} | watch
        started = time.time()
        if fork and self.forks:
            process = self._server.Process(target=run_forked, args=(watch, argv, str(log)))
            process.start()
        else:
            with log.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, str(WATCHED), json.dumps(watch), *argv],
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
        status, ended = wait(process, log, limit)
        record = Path(watch["record"])
        seen = {"steps": [], "profile": None, "moved": None, "cpu_seconds": None}
        if record.exists():
            seen |= json.loads(record.read_text())
        times = [step["time"] for step in seen["steps"]]
        return {
            "status": status,
            "wall_seconds": ended - started,
            "cpu_seconds": seen["cpu_seconds"],
            "first_step_seconds": times[0] - started if times else None,
            "step_seconds": [later - earlier for earlier, later in pairwise(times)],
            "allocated_bytes": max((step["allocated_bytes"] for step in seen["steps"]), default=0),
            "reserved_bytes": max((step["reserved_bytes"] for step in seen["steps"]), default=0),
            "profile": seen["profile"],
            "moved": seen["moved"],
        }

    def _limit(self, limit):
        if self.left() < 10:
            raise NoTime
        return min(limit * self.patience, self.left())

    def _place(self, name, suffix):
        self._number += 1
        return self.folder / f"{self._number:03}-{''.join(c if c.isalnum() else '-' for c in name)}.{suffix}"


def wait(process, log: Path, limit: float) -> tuple[str, float]:
    """How a process ended, and when."""
    forked, deadline = hasattr(process, "exitcode"), time.monotonic() + limit
    while (process.is_alive() if forked else process.poll() is None) and time.monotonic() < deadline:
        time.sleep(0.02)
    ended = time.time()
    code = process.exitcode if forked else process.returncode
    if code == 0:
        return "ok", ended
    if code is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return f"stopped after {limit:.0f} s", ended
    text = log.read_text(errors="replace") if log.exists() else ""
    if "out of memory" in text:
        return "out of memory", ended
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return f"exit status {code}: {lines[-1][:300] if lines else 'no output'}", ended
