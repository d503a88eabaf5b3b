"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

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
