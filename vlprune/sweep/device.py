"""Whether a worker's device can still be used after an error."""

from __future__ import annotations

import sys
from contextlib import suppress


def device_is_broken(error: Exception) -> bool:
    """Whether an error was of a device, or has left the device of this process so that every later call would fail.

    An assertion in a kernel or an illegal address does so; what is out of memory does not.
    """
    torch = sys.modules.get("torch")
    if torch is None:  # whoever has not imported it has used no device
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    # Libraries of the device report such an error under names of their own, and kernels later than they meet it.
    if not torch.cuda.is_initialized():
        return False
    with suppress(RuntimeError):
        torch.cuda.synchronize()
        return False
    return True
