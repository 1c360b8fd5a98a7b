"""`f(a)·b` of the halves a and b of the columns of `x + bias`, in one pass.

Numerics: evaluated in fp32 (`activations.py`), one rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels.activations import activate, grid, tiles


@triton.jit(do_not_specialize=["T"])
def _gated_activation_kernel(
    x_ptr,  # [T, 2F]
    bias_ptr,  # [2F] fp32 or None
    out_ptr,  # [T, F]
    T,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    blocks: tl.constexpr = (F + CHUNK - 1) // CHUNK
    # Where the half that is activated begins, and the other.
    ACTIVATED: tl.constexpr = 0 if FIRST else F
    GATE: tl.constexpr = F - ACTIVATED
    program = tl.program_id(0)
    cols = (program % blocks) * CHUNK + tl.arange(0, CHUNK)
    first = (program // blocks).to(tl.int64) * (ROWS * SLOTS) + tl.arange(0, ROWS)
    cols_in = (first == first)[:, None] & (cols < F)[None, :]
    activated = ()
    gates = ()
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        mask = (rows < T)[:, None]
        if F % CHUNK != 0:
            mask = mask & cols_in
        at = x_ptr + (rows * (2 * F))[:, None] + cols[None, :]
        activated = activated + (tl.load(at + ACTIVATED, mask=mask, other=0.0).to(tl.float32),)
        gates = gates + (tl.load(at + GATE, mask=mask, other=0.0).to(tl.float32),)
    if bias_ptr is not None:
        # The full shape gives the bias the layout of x.
        at = bias_ptr + tl.zeros((ROWS, 1), tl.int32) + cols[None, :]
        activated_bias = tl.load(at + ACTIVATED, mask=cols_in, other=0.0)
        gate_bias = tl.load(at + GATE, mask=cols_in, other=0.0)
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        mask = (rows < T)[:, None]
        if F % CHUNK != 0:
            mask = mask & cols_in
        a = activated[slot]
        b = gates[slot]
        if bias_ptr is not None:
            a += activated_bias
            b += gate_bias
        y = activate(a, ACTIVATION, out_ptr.dtype.element_ty == tl.float32) * b
        tile = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (rows * F)[:, None] + cols[None, :], tile, mask=mask)


def config(F: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernel for results of F columns."""
    return tiles(F, dtype, slots=2)


def gated_activation(x: Tensor, bias: Tensor | None, activation: int, first: bool) -> Tensor:
    """`f(a)·b`; see :func:`sbert_fast.ops.gated_activation`.

    Args:
        x: `[T, 2F]` fp16, bf16 or fp32, contiguous.
        bias: fp32 `[2F]` or None.
        activation: code of f.
        first: a is the first half of the columns; otherwise the second.

    Returns:
        `[T, F]` in the dtype of `x`.
    """
    T, F = x.shape[0], x.shape[1] // 2
    constants = config(F, x.dtype)
    out = x.new_empty((T, F))
    if T:
        _gated_activation_kernel[grid(T, F, constants)](
            x, bias, out, T, F=F, ACTIVATION=activation, FIRST=first, **constants
        )
    return out
