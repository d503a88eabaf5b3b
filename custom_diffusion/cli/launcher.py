"""What a process owes to the launcher that started it. Imports nothing heavy: a launcher may end at any time."""

import ctypes
import os
import signal
import sys
import time

SECONDS_FOR_FIRST = 10.0  # by which the first process of a machine may come later than another to the same problem
_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have this process sent a SIGTERM when its launcher has died, where the kernel offers that.

    `accelerate launch` dies of a SIGTERM without passing it on, and every launcher of a SIGKILL.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform == "linux" and launched:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def speaks_for_machine() -> bool:
    """Whether this process is the one of its machine that tells why all of them end, which is the first.

    In the others it waits: torchrun, and with it `accelerate launch`, ends all processes as soon as one has ended, so that one
    must be the first, and the others are ended while they wait. If the first goes on, it does not have the problem, and they speak.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return True
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(SECONDS_FOR_FIRST)
    return True
