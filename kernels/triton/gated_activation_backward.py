"""The gradient of `gated_activation`: of `out = f(a)·b` it is `grad·b·f'(a)` and `grad·f(a)`.

Numerics: evaluated in fp32 (`activations.py`), one rounding of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels.activations import activate, grid, slope, tiles


@triton.jit(do_not_specialize=["T"])
def _gated_activation_backward_kernel(
    grad_ptr,  # [T, F]
    x_ptr,  # [T, 2F]
    bias_ptr,  # [2F] fp32 or None
    d_x_ptr,  # [T, 2F]
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
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    program = tl.program_id(0)
    cols = (program % blocks) * CHUNK + tl.arange(0, CHUNK)
    first = (program // blocks).to(tl.int64) * (ROWS * SLOTS) + tl.arange(0, ROWS)
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        mask = (rows < T)[:, None] & (cols < F)[None, :]
        at = (rows * (2 * F))[:, None] + cols[None, :]
        a = tl.load(x_ptr + at + ACTIVATED, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + at + GATE, mask=mask, other=0.0).to(tl.float32)
        grad_at = grad_ptr + (rows * F)[:, None] + cols[None, :]
        grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            # The full shape gives the bias the layout of x.
            bias = bias_ptr + tl.zeros((ROWS, 1), tl.int32) + cols[None, :]
            a += tl.load(bias + ACTIVATED, mask=mask, other=0.0)
            b += tl.load(bias + GATE, mask=mask, other=0.0)
        d_a = grad * b * slope(a, ACTIVATION, DTYPE == tl.float32)
        d_b = grad * activate(a, ACTIVATION, DTYPE == tl.float32)
        tl.store(d_x_ptr + at + ACTIVATED, d_a.to(DTYPE), mask=mask)
        tl.store(d_x_ptr + at + GATE, d_b.to(DTYPE), mask=mask)


def config(F: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernel for gates of F columns."""
    return tiles(F, dtype, slots=1)


def gated_activation_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: int, first: bool
) -> Tensor:
    """The gradient of `x`, and of each row of `x + bias`.

    Args:
        grad: `[T, F]`, dtype of `x`, contiguous.
        x: `[T, 2F]` fp16, bf16 or fp32, contiguous.
        bias: fp32 `[2F]` or None.
        activation: code of f.
        first: a is the first half of the columns; otherwise the second.

    Returns:
        `[T, 2F]` in the dtype of `x`.
    """
    T, F = grad.shape
    constants = config(F, x.dtype)
    d_x = torch.empty_like(x)
    if T:
        _gated_activation_backward_kernel[grid(T, F, constants)](
            grad, x, bias, d_x, T, F=F, ACTIVATION=activation, FIRST=first, **constants
        )
    return d_x
