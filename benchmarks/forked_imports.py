"""What a forked run finds imported already. A file of its own, since a fork server is told modules, not code, to import.

bitsandbytes is hidden: on import it asks the driver for the device, and no process that is forked afterwards can use it.
"""

import sys

sys.modules["bitsandbytes"] = None

import torch.utils.tensorboard  # noqa: E402, F401

import train_custom_diffusion  # noqa: E402, F401
