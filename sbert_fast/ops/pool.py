"""The ops that end an encoder: one vector for each sequence. Conventions: :mod:`sbert_fast.ops`."""

from __future__ import annotations

from torch import Tensor

from sbert_fast.ops import contracts, validation
from sbert_fast.ops.dispatch import run


def segment_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    mode: str = "mean",
    normalize: bool = True,
    skip: int = 0,
    spans: Tensor | None = None,
    out: Tensor | None = None,
    out_rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Pool the tokens of each sequence into one vector, and L2-normalise it.

    Args:
        x: `[T, E]`, activations, unit inner stride; E >= 1.
        cu_seqlens: int32 `[B + 1]`, in tokens, see :mod:`sbert_fast.ops`.
        mode: "mean", "cls", "max", "mean_sqrt_len", "weighted_mean" (weight = position + 1) or
            "last_token".
        normalize: bool, divide each row by `max(its L2 norm, 1e-12)`.
        skip: int >= 0, leading tokens left out of pooling (a prompt); see DESIGN.md for the
            sequences that are no longer than that.
        spans: int32 `[P, 2]`: pool the ranges `[start, end)` of packed tokens instead of whole
            sequences; 0 <= start <= end <= `cu_seqlens[B]`.
        out: fp32 `[N, E]`, unit inner stride, rows that do not overlap; must not overlap the
            inputs; written in place and returned.
        out_rows: int32 `[B]` (`[P]` with `spans`), distinct rows of `out`: row i of the result
            goes to `out[out_rows[i]]`. None: to `out[i]`.
        impl: see :mod:`sbert_fast.ops`.

    Returns:
        `[B, E]` fp32 (`[P, E]` with `spans`; fp64 for fp64), or `out`. Empty sequences give zeros.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.
        NotImplementedError: `out` would lose the gradient of an input.

    Numerics:
        fp32 accumulation in an order fixed by the length of the sequence, no atomics.

    Source:
        The modules Pooling and Normalize of sentence-transformers; Reimers and Gurevych,
        arXiv:1908.10084.
    """
    validation.shape("x", x, ("T", "E"))
    validation.dtype("x", x, validation.FLOATS)
    if validation.columns("x", x) > 1 and x.stride(1) != 1:
        raise ValueError(f"x must have a unit inner stride, got strides {x.stride()}")
    how = contracts.pooling(x, cu_seqlens, mode, normalize, skip, spans)
    contracts.pooled_rows("segment_pool", x, cu_seqlens, spans, out, out_rows)
    args, width = (x, cu_seqlens, *how), x.shape[1]
    if out is None:
        return run("segment_pool", x.dtype, impl, args, width=width)
    run("segment_pool_out", x.dtype, impl, (*args, out, out_rows), width=width)
    return out


def norm_pool(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
    cu_seqlens: Tensor,
    *,
    rms: bool = False,
    mode: str = "mean",
    normalize: bool = True,
    skip: int = 0,
    spans: Tensor | None = None,
    out: Tensor | None = None,
    out_rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`segment_pool(add_norm(x, bias, residual, ...))`, for the last layer of a model.

    Args:
        x: `[T, E]`, activations; E >= 1.
        bias: fp32 `[E]` of the linear that made `x`, or None.
        residual: `[T, E]`, dtype of `x`, or None.
        weight: fp32 `[E]`, factor of the LayerNorm.
        ln_bias: fp32 `[E]`, added by the LayerNorm, or None.
        eps: finite, at least 0, added to the variance.
        cu_seqlens: int32 `[B + 1]`, in tokens, see :mod:`sbert_fast.ops`.
        rms: bool, RMSNorm instead of LayerNorm.
        mode, normalize, skip, spans, out, out_rows: as in :func:`segment_pool`.
        impl: see :mod:`sbert_fast.ops`.

    Returns:
        As :func:`segment_pool`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.
        NotImplementedError: `out` would lose the gradient of an input.

    Numerics:
        as both; the normalised tokens are rounded to the dtype of `x` on a CPU only, where they
        are stored.

    Source:
        As :func:`segment_pool` and :func:`sbert_fast.ops.add_norm`.
    """
    ln_bias, eps = contracts.norm(x, bias, residual, weight, ln_bias, eps, rms)
    how = contracts.pooling(x, cu_seqlens, mode, normalize, skip, spans)
    contracts.pooled_rows("norm_pool", x, cu_seqlens, spans, out, out_rows, residual)
    args, width = (x, bias, residual, weight, ln_bias, eps, cu_seqlens, *how), x.shape[1]
    if out is None:
        return run("norm_pool", x.dtype, impl, args, {"rms": rms}, width=width)
    contracts.no_grad("norm_pool", residual, bias, weight, ln_bias)
    run("norm_pool_out", x.dtype, impl, (*args, out, out_rows), {"rms": rms}, width=width)
    return out
