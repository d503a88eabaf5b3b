"""Keeping the C library from holding on to memory that training has freed."""

import ctypes
import platform
from functools import cache

import torch


def return_freed_memory(device: torch.device) -> None:
    """Give what is free of the heap back to the system, if training is on a CPU and the C library is glibc.

    Left alone, it would keep the activations of the last step, in pieces that the next step cannot all use again. Once a
    step costs next to nothing; giving back every block as it is freed (M_MMAP_THRESHOLD) saves a little more, but
    costs a tenth of the time in page faults.
    """
    if device.type == "cpu" and _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _is_glibc():
    return platform.libc_ver()[0] == "glibc"
