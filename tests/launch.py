"""Real training runs in processes of their own: as users start them, or forked, which saves the seconds of importing."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "train_custom_diffusion.py")
TIMEOUT = 300  # seconds; a run on the tiny model takes 2 of computing, and 6 of importing if it is not forked
# One thread a process: sums are then taken in the same order however many processes share the machine.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

# Ways to start the script; a command ends where the script's own flags begin.
FORKED = ()
PLAIN = (sys.executable, SCRIPT)
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", "--cpu", SCRIPT)  # fmt: skip
# Without a GPU the processes meet by gloo, but are launched as those of several GPUs are.
ACCELERATE_MULTI_GPU = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
                        "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", SCRIPT)  # fmt: skip


def torchrun(num_processes: int, *, num_nodes: int = 1, node: int = 0, port: int | None = None) -> tuple[str, ...]:
    """torchrun on this host; several nodes meet at `port`."""
    return (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", f"--nnodes={num_nodes}",
            f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port or free_port()}", SCRIPT)  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def flags(**values) -> list[str]:
    """Command-line flags: True stands for a switch; False and None leave a flag out."""
    arguments = []
    for name, value in values.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None and value is not False:
            arguments.append(f"--{name}={value}")
    return arguments


class Run:
    """A run in progress. It leads a process group of its own; its output goes to the file `log`.

    Args:
        changed_by: called in a forked process before the script, to give it a machine or a library that behaves otherwise.
    """

    def __init__(
        self,
        command: tuple[str, ...],
        arguments: dict,
        log: Path,
        env: dict | None = None,
        *,
        changed_by: Callable[[], None] | None = None,
    ):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        if command:
            inherited = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
            with log.open("w") as file:
                self.process = subprocess.Popen(
                    [*command, *flags(**arguments)], env=inherited | ENVIRONMENT | (env or {}), cwd=log.parent,
                    stdout=file, stderr=file, start_new_session=True,
                )  # fmt: skip
        else:
            self.process = _forkserver().Process(
                target=_run_script, args=(flags(**arguments), str(log), env or {}, changed_by)
            )
            self.process.start()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace").replace("\r", "\n")

    @property
    def messages(self) -> list[str]:
        """The lines that the script itself printed about why it ended."""
        lines = self.output.split("train_custom_diffusion.py: ")[1:]
        return [line.splitlines()[0].removeprefix("error: ") for line in lines]

    def alive(self) -> bool:
        return self.process.is_alive() if hasattr(self.process, "is_alive") else self.process.poll() is None

    def wait(self) -> int:
        """The exit status, negative for a signal. A run that does not end is killed."""
        deadline = time.monotonic() + TIMEOUT
        while self.alive():
            if time.monotonic() > deadline:
                self.kill_group()
                raise TimeoutError(self.output)
            time.sleep(0.05)
        return self.process.exitcode if hasattr(self.process, "exitcode") else self.process.returncode

    def wait_for(self, condition) -> None:
        """Return as soon as `condition()` holds, or the run has ended."""
        deadline = time.monotonic() + TIMEOUT
        while self.alive() and not condition():
            if time.monotonic() > deadline:
                self.kill_group()
                raise TimeoutError(self.output)
            time.sleep(0.01)

    def ok(self) -> str:
        """The output of a run that must succeed."""
        status = self.wait()
        assert status == 0, f"exit status {status}\n{self.output}"
        return self.output

    def send(self, number: int) -> None:
        """Send a signal to the process itself, not to its children."""
        os.kill(self.process.pid, number)

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def run(command: tuple[str, ...], arguments: dict, log: Path, env: dict | None = None, **options) -> Run:
    """Start a run and wait for its end."""
    started = Run(command, arguments, log, env, **options)
    started.status = started.wait()
    return started


def run_group(
    num_processes: int,
    arguments: dict | list[dict],
    log: Path,
    processes_per_machine: int | None = None,
    **options,
) -> list[Run]:
    """Forked processes of one run, started with the environment that torchrun gives them.

    Args:
        arguments: of all processes, or of each.
        log: process i writes to "<log>.<i>".
    """
    if isinstance(arguments, dict):
        arguments = [arguments] * num_processes
    per_machine = processes_per_machine or num_processes
    shared = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": per_machine, "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = free_port()
    runs = []
    for rank in range(num_processes):
        env = shared | {"RANK": rank, "LOCAL_RANK": rank % per_machine}
        env = {name: str(value) for name, value in env.items()}
        runs.append(Run(FORKED, arguments[rank], log.with_name(f"{log.name}.{rank}"), env, **options))
    return runs


_LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def _forkserver():
    context = multiprocessing.get_context("forkserver")
    os.environ.update(ENVIRONMENT)
    context.set_forkserver_preload(["train_custom_diffusion", "torch.utils.tensorboard"])
    return context


def _run_script(arguments, log, env, changed_by):
    # For DataLoader's workers, as in a process that was not forked.
    multiprocessing.set_start_method("fork", force=True)
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(Path(log).parent)
    os.environ.update(env)
    sys.argv = [SCRIPT, *arguments]
    if changed_by is not None:
        changed_by()
    runpy.run_path(SCRIPT, run_name="__main__")
