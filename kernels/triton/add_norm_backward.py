"""The gradient of `add_norm`, and of `add_norm_sum`. With `n = (v - mean)·r`, `r` being the inverse
deviation of the sum v, and `u = grad·weight`, over a row of E columns:

    d_v = (u - mean(u) - n·mean(u·n))·r

for RMSNorm without mean(u); to which comes what v itself has for a gradient, where it was a result.
A program goes through LINES rows and adds up what each gives to the gradients of the parameters:
`grad·n`, `grad` and `d_v`. Torch adds up the sums of programs.

Numerics: fp32, one rounding of d_v. Sums have an order that T, E and the dtype decide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels.rows import (
    add_tiles,
    centre,
    inverse_deviation,
    load_rows,
    load_vector,
    multiply_tiles,
    row_mean,
    row_sum,
    row_tile,
    store_rows,
)

LINES = 32
# Values of a row in a lane, beside three times as many sums.
_MOST = 16


@triton.jit
def _zeros(E: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(0, E, CHUNK):
        tiles = tiles + (tl.zeros((ROWS, CHUNK), tl.float32),)
    return tiles


@triton.jit
def _store_sums(ptr, tiles, E: tl.constexpr, CHUNK: tl.constexpr):
    """The sums [E] over the rows of tiles."""
    for start in tl.static_range(0, E, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        tl.store(ptr + cols, tl.sum(tiles[start // CHUNK], axis=0), mask=cols < E)


@triton.jit
def _differentiate(x, grad, weight, eps, keep, E: tl.constexpr, CHUNK: tl.constexpr,
                   RMS: tl.constexpr):  # fmt: skip
    """n and d_v of rows x; zeros where not `keep` [ROWS]."""
    x = centre(x, E, CHUNK, RMS)
    # Rows that are not there are not divided by zero, should eps be zero.
    scale = tl.where(keep[:, None], inverse_deviation(x, eps, E), 0.0)
    normed = ()
    for c in tl.static_range(len(x)):
        normed = normed + (x[c] * scale,)
    upstream = multiply_tiles(grad, weight)
    slope = row_mean(row_sum(multiply_tiles(upstream, normed)), E)
    level = tl.zeros_like(slope)
    if not RMS:
        level = row_mean(row_sum(upstream), E)
    d_x = ()
    for c in tl.static_range(len(x)):
        d_x = d_x + ((upstream[c] - level - normed[c] * slope) * scale,)
    return normed, d_x


@triton.jit(do_not_specialize=["T"])
def _add_norm_backward_kernel(
    grad_ptr,  # [T, E]
    x_ptr,  # [T, E]
    bias_ptr,  # [E] fp32 or None
    residual_ptr,  # [T, E] or None
    weight_ptr,  # [E] fp32
    grad_sum_ptr,  # [T, E] or None
    d_x_ptr,  # [T, E]
    sums_ptr,  # [programs, 3, E] fp32
    T,
    eps,
    E: tl.constexpr,
    RMS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    weight = load_vector(weight_ptr, E, CHUNK, ROWS)
    if bias_ptr is not None:
        bias = load_vector(bias_ptr, E, CHUNK, ROWS)
    d_weight = _zeros(E, CHUNK, ROWS)
    d_ln_bias = _zeros(E, CHUNK, ROWS)
    d_bias = _zeros(E, CHUNK, ROWS)
    for line in range(0, LINES, ROWS):
        rows = program * LINES + line + tl.arange(0, ROWS)
        keep = rows < T
        x = load_rows(x_ptr, rows * E, keep, E, CHUNK)
        grad = load_rows(grad_ptr, rows * E, keep, E, CHUNK)
        if residual_ptr is not None:
            x = add_tiles(x, load_rows(residual_ptr, rows * E, keep, E, CHUNK))
        if bias_ptr is not None:
            x = add_tiles(x, bias)
        normed, d_x = _differentiate(x, grad, weight, eps, keep, E, CHUNK, RMS)
        if grad_sum_ptr is not None:
            d_x = add_tiles(d_x, load_rows(grad_sum_ptr, rows * E, keep, E, CHUNK))
        store_rows(d_x_ptr, rows * E, keep, d_x, E, CHUNK)
        d_weight = add_tiles(d_weight, multiply_tiles(grad, normed))
        d_ln_bias = add_tiles(d_ln_bias, grad)
        d_bias = add_tiles(d_bias, d_x)
    sums_ptr += program * (3 * E)
    _store_sums(sums_ptr, d_weight, E, CHUNK)
    _store_sums(sums_ptr + E, d_ln_bias, E, CHUNK)
    _store_sums(sums_ptr + 2 * E, d_bias, E, CHUNK)


def config(E: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernel for rows of E columns."""
    tile = row_tile(E, dtype, _MOST)
    return {"CHUNK": tile.chunk, "ROWS": tile.rows, "LINES": LINES, "num_warps": tile.warps}


def add_norm_backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    rms: bool = False,
    grad_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`sbert_fast.ops.add_norm`.

    Args:
        grad: `[T, E]`, dtype of `x`, contiguous.
        x: `[T, E]` fp16, bf16 or fp32, contiguous; E up to 4096.
        bias: fp32 `[E]` or None.
        residual: `[T, E]`, dtype of `x`, or None.
        weight: fp32 `[E]`.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm.
        grad_sum: the gradient of the sum, `[T, E]`, dtype of `x`, or None.

    Returns:
        The gradient of the sum, `[T, E]` in the dtype of `x`, and fp32 `[3, E]`, those of the
        weight, of the bias of the norm and of `bias`.

    Raises:
        ValueError: E is over 4096.
    """
    T, E = x.shape
    constants = config(E, x.dtype)
    d_x = torch.empty_like(x)
    programs = triton.cdiv(T, LINES)
    sums = x.new_empty((programs, 3, E), dtype=torch.float32)
    if T:
        summands = x, bias, residual
        _add_norm_backward_kernel[(programs,)](
            grad, *summands, weight, grad_sum, d_x, sums, T, eps, E=E, RMS=rms, **constants
        )
    return d_x, sums.sum(0)
