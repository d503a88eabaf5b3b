"""Keeping the C library from holding on to memory that training has freed."""

import ctypes
import platform

M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
LARGE = 2**20  # bytes. Smaller marks save little more memory and cost time in page faults


def return_freed_memory() -> None:
    """Give every large block back to the system as soon as it is freed, where the C library is glibc.

    Left alone, it would keep the activations of the last step, in pieces that the next step cannot all use again.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
