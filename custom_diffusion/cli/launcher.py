"""What a process owes to the launcher that started it. Imports nothing heavy: a launcher may end at any time."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have this process sent a SIGTERM when its launcher has died, where the kernel offers that.

    `accelerate launch` dies of a SIGTERM without passing it on, and every launcher of a SIGKILL.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform == "linux" and launched:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
