"""Real training runs in processes of their own, as users start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "train_custom_diffusion.py")
TIMEOUT = 180  # seconds; a run on the tiny model takes 10

# Ways to start the script; a command ends where the script's own flags begin.
PLAIN = [sys.executable, SCRIPT]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", SCRIPT]  # fmt: skip


def torchrun(num_processes: int, *, num_nodes: int = 1, node: int = 0, port: int | None = None) -> list[str]:
    """torchrun on this host; several nodes meet at `port`."""
    where = ["--nnodes", str(num_nodes), "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port",
             str(port or free_port())]  # fmt: skip
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), *where, SCRIPT]


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


def start(command: list[str], arguments: dict, cwd: Path, **popen) -> subprocess.Popen:
    """Start a run in a process group of its own; standard error joins standard output."""
    launcher_variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launcher_variables}
    # One thread a process: sums are then taken in the same order however many processes share the machine.
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, *flags(**arguments)],
        cwd=cwd,
        env=environment | popen.pop("env", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **popen,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a run; it is killed with its children if it does not end."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except BaseException:
        os.killpg(process.pid, 9)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, None)


def run(command: list[str], arguments: dict, cwd: Path, **popen) -> subprocess.CompletedProcess:
    """Start a run and wait for it."""
    return finish(start(command, arguments, cwd, **popen))


def run_ok(command: list[str], arguments: dict, cwd: Path, **popen) -> str:
    """The output of a run that must succeed."""
    result = run(command, arguments, cwd, **popen)
    assert result.returncode == 0, result.stdout
    return result.stdout
