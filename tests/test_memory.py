"""Freed memory goes back to the system, where the system has a way to ask for it."""

import ctypes
import os
import platform
import subprocess
import sys

import launch
import pytest
from accelerate import Accelerator

# Blocks of 4 MB with small ones between them that live on: what glibc by itself keeps once it has seen larger blocks freed.
PROGRAM = """
import sys, torch
from custom_diffusion.training.memory import return_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

torch.ones(2**22)
before = resident()
blocks, small = [], []
for _ in range(50):
    blocks.append(torch.ones(2**20))
    small.append(torch.ones(2**10))
del blocks
if sys.argv[1] == "returned":
    return_freed_memory(torch.device("cpu"))
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_blocks_do_not_stay_resident():
    def megabytes_left(argument):
        done = subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert megabytes_left("kept") > 100  # else this test would prove nothing
    assert megabytes_left("returned") < 20


def on_a_mac():
    """A system that has neither glibc nor Linux's own calls."""

    class Library(ctypes.CDLL):
        def __init__(self, name, *args, **kwargs):
            assert name is not None, "asked for what only Linux has"
            super().__init__(name, *args, **kwargs)

    sys.platform, ctypes.CDLL = "darwin", Library
    platform.libc_ver = lambda *_, **__: ("", "")
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
    backward = Accelerator.backward

    def backward_without_huge_pages(self, loss):
        assert "THP_MEM_ALLOC_ENABLE" not in os.environ
        backward(self, loss)

    Accelerator.backward = backward_without_huge_pages


def test_elsewhere_nothing_is_asked_for_that_only_linux_has(run_arguments, tmp_path):
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}  # on Linux this process would then die with its launcher
    arguments = run_arguments | {"max_train_steps": 2, "output_dir": tmp_path / "out"}
    launch.Run(launch.FORKED, arguments, tmp_path / "log", launched, changed_by=on_a_mac).ok()
