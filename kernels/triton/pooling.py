"""Pooling of packed segments, with or without the norm before it: one pass over the tokens.

What becomes of a segment depends on the number n of tokens it pools, and on nothing else:

    n < 32           one row of a program's tile, beside other short segments
    32 <= n <= 128   a program of its own; the rows of its tile take every ROWS-th token
    n > 128          slices of 128 tokens, a program each, whose sums a second kernel adds up

The grid is found without looking at the lengths. A window of 32 packed tokens holds the start of
one segment of 32 tokens or more at most, and a window of 128 tokens the start of one slice at most
that is not its segment's first: every window has a program, which finds its segment by a search.
Spans may overlap, so each has a program, and is not cut.

Numerics: fp32 sums in an order fixed by n, E and the dtype: a row of a tile adds its tokens a few
at a time, then the rows are added as a tree. No atomics. The weight and bias of the norm are
applied to the pooled row, where pooling is linear.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels.rows import WARPS, load_rows, row_tile, store_rows
from sbert_fast.kernels.segments import (
    CLS,
    LAST_TOKEN,
    MAX,
    SHORT,
    SLICE,
    finish,
    kept_tokens,
    merge,
    merge_rows,
    segment_at,
    token_range,
    walk,
)


class Norm(NamedTuple):
    """The norm before the pooling: its parameters and what is added to `x` first.

    RMSNorm if `rms`, otherwise LayerNorm.
    """

    bias: Tensor | None
    residual: Tensor | None
    weight: Tensor
    ln_bias: Tensor
    eps: float
    rms: bool = False


@triton.jit
def _pool_short(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, ln_bias_ptr, ranges_ptr, out_ptr, out_rows_ptr,
    program, segments, skip, eps, x_stride: tl.constexpr, out_stride: tl.constexpr,
    E: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    POOLING: tl.constexpr, NORMALIZE: tl.constexpr, SPANS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """The segments of fewer than 32 pooled tokens among ROWS consecutive ones."""
    segment = program * ROWS + tl.arange(0, ROWS)
    start, end = token_range(ranges_ptr, segment, segment < segments, SPANS)
    first, kept = kept_tokens(start, end, skip, POOLING)
    inside = (segment < segments) & (kept < SHORT)
    total = walk(
        x_ptr, x_stride, residual_ptr, bias_ptr, weight_ptr, ln_bias_ptr, eps,
        first, 1, tl.where(inside, kept, 0), first - start + 1,
        E, CHUNK, ROWS, UNROLL, POOLING, RMS,
    )  # fmt: skip
    finish(
        total, weight_ptr, ln_bias_ptr, kept, first - start, out_ptr, out_rows_ptr, segment,
        inside, out_stride, E, CHUNK, ROWS, POOLING, NORMALIZE,
    )  # fmt: skip


@triton.jit
def _pool_long(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, ln_bias_ptr, ranges_ptr, out_ptr, out_rows_ptr,
    partial_ptr, owner_ptr, window, segments, windows, slices, skip, eps,
    x_stride: tl.constexpr, out_stride: tl.constexpr,
    E: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    POOLING: tl.constexpr, NORMALIZE: tl.constexpr, SPANS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """The longer segment or slice that starts in a window; with SPANS, the whole segment."""
    if SPANS:
        segment = window
        start, end = token_range(ranges_ptr, segment, segment >= 0, SPANS)
        first, kept = kept_tokens(start, end, skip, POOLING)
        before = first * 0  # tokens of the segment before this slice
        mine = kept >= SHORT
        whole = mine
        tokens = kept.to(tl.int64)
        row = before
    else:
        later = window >= windows
        slot = (window - windows).to(tl.int64)
        last_of_window = (window.to(tl.int64) + 1) * SHORT - 1
        position = tl.where(later, slot * SLICE, last_of_window)
        segment = segment_at(ranges_ptr, segments, position)
        start, end = token_range(ranges_ptr, segment, segment >= 0, SPANS)
        first, kept = kept_tokens(start, end, skip, POOLING)
        before = tl.where(later, (position - first + SLICE - 1) // SLICE * SLICE, 0)
        starts_here = (start + SHORT > position) & (kept >= SHORT)
        mine = tl.where(later, (position > first) & (before < kept), starts_here)
        whole = kept <= SLICE
        tokens = tl.minimum(kept - before, SLICE)
        row = tl.where(later, slices + slot, first // SLICE)
        if later:
            ends_here = mine & (before + SLICE >= kept)
            tl.store(owner_ptr + slot, tl.where(ends_here, segment, -1))
    if mine:
        lanes = tl.arange(0, ROWS)
        each = walk(
            x_ptr, x_stride, residual_ptr, bias_ptr, weight_ptr, ln_bias_ptr, eps,
            first + before + lanes, ROWS, ((tokens - lanes + ROWS - 1) // ROWS).to(tl.int32),
            first - start + 1 + before + lanes,
            E, CHUNK, ROWS, UNROLL, POOLING, RMS,
        )  # fmt: skip
        total = merge_rows(each, POOLING)
        one = tl.zeros((1,), tl.int32)
        if whole:
            finish(
                total, weight_ptr, ln_bias_ptr, one + kept, one + (first - start),
                out_ptr, out_rows_ptr, one + segment, one == 0, out_stride,
                E, CHUNK, 1, POOLING, NORMALIZE,
            )  # fmt: skip
        else:
            store_rows(partial_ptr, one + row * E, one == 0, total, E, CHUNK)


@triton.jit(do_not_specialize=["segments", "groups", "windows", "slices", "skip"])
def _pool_kernel(
    x_ptr,  # [T, E]
    bias_ptr,  # [E] fp32 or None, as all that follow where there is no norm
    residual_ptr,  # [T, E]
    weight_ptr,  # [E] fp32
    ln_bias_ptr,  # [E] fp32
    ranges_ptr,  # cu_seqlens [B + 1] or spans [P, 2], int32
    out_ptr,  # [N, E] fp32
    out_rows_ptr,  # [B] or [P] int32, or None
    partial_ptr,  # [2, slices, E] fp32: first slices, later slices; None: no segment is long
    owner_ptr,  # [slices] int32: the segment whose last slice starts in the window, or -1
    segments,
    groups,  # programs for short segments
    windows,  # programs for longer segments, as many as slices after them
    slices,
    skip,
    eps,
    x_stride: tl.constexpr,
    out_stride: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    POOLING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SPANS: tl.constexpr,
    RMS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < groups:
        _pool_short(
            x_ptr, bias_ptr, residual_ptr, weight_ptr, ln_bias_ptr, ranges_ptr, out_ptr,
            out_rows_ptr, program, segments, skip, eps, x_stride, out_stride,
            E, CHUNK, ROWS, UNROLL, POOLING, NORMALIZE, SPANS, RMS,
        )  # fmt: skip
    elif partial_ptr is not None:
        _pool_long(
            x_ptr, bias_ptr, residual_ptr, weight_ptr, ln_bias_ptr, ranges_ptr, out_ptr,
            out_rows_ptr, partial_ptr, owner_ptr, program - groups, segments, windows, slices,
            skip, eps, x_stride, out_stride,
            E, CHUNK, ROWS, UNROLL, POOLING, NORMALIZE, SPANS, RMS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["slices", "skip"])
def _join_kernel(
    partial_ptr,  # [2, slices, E] fp32
    owner_ptr,  # [slices] int32
    weight_ptr,  # [E] fp32 or None, as the next
    ln_bias_ptr,  # [E] fp32
    cu_ptr,  # [B + 1] int32
    out_ptr,  # [N, E] fp32
    out_rows_ptr,  # [B] int32 or None
    slices,
    skip,
    out_stride: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    POOLING: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    segment = tl.load(owner_ptr + tl.program_id(0))
    if segment >= 0:
        start, end = token_range(cu_ptr, segment, segment >= 0, False)
        first, kept = kept_tokens(start, end, skip, POOLING)
        lanes = tl.arange(0, ROWS)
        later = (kept - 1) // SLICE
        total = walk(
            partial_ptr, E, None, None, None, None, 0.0,
            slices + first // SLICE + 1 + lanes, ROWS,
            tl.maximum((later - lanes + ROWS - 1) // ROWS, 0), lanes,
            E, CHUNK, ROWS, UNROLL, POOLING if POOLING == MAX else 0, False,
        )  # fmt: skip
        one = tl.zeros((1,), tl.int32)
        head = load_rows(partial_ptr, one + first // SLICE * E, one == 0, E, CHUNK)
        total = merge(head, merge_rows(total, POOLING), POOLING)
        finish(
            total, weight_ptr, ln_bias_ptr, one + kept, one + (first - start),
            out_ptr, out_rows_ptr, one + segment, one == 0, out_stride,
            E, CHUNK, 1, POOLING, NORMALIZE,
        )  # fmt: skip


def config(E: int, dtype: torch.dtype, norm: bool) -> dict[str, int]:
    """Constants of the first kernel for rows of E columns."""
    tile = row_tile(E, dtype)
    unroll = 4 if dtype.itemsize == 2 else 2
    constants = {"CHUNK": tile.chunk, "ROWS": tile.rows, "UNROLL": unroll, "num_warps": WARPS}
    if norm:
        constants["UNROLL"] = unroll // 2
        # Left to itself, the assembler stops at 128 registers and spills what is over.
        constants["maxnreg"] = 255
    return constants


def join_config(E: int) -> dict[str, int]:
    """Constants of the second kernel for rows of E columns."""
    tile = row_tile(E, torch.float32)
    return {"CHUNK": tile.chunk, "ROWS": tile.rows, "UNROLL": 2, "num_warps": WARPS}


def pool(
    x: Tensor,
    norm: Norm | None,
    cu_seqlens: Tensor,
    pooling: int,
    normalize: bool,
    skip: int,
    spans: Tensor | None,
    out: Tensor,
    out_rows: Tensor | None,
) -> None:
    """Pool segments of `x`, or of its norm, into rows of `out`.

    Args:
        x: `[T, E]` fp16, bf16 or fp32, unit inner stride; E up to 4096.
        norm: what to apply first, its residual `[T, E]` and contiguous; or None.
        cu_seqlens: int32 `[B + 1]`.
        pooling, normalize, skip: as in the op.
        spans: int32 `[P, 2]` or None.
        out: fp32 `[N, E]`, unit inner stride.
        out_rows: int32 `[B]` or `[P]`, or None: row i.

    Raises:
        ValueError: E is over 4096.
    """
    T, E = x.shape
    segments = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    constants = config(E, x.dtype, norm is not None)
    if segments == 0:
        return
    groups = triton.cdiv(segments, constants["ROWS"])
    windows = slices = 0
    partial = owner = None
    if pooling not in (CLS.value, LAST_TOKEN.value) and T >= SHORT.value:
        windows = segments if spans is not None else triton.cdiv(T, SHORT.value)
        if spans is None and T > SLICE.value:
            slices = triton.cdiv(T, SLICE.value)
        partial = x.new_empty((2, slices, E), dtype=torch.float32)
        owner = x.new_empty((slices,), dtype=torch.int32)
    bias, residual, weight, ln_bias, eps, rms = norm or (None, None, None, None, 0.0, False)
    modes: dict[str, Any] = {"POOLING": pooling, "NORMALIZE": normalize, "E": E}
    _pool_kernel[(groups + windows + slices,)](
        x, bias, residual, weight, ln_bias, cu_seqlens if spans is None else spans, out, out_rows,
        partial, owner, segments, groups, windows, slices, skip, eps, x.stride(0), out.stride(0),
        SPANS=spans is not None, RMS=rms, **modes, **constants,
    )  # fmt: skip
    if slices:
        _join_kernel[(slices,)](
            partial, owner, weight, ln_bias, cu_seqlens, out, out_rows, slices, skip,
            out.stride(0), **modes, **join_config(E),
        )  # fmt: skip
