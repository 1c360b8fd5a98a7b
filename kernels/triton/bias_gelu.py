"""`gelu(x + bias)`, exact or tanh, in one pass.

Numerics: evaluated in fp32 (`activations.py`), one rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels.activations import erf_gelu, grid, tanh_gelu, tiles


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_kernel(
    x_ptr,  # [T, F]
    bias_ptr,  # [F] fp32 or None
    out_ptr,  # [T, F]
    T,
    F: tl.constexpr,
    TANH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    blocks: tl.constexpr = (F + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    cols = (program % blocks) * CHUNK + tl.arange(0, CHUNK)
    first = (program // blocks).to(tl.int64) * (ROWS * SLOTS) + tl.arange(0, ROWS)
    cols_in = (first == first)[:, None] & (cols < F)[None, :]
    slots = ()
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        mask = (rows < T)[:, None]
        if F % CHUNK != 0:
            mask = mask & cols_in
        x = tl.load(x_ptr + (rows * F)[:, None] + cols[None, :], mask=mask, other=0.0)
        slots = slots + (x.to(tl.float32),)
    if bias_ptr is not None:
        # The full shape gives the bias the layout of x.
        at = bias_ptr + tl.zeros((ROWS, 1), tl.int32) + cols[None, :]
        bias = tl.load(at, mask=cols_in, other=0.0) if F % CHUNK != 0 else tl.load(at)
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        mask = (rows < T)[:, None]
        if F % CHUNK != 0:
            mask = mask & cols_in
        x = slots[slot]
        if bias_ptr is not None:
            x += bias
        y = tanh_gelu(x) if TANH else erf_gelu(x, out_ptr.dtype.element_ty == tl.float32)
        tile = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (rows * F)[:, None] + cols[None, :], tile, mask=mask)


def config(F: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernel for rows of F columns."""
    return tiles(F, dtype, slots=4)


def bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """`gelu(x + bias)`; see :func:`sbert_fast.ops.bias_gelu`.

    Args:
        x: `[T, F]` fp16, bf16 or fp32, contiguous.
        bias: fp32 `[F]` or None.
        tanh: the tanh approximation instead of erf.

    Returns:
        `[T, F]` in the dtype of `x`.
    """
    T, F = x.shape
    constants = config(F, x.dtype)
    out = torch.empty_like(x)
    if T:
        _bias_gelu_kernel[grid(T, F, constants)](x, bias, out, T, F=F, TANH=tanh, **constants)
    return out
