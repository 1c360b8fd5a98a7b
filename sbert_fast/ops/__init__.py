"""The ops of a packed BERT-family encoder: one contract, several implementations.

Dims: `B` sequences, `T` packed tokens, `H` heads, `D` head dim, `E` hidden, `F` FFN width.
`cu_seqlens`, everywhere: contiguous int32 `[B + 1]` on the op's device; it starts at 0, never
decreases, may repeat (empty sequences) and may end before `T` (a dead tail that reaches no result).

`impl`, everywhere: "auto" picks by device and dtype (:func:`explain_ops` shows the table); a name
runs that implementation or raises :class:`sbert_fast.errors.ImplementationError`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbert_fast.ops import extension, validation
from sbert_fast.ops.dispatch import (
    Kernel,
    bind,
    explain_ops,
    launches,
    rejection,
    reset_launches,
    resolve,
)
from sbert_fast.ops.reference import POOLING_MODES
from sbert_fast.ops.schemas import IMPLEMENTATIONS

__all__ = [
    "IMPLEMENTATIONS",
    "POOLING_MODES",
    "Kernel",
    "add_norm",
    "bias_gelu",
    "bind",
    "embed_norm",
    "explain_ops",
    "extension",
    "launches",
    "norm_pool",
    "rejection",
    "reset_launches",
    "resolve",
    "segment_pool",
    "varlen_attention",
]

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 128


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    tiles: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of every token over the tokens of its own sequence.

    Args:
        qkv: `[T, 3, H, D]`, contiguous, 8 <= D <= 128; fp32 or bf16 (the reference also takes
            fp16 and fp64).
        cu_seqlens: int32 `[B + 1]`, see the module docstring.
        max_seqlen: at least the length of the longest sequence, in tokens.
        scale: factor of the logits; default `D ** -0.5`.
        bias: `[H, 2R + 1]`: `bias[h, clamp(j - i, -R, R) + R]` is added to the scaled logit of
            query i and key j.
        window: keep keys with `|j - i| <= window`, in tokens.
        rotary: `(cos, sin)`, each `[T, D/2]`, applied to q and k.
        tiles: int32 `[n, 4]` of :func:`sbert_fast.packing.plan_tiles`: a scheduling hint.
        impl: see the module docstring.

    Returns:
        `[T, H, D]` in the dtype of `qkv`; zeros in the dead tail.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Numerics:
        fp32 logits, softmax and accumulation (fp64 for fp64); one rounding at the end. On CPUs with
        bf16 dot products, bf16 inputs stay bf16 there: softmax weights are rounded to bf16 too.
    """
    validation.activations("qkv", qkv, ("T", 3, "H", "D"))
    tokens, _, heads, dim = qkv.shape
    if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"qkv must have a head dim D from 8 to 128, got {dim}")
    validation.integers("cu_seqlens", cu_seqlens, ("B + 1",), qkv.device)
    validation.cu_seqlens_values(cu_seqlens, tokens, max_seqlen)
    if bias is not None:
        bias = validation.parameter("bias", bias, (heads, "2R + 1"), qkv.device)
        if bias.shape[1] % 2 == 0:
            raise ValueError(f"bias must have an odd width 2R + 1, got {bias.shape[1]}")
    if window is not None and window < 0:
        raise ValueError(f"window must be None or at least 0, got {window}")
    cos = sin = None
    if rotary is not None:
        if dim % 2:
            raise ValueError(f"rotary needs an even head dim D, got {dim}")
        cos = validation.parameter("rotary[0]", rotary[0], (tokens, dim // 2), qkv.device)
        sin = validation.parameter("rotary[1]", rotary[1], (tokens, dim // 2), qkv.device)
    if tiles is not None:
        validation.integers("tiles", tiles, ("n", 4), qkv.device)
    kernel = bind("varlen_attention", qkv.device, qkv.dtype, impl)
    scale = dim**-0.5 if scale is None else float(scale)
    reach = -1 if window is None else window
    return kernel(qkv, cu_seqlens, max_seqlen, scale, bias, reach, cos, sin, tiles)


def embed_norm(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor,
    position_table: Tensor,
    type_table: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """`LayerNorm(word[ids] + position_table[positions] + type_table[types])`.

    Args:
        ids, positions: int32 `[T]`, inside their tables.
        types: int32 `[T]`; None with a table means type 0 everywhere.
        word: `[V, E]`, contiguous, fp32 or bf16.
        position_table: `[P, E]`, dtype of `word`.
        type_table: `[N, E]` or None, dtype of `word`.
        weight, bias: LayerNorm parameters `[E]`.
        eps: LayerNorm epsilon.
        out_dtype: dtype of the result; default that of `word`.
        impl: see the module docstring.

    Returns:
        `[T, E]` in `out_dtype`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Numerics:
        fp32 sum and statistics, two passes (mean, then centred variance); one rounding.
    """
    validation.activations("word", word, ("V", "E"))
    width = word.shape[1]
    validation.integers("ids", ids, ("T",), word.device)
    validation.integers("positions", positions, (ids.shape[0],), word.device)
    for name, table in (("position_table", position_table), ("type_table", type_table)):
        if table is not None:
            validation.activations(name, table, ("N", width))
            validation.dtype(name, table, (word.dtype,))
            validation.device(name, table, word.device)
    if types is not None:
        if type_table is None:
            raise ValueError("types was given without type_table: pass both or neither")
        validation.integers("types", types, (ids.shape[0],), word.device)
    weight = validation.parameter("weight", weight, (width,), word.device)
    bias = validation.parameter("bias", bias, (width,), word.device)
    out_dtype = out_dtype or word.dtype
    kernel = bind("embed_norm", word.device, out_dtype, impl)
    return kernel(
        ids, positions, types, word, position_table, type_table, weight, bias, eps, out_dtype
    )


def add_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    impl: str = "auto",
) -> Tensor:
    """`LayerNorm(x + bias + residual)`.

    Args:
        x: `[T, E]`, contiguous.
        bias: `[E]` of the linear that made `x`, or None.
        residual: `[T, E]`, dtype of `x`, or None.
        weight, ln_bias: LayerNorm parameters `[E]`.
        eps: LayerNorm epsilon.
        impl: see the module docstring.

    Returns:
        `[T, E]` in the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Numerics:
        fp32 sum and statistics, two passes; one rounding.
    """
    bias, weight, ln_bias = validation.norm(x, bias, residual, weight, ln_bias)
    return bind("add_norm", x.device, x.dtype, impl)(x, bias, residual, weight, ln_bias, eps)


def bias_gelu(x: Tensor, bias: Tensor | None, *, tanh: bool = False, impl: str = "auto") -> Tensor:
    """`gelu(x + bias)`: the exact erf form, or the tanh approximation where a model asks for it.

    Args:
        x: `[T, F]`, contiguous.
        bias: `[F]` or None.
        tanh: the tanh approximation (`gelu_new`, `gelu_pytorch_tanh`) instead of erf.
        impl: see the module docstring.

    Returns:
        `[T, F]` in the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Numerics:
        evaluated in fp32; one rounding.
    """
    validation.activations("x", x, ("T", "F"))
    if bias is not None:
        bias = validation.parameter("bias", bias, (x.shape[1],), x.device)
    return bind("bias_gelu", x.device, x.dtype, impl)(x, bias, tanh)


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
        x: `[T, E]`, unit inner stride.
        cu_seqlens: int32 `[B + 1]`, see the module docstring.
        mode: "mean", "cls", "max", "mean_sqrt_len", "weighted_mean" (weight = position + 1) or
            "last_token".
        normalize: divide each row by `max(its L2 norm, 1e-12)`.
        skip: leading tokens left out of pooling (a prompt), at least 0; see DESIGN.md for the
            sequences that are no longer than that.
        spans: int32 `[P, 2]`: pool the packed ranges `[start, end)` instead of whole sequences.
        out: fp32 `[N, E]`, unit inner stride, written in place and returned.
        out_rows: int32 `[B]` (or `[P]`): row i of the result goes to `out[out_rows[i]]`.
        impl: see the module docstring.

    Returns:
        `[B, E]` fp32 (`[P, E]` with `spans`), or `out`. Empty sequences give zeros.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Numerics:
        fp32 accumulation in an order fixed by the length of the sequence, no atomics.
    """
    validation.shape("x", x, ("T", "E"))
    validation.dtype("x", x, validation.FLOATS)
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x must have a unit inner stride, got strides {x.stride()}")
    code = validation.pooling(x, cu_seqlens, mode, skip, spans)
    validation.pooled_rows("segment_pool", x, cu_seqlens, spans, out, out_rows)
    how = code, normalize, skip, spans
    if out is None:
        return bind("segment_pool", x.device, x.dtype, impl)(x, cu_seqlens, *how)
    bind("segment_pool_out", x.device, x.dtype, impl)(x, cu_seqlens, *how, out, out_rows)
    return out


def norm_pool(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
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
    """`segment_pool(add_norm(x, bias, residual, ...))`, for the last layer of a model.

    Args:
        x: `[T, E]`, contiguous.
        bias, residual, weight, ln_bias, eps: as in :func:`add_norm`.
        cu_seqlens: int32 `[B + 1]`, see the module docstring.
        mode, normalize, skip, spans, out, out_rows: as in :func:`segment_pool`.
        impl: see the module docstring.

    Returns:
        `[B, E]` fp32 (`[P, E]` with `spans`), or `out`. Empty sequences give zeros.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.

    Numerics:
        as both; the normalised tokens are rounded to the dtype of `x` on a CPU only, where they
        are stored.
    """
    bias, weight, ln_bias = validation.norm(x, bias, residual, weight, ln_bias)
    code = validation.pooling(x, cu_seqlens, mode, skip, spans)
    validation.pooled_rows("norm_pool", x, cu_seqlens, spans, out, out_rows)
    norm = bias, residual, weight, ln_bias, eps
    how = code, normalize, skip, spans
    if out is None:
        return bind("norm_pool", x.device, x.dtype, impl)(x, *norm, cu_seqlens, *how)
    validation.no_grad("norm_pool", residual, bias, weight, ln_bias)
    kernel = bind("norm_pool_out", x.device, x.dtype, impl)
    kernel(x, *norm, cu_seqlens, *how, out, out_rows)
    return out
