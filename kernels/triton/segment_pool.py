"""Pooling of every sequence into one fp32 row, L2 and the scatter to its place included."""

from __future__ import annotations

import torch
from torch import Tensor

from sbert_fast.kernels.pooling import pool


def segment_pool(
    x: Tensor, cu_seqlens: Tensor, pooling: int, normalize: bool, skip: int, spans: Tensor | None
) -> Tensor:
    """Pool the tokens of each sequence; see :func:`sbert_fast.ops.segment_pool`.

    Args:
        x: `[T, E]` fp16, bf16 or fp32, unit inner stride; E up to 4096.
        cu_seqlens: int32 `[B + 1]`.
        pooling: position of the mode in `POOLING_MODES`.
        normalize: L2-normalise each row.
        skip: leading tokens left out.
        spans: int32 `[P, 2]` or None.

    Returns:
        `[B, E]` fp32, `[P, E]` with `spans`.

    Raises:
        ValueError: E is over 4096.
    """
    rows = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    out = x.new_empty((rows, x.shape[1]), dtype=torch.float32)
    pool(x, None, cu_seqlens, pooling, normalize, skip, spans, out, None)
    return out


def segment_pool_out(
    x: Tensor,
    cu_seqlens: Tensor,
    pooling: int,
    normalize: bool,
    skip: int,
    spans: Tensor | None,
    out: Tensor,
    out_rows: Tensor | None,
) -> None:
    """:func:`segment_pool` into rows `out_rows` (int32 `[B]` or `[P]`; None: the first ones) of
    `out`, fp32 `[N, E]` with unit inner stride."""
    pool(x, None, cu_seqlens, pooling, normalize, skip, spans, out, out_rows)
