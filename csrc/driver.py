"""Whether an NVIDIA driver answers on this machine. It is asked through ctypes, without torch.

    python csrc/driver.py

prints what it says, and exits with 1 where no GPU is there to run on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

LIBRARY = "libcuda.so.1"


def unavailable(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> str | None:
    """Why this machine runs no CUDA kernels; None where a driver has a GPU for them."""
    try:
        cuda = load(LIBRARY)
    except OSError:
        return f"there is no NVIDIA driver ({LIBRARY} does not load)"
    if status := cuda.cuInit(0):
        return f"the NVIDIA driver does not start (cuInit returned {status})"
    count = ctypes.c_int(0)
    if status := cuda.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver does not count its GPUs (cuDeviceGetCount returned {status})"
    return None if count.value else "the NVIDIA driver has no GPU"


if __name__ == "__main__":
    reason = unavailable()
    print(reason or "an NVIDIA driver answers")
    raise SystemExit(reason is not None)
