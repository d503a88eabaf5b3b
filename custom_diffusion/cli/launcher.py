"""What a process owes to the launcher that started it. Imports nothing heavy: a launcher may end at any time."""

import ctypes
import os
import signal
import sys
import time

FIRST_TO_SPEAK = 10.0  # seconds that the first process of a machine may come later than another to the same problem
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

    torchrun, and with it `accelerate launch`, ends all processes as soon as one has ended. So another does not end before the
    first has, by which it is ended itself; if the first goes on, it does not have the problem, and the other speaks.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return True
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(FIRST_TO_SPEAK)
    return True
