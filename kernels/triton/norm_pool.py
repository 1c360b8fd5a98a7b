"""`segment_pool(add_norm(x, bias, residual))` in one pass: the normalised tokens stay in registers.

Numerics: the normalised tokens are pooled in fp32, without the rounding that storing them costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbert_fast.kernels.pooling import Norm, pool


def norm_pool(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    pooling: int,
    normalize: bool,
    skip: int,
    spans: Tensor | None,
    rms: bool = False,
) -> Tensor:
    """Normalise and pool the tokens of each sequence; see :func:`sbert_fast.ops.norm_pool`.

    Args:
        x: `[T, E]` fp16, bf16 or fp32, contiguous; E up to 4096.
        bias: fp32 `[E]` or None.
        residual: `[T, E]`, dtype of `x`, or None.
        weight, ln_bias: fp32 `[E]`.
        eps: added to the variance.
        cu_seqlens: int32 `[B + 1]`.
        pooling: position of the mode in `POOLING_MODES`.
        normalize: L2-normalise each row.
        skip: leading tokens left out.
        spans: int32 `[P, 2]` or None.
        rms: RMSNorm instead of LayerNorm.

    Returns:
        `[B, E]` fp32, `[P, E]` with `spans`.

    Raises:
        ValueError: E is over 4096.
    """
    rows = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    out = x.new_empty((rows, x.shape[1]), dtype=torch.float32)
    norm = Norm(bias, residual, weight, ln_bias, eps, rms)
    pool(x, norm, cu_seqlens, pooling, normalize, skip, spans, out, None)
    return out


def norm_pool_out(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    pooling: int,
    normalize: bool,
    skip: int,
    spans: Tensor | None,
    out: Tensor,
    out_rows: Tensor | None,
    rms: bool = False,
) -> None:
    """:func:`norm_pool` into rows `out_rows` (int32 `[B]` or `[P]`; None: the first ones) of `out`,
    fp32 `[N, E]` with unit inner stride."""
    norm = Norm(bias, residual, weight, ln_bias, eps, rms)
    pool(x, norm, cu_seqlens, pooling, normalize, skip, spans, out, out_rows)
