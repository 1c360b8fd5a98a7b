"""`LayerNorm(x + bias + residual)` or RMSNorm of packed rows, and the sum itself where it is asked
for: one read and one write of every element.

Numerics: fp32 sum and statistics, two passes over registers (mean, then centred variance); one
rounding of each result. A row is reduced by one warp up to 1,024 columns, in an order that only E
and the dtype decide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels.rows import (
    WARPS,
    add_tiles,
    load_rows,
    load_vector,
    row_tile,
    scale_tiles,
    standardize,
    store_rows,
)


@triton.jit(do_not_specialize=["T"])
def _add_norm_kernel(
    x_ptr,  # [T, E]
    bias_ptr,  # [E] fp32 or None
    residual_ptr,  # [T, E] or None
    weight_ptr,  # [E] fp32
    ln_bias_ptr,  # [E] fp32
    out_ptr,  # [T, E]
    sum_ptr,  # [T, E] or None
    T,
    eps,
    E: tl.constexpr,
    RMS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (ROWS * SLOTS) + tl.arange(0, ROWS)
    slots = ()
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        x = load_rows(x_ptr, rows * E, rows < T, E, CHUNK)
        if residual_ptr is not None:
            x = add_tiles(x, load_rows(residual_ptr, rows * E, rows < T, E, CHUNK))
        slots = slots + (x,)
    if bias_ptr is not None:
        bias = load_vector(bias_ptr, E, CHUNK, ROWS)
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        x = slots[slot]
        if bias_ptr is not None:
            x = add_tiles(x, bias)
        if sum_ptr is not None:
            store_rows(sum_ptr, rows * E, rows < T, x, E, CHUNK)
        x = standardize(x, eps, E, CHUNK, RMS)
        if slot == 0:
            weight = load_vector(weight_ptr, E, CHUNK, ROWS)
            ln_bias = load_vector(ln_bias_ptr, E, CHUNK, ROWS)
        x = scale_tiles(x, weight, ln_bias)
        store_rows(out_ptr, rows * E, rows < T, x, E, CHUNK)


def config(E: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernel for rows of E columns."""
    tile = row_tile(E, dtype)
    slots = max(1, 32 // tile.per_lane)
    return {"CHUNK": tile.chunk, "ROWS": tile.rows, "SLOTS": slots, "num_warps": WARPS}


def add_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    rms: bool = False,
) -> Tensor:
    """`LayerNorm(x + bias + residual)`; see :func:`sbert_fast.ops.add_norm`.

    Args:
        x: `[T, E]` fp16, bf16 or fp32, contiguous; E up to 4096.
        bias: fp32 `[E]` or None.
        residual: `[T, E]`, dtype of `x`, or None.
        weight, ln_bias: fp32 `[E]`.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm.

    Returns:
        `[T, E]` in the dtype of `x`.

    Raises:
        ValueError: E is over 4096.
    """
    return _launch(x, bias, residual, weight, ln_bias, eps, rms, None)


def add_norm_sum(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`add_norm`, and the sum `[T, E]` in the dtype of `x`."""
    total = torch.empty_like(x)
    return _launch(x, bias, residual, weight, ln_bias, eps, rms, total), total


def _launch(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    rms: bool,
    total: Tensor | None,
) -> Tensor:
    """The norm; the sum goes to `total`, where that is given."""
    T, E = x.shape
    constants = config(E, x.dtype)
    out = torch.empty_like(x)
    if T:
        grid = (triton.cdiv(T, constants["ROWS"] * constants["SLOTS"]),)
        summands = x, bias, residual
        _add_norm_kernel[grid](
            *summands, weight, ln_bias, out, total, T, eps, E=E, RMS=rms, **constants
        )
    return out
