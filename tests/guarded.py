"""Memory that ends where reading on is a fault."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PROT_NONE = 0


def before_a_guard(x: Tensor) -> Tensor:
    """A copy of `x` that ends where a page begins that may not be read."""
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(base + size), mmap.PAGESIZE, PROT_NONE) == 0
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return flat.view(x.shape).copy_(x)
