"""The ops that work on rows: embeddings, norms, activations. Conventions: :mod:`sbert_fast.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from sbert_fast.ops import contracts, validation
from sbert_fast.ops.dispatch import run


def embed_norm(
    ids: Tensor,
    positions: Tensor | None,
    types: Tensor | None,
    word: Tensor,
    position_table: Tensor | None,
    type_table: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """`LayerNorm(word[ids] + position_table[positions] + type_table[types])`.

    Args:
        ids: int32 `[T]`, rows of `word`.
        positions: int32 `[T]`, rows of `position_table`; None without one.
        types: int32 `[T]`, rows of `type_table`; None with a table means type 0 everywhere.
        word: `[V, E]`, activations; E >= 1.
        position_table: `[P, E]`, dtype of `word`; or None.
        type_table: `[N, E]`, N >= 1, dtype of `word`; or None.
        weight: fp32 `[E]`, factor of the LayerNorm; None leaves the sum as it is.
        bias: fp32 `[E]`, added by the LayerNorm, or None.
        eps: finite, at least 0, added to the variance.
        rms: bool, RMSNorm instead of LayerNorm.
        out_dtype: dtype of the result: that of `word` (the default), or with float32 tables also
            bfloat16 or float16.
        impl: see :mod:`sbert_fast.ops`.

    Returns:
        `[T, E]` in `out_dtype`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.

    Numerics:
        fp32 sum and statistics, two passes (mean, then centred variance); one rounding.

    Source:
        The embeddings of BERT, arXiv:1810.04805; LayerNorm: Ba et al., arXiv:1607.06450; RMSNorm:
        Zhang and Sennrich, arXiv:1910.07467.
    """
    contracts.embedding(ids, positions, types, word, position_table, type_table)
    weight, bias, eps = contracts.embedding_norm(weight, bias, eps, rms, word)
    out_dtype = contracts.embedding_dtype(out_dtype, word)
    tables = {"position_table": position_table, "weight": weight}
    needs = tuple(f"without {name}" for name, tensor in tables.items() if tensor is None)
    args = ids, positions, types, word, position_table, type_table, weight, bias, eps, out_dtype
    return run("embed_norm", out_dtype, impl, args, {"rms": rms}, needs, width=word.shape[1])


def add_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    return_sum: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`LayerNorm(x + bias + residual)`, and the sum itself where it is asked for.

    Args:
        x: `[T, E]`, activations; E >= 1.
        bias: fp32 `[E]` of the linear that made `x`, or None.
        residual: `[T, E]`, dtype of `x`, or None.
        weight: fp32 `[E]`, factor of the LayerNorm.
        ln_bias: fp32 `[E]`, added by the LayerNorm, or None.
        eps: finite, at least 0, added to the variance.
        rms: bool, RMSNorm instead of LayerNorm.
        return_sum: bool, return the sum too (pre-norm layers need it).
        impl: see :mod:`sbert_fast.ops`.

    Returns:
        `[T, E]` in the dtype of `x`; with `return_sum` two of them, the norm and the sum.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.

    Numerics:
        fp32 sum and statistics, two passes; one rounding of each result.

    Source:
        Ba et al., arXiv:1607.06450; RMSNorm: Zhang and Sennrich, arXiv:1910.07467.
    """
    ln_bias, eps = contracts.norm(x, bias, residual, weight, ln_bias, eps, rms)
    validation.flag("return_sum", return_sum)
    args = x, bias, residual, weight, ln_bias, eps
    op = "add_norm_sum" if return_sum else "add_norm"
    return run(op, x.dtype, impl, args, {"rms": rms}, width=x.shape[1])


def bias_gelu(x: Tensor, bias: Tensor | None, *, tanh: bool = False, impl: str = "auto") -> Tensor:
    """`gelu(x + bias)`: the exact erf form, or the tanh approximation where a model asks for it.

    Args:
        x: `[T, F]`, activations; F >= 1.
        bias: fp32 `[F]` or None.
        tanh: bool, the tanh approximation (`gelu_new`, `gelu_pytorch_tanh`) instead of erf.
        impl: see :mod:`sbert_fast.ops`.

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


def gated_activation(
    x: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "gelu",
    first: bool = True,
    impl: str = "auto",
) -> Tensor:
    """`f(a) * b`, `a` and `b` being the halves of the columns of `x + bias`: GeGLU, SwiGLU.

    Args:
        x: `[T, 2F]`, activations; F >= 1.
        bias: fp32 `[2F]` or None.
        activation: f: "gelu" (erf), "gelu_tanh" or "silu".
        first: bool, `a` is the first half (ModernBERT); otherwise the second (GTE).
        impl: see :mod:`sbert_fast.ops`.

    Returns:
        `[T, F]` in the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.

    Numerics:
        evaluated in fp32; one rounding.

    Source:
        Shazeer, arXiv:2002.05202.
    """
    validation.activations("x", x, ("T", "2F"))
    width = validation.columns("x", x)
    if width % 2:
        raise ValueError(f"x must have an even number of columns 2F, got {width}")
    if bias is not None:
        validation.parameter("bias", bias, (width,), x)
    validation.flag("first", first)
    args = x, bias, contracts.activation(activation), first
    return run("gated_activation", x.dtype, impl, args, width=width // 2)
