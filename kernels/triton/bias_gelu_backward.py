"""The gradient of `bias_gelu`: of `out = gelu(x + bias)` it is `grad·gelu'(x + bias)`.

Numerics: evaluated in fp32 (`activations.py`), one rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels.activations import GELU, GELU_TANH, grid, slope, tiles


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_backward_kernel(
    grad_ptr,  # [T, F]
    x_ptr,  # [T, F]
    bias_ptr,  # [F] fp32 or None
    d_x_ptr,  # [T, F]
    T,
    F: tl.constexpr,
    TANH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    blocks: tl.constexpr = (F + CHUNK - 1) // CHUNK
    ACTIVATION: tl.constexpr = GELU_TANH if TANH else GELU
    DTYPE: tl.constexpr = d_x_ptr.dtype.element_ty
    program = tl.program_id(0)
    cols = (program % blocks) * CHUNK + tl.arange(0, CHUNK)
    first = (program // blocks).to(tl.int64) * (ROWS * SLOTS) + tl.arange(0, ROWS)
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        mask = (rows < T)[:, None] & (cols < F)[None, :]
        at = (rows * F)[:, None] + cols[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            # The full shape gives the bias the layout of x.
            bias = bias_ptr + tl.zeros((ROWS, 1), tl.int32) + cols[None, :]
            x += tl.load(bias, mask=mask, other=0.0)
        d_x = grad * slope(x, ACTIVATION, DTYPE == tl.float32)
        tl.store(d_x_ptr + at, d_x.to(DTYPE), mask=mask)


def config(F: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernel for rows of F columns."""
    return tiles(F, dtype, slots=2)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """The gradient of `x`, and of each row of `x + bias`.

    Args:
        grad: `[T, F]`, dtype of `x`, contiguous.
        x: `[T, F]` fp16, bf16 or fp32, contiguous.
        bias: fp32 `[F]` or None.
        tanh: the tanh approximation instead of erf.

    Returns:
        `[T, F]` in the dtype of `x`.
    """
    T, F = x.shape
    constants = config(F, x.dtype)
    d_x = torch.empty_like(x)
    if T:
        _bias_gelu_backward_kernel[grid(T, F, constants)](
            grad, x, bias, d_x, T, F=F, TANH=tanh, **constants
        )
    return d_x
