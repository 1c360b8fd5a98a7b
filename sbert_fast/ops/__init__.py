"""The ops of a packed BERT-family encoder: one contract, several implementations.

Dims: `B` sequences, `T` packed tokens, `H` heads, `D` head dim, `E` hidden, `F` FFN width.
Tensors are dense, contiguous unless said otherwise, and all of a call on one device.

Activations are float32, bfloat16 or float16, or float64, which only the reference takes (as
float16 on a CPU). Parameters are float32 whatever the activations are (beside float64 ones, also
float64). Indices and offsets are int32.

`cu_seqlens`, everywhere: contiguous int32 `[B + 1]` on the op's device; it starts at 0, never
decreases, may repeat (empty sequences) and may end before `T` (a dead tail that reaches no result).

`impl`, everywhere: "auto" picks by device and dtype (:func:`explain_ops` shows the table), a CUDA
kernel only where it takes the sizes, options and addresses of the call; a name runs that
implementation or raises :class:`sbert_fast.errors.ImplementationError`.

Errors, everywhere: the message names the argument, what was expected and what came, and nothing
has been computed or written. TypeError: a wrong type or dtype. ValueError: a wrong shape, device,
layout or value, or an `impl` that does not exist. The values of int32 tensors are checked on a CPU;
on CUDA that would wait for the GPU, and only `SBERT_FAST_DEBUG=1` does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbert_fast.ops import contracts, extension, validation
from sbert_fast.ops.dispatch import (
    Kernel,
    bind,
    explain_ops,
    launches,
    rejection,
    requested,
    reset_launches,
    resolve,
    run,
)
from sbert_fast.ops.pool import norm_pool, segment_pool
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
    "requested",
    "reset_launches",
    "resolve",
    "segment_pool",
    "varlen_attention",
]


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
        qkv: `[T, 3, H, D]`, activations; H >= 1, 8 <= D <= 128.
        cu_seqlens: int32 `[B + 1]`, in tokens, see the module docstring.
        max_seqlen: int (in a graph, SymInt), at least the longest sequence, in tokens.
        scale: finite factor of the logits; default `D ** -0.5`.
        bias: fp32 `[H, 2R + 1]`: `bias[h, clamp(j - i, -R, R) + R]` is added to the scaled logit of
            query i and key j.
        window: int >= 0: keep keys with `|j - i| <= window`, in tokens. None keeps all.
        rotary: `(cos, sin)`, each fp32 `[T, D/2]`, applied to q and k; D is even.
        tiles: int32 `[n, 4]` of :func:`sbert_fast.packing.plan_tiles`, rows in any order: a
            scheduling hint that changes no result.
        impl: see the module docstring.

    Returns:
        `[T, H, D]` in the dtype of `qkv`; zeros in the dead tail.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.

    Numerics:
        fp32 logits, softmax and accumulation (fp64 for fp64); one rounding at the end. On CPUs with
        bf16 dot products, bf16 inputs stay bf16 there: softmax weights are rounded to bf16 too.

    Source:
        Vaswani et al., arXiv:1706.03762; rotary tables: Su et al., arXiv:2104.09864; `bias`: T5,
        arXiv:1910.10683.
    """
    longest = contracts.attention(qkv, cu_seqlens, max_seqlen, tiles)
    scale = qkv.shape[3] ** -0.5 if scale is None else validation.number("scale", scale)
    if bias is not None:
        contracts.relative_bias(bias, qkv)
    reach = -1 if window is None else validation.integer("window", window, 0, optional=True)
    cos, sin = (None, None) if rotary is None else contracts.rotary(rotary, qkv)
    args = qkv, cu_seqlens, longest, scale, bias, reach, cos, sin, tiles
    return run("varlen_attention", qkv.dtype, impl, args, head_dim=qkv.shape[3])


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
        ids: int32 `[T]`, rows of `word`.
        positions: int32 `[T]`, rows of `position_table`.
        types: int32 `[T]`, rows of `type_table`; None with a table means type 0 everywhere.
        word: `[V, E]`, activations; E >= 1.
        position_table: `[P, E]`, dtype of `word`.
        type_table: `[N, E]`, N >= 1, dtype of `word`; or None.
        weight: fp32 `[E]`, factor of the LayerNorm.
        bias: fp32 `[E]`, added by the LayerNorm.
        eps: finite, at least 0, added to the variance.
        out_dtype: dtype of the result: that of `word` (the default), or with float32 tables also
            bfloat16 or float16.
        impl: see the module docstring.

    Returns:
        `[T, E]` in `out_dtype`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.

    Numerics:
        fp32 sum and statistics, two passes (mean, then centred variance); one rounding.

    Source:
        The embeddings of BERT, arXiv:1810.04805; LayerNorm: Ba et al., arXiv:1607.06450.
    """
    contracts.embedding(ids, positions, types, word, position_table, type_table)
    validation.parameter("weight", weight, (word.shape[1],), word)
    validation.parameter("bias", bias, (word.shape[1],), word)
    eps = validation.number("eps", eps, 0)
    out_dtype = contracts.embedding_dtype(out_dtype, word)
    tables = word, position_table, type_table
    args = ids, positions, types, *tables, weight, bias, eps, out_dtype
    return run("embed_norm", out_dtype, impl, args, width=word.shape[1])


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
        x: `[T, E]`, activations; E >= 1.
        bias: fp32 `[E]` of the linear that made `x`, or None.
        residual: `[T, E]`, dtype of `x`, or None.
        weight: fp32 `[E]`, factor of the LayerNorm.
        ln_bias: fp32 `[E]`, added by the LayerNorm.
        eps: finite, at least 0, added to the variance.
        impl: see the module docstring.

    Returns:
        `[T, E]` in the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.

    Numerics:
        fp32 sum and statistics, two passes; one rounding.

    Source:
        Ba et al., arXiv:1607.06450.
    """
    eps = contracts.norm(x, bias, residual, weight, ln_bias, eps)
    args = x, bias, residual, weight, ln_bias, eps
    return run("add_norm", x.dtype, impl, args, width=x.shape[1])


def bias_gelu(x: Tensor, bias: Tensor | None, *, tanh: bool = False, impl: str = "auto") -> Tensor:
    """`gelu(x + bias)`: the exact erf form, or the tanh approximation where a model asks for it.

    Args:
        x: `[T, F]`, activations; F >= 1.
        bias: fp32 `[F]` or None.
        tanh: bool, the tanh approximation (`gelu_new`, `gelu_pytorch_tanh`) instead of erf.
        impl: see the module docstring.

    Returns:
        `[T, F]` in the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.

    Numerics:
        evaluated in fp32; one rounding.

    Source:
        Hendrycks and Gimpel, arXiv:1606.08415.
    """
    validation.activations("x", x, ("T", "F"))
    width = validation.columns("x", x)
    if bias is not None:
        validation.parameter("bias", bias, (width,), x)
    validation.flag("tanh", tanh)
    return run("bias_gelu", x.dtype, impl, (x, bias, tanh), width=width)
