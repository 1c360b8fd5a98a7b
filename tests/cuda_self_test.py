"""The kernels of tests/cuda_emulator/self_test.cu, to be run from Python."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

import cuda_emulation

NAN_WORD = 0xFFFFFFFF  # what shared memory holds that nobody has written


@cache
def _library() -> ctypes.CDLL:
    source = cuda_emulation.EMULATOR / "self_test.cu"
    return ctypes.CDLL(str(cuda_emulation.build("self_test", [source])))


def set_order(seed: int) -> None:
    """Choose the order in which threads run from now on."""
    _library().sbf_emulation_set_order(ctypes.c_uint64(seed))


def run(
    kernel: str,
    source: Any,
    out: np.ndarray,
    *,
    blocks: int = 1,
    threads: int = 32,
    shared: int = 0,
) -> np.ndarray:
    """Run a kernel on an input and an output, which is returned.

    Raises:
        RuntimeError: the emulator has found a mistake.
    """
    source = np.ascontiguousarray(source)
    error = ctypes.create_string_buffer(1000)
    _library().sbf_self_test(
        kernel.encode(),
        ctypes.c_void_p(source.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(blocks),
        threads,
        ctypes.c_size_t(shared),
        error,
        ctypes.c_size_t(len(error)),
    )
    if error.value:
        raise RuntimeError(error.value.decode())
    return out


def aligned(words: int) -> np.ndarray:
    """Zeros, uint32, that begin at a multiple of 16 bytes."""
    memory = np.zeros(words + 4, np.uint32)
    first = -memory.ctypes.data % 16 // 4
    return memory[first : first + words]


def same(a: np.ndarray, b: Any) -> bool:
    return np.array_equal(a, b, equal_nan=True)
