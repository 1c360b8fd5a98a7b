"""Numerical policy of the tests: one oracle, one peer, one bound.

An implementation passes when `max|out - oracle| <= 2 * (max|peer - oracle| + eps * max|oracle|)`,
the oracle being the reference in fp64 and the peer the same formula in plain torch in the tested
dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_fast.ops import panels as panel_layout
from sbert_fast.ops import reference
from sbert_fast.ops.dropout import drop


def assert_close_to_oracle(
    out: Tensor, oracle: Tensor, peer: Tensor, eps_dtype: torch.dtype
) -> None:
    """The 2x rule.

    Args:
        out: the result under test.
        oracle: the same result in fp64.
        peer: the same result by plain torch in the tested dtype.
        eps_dtype: dtype whose machine epsilon makes the rounding band.

    Raises:
        AssertionError: with the figures and the coordinate of the worst element.
    """
    assert out.shape == oracle.shape, f"shape {tuple(out.shape)} != {tuple(oracle.shape)}"
    assert torch.isfinite(out).all(), "the result holds NaN or infinity"
    if out.numel() == 0:
        return
    error = (out.double() - oracle.double()).abs()
    band = torch.finfo(eps_dtype).eps * oracle.abs().max().item()
    bound = 2 * ((peer.double() - oracle.double()).abs().max().item() + band)
    worst = error.max().item()
    at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), tuple(error.shape)))
    assert worst <= bound, f"error {worst:.3e} at {at} is over the bound {bound:.3e}"


def to_fp64(args: Sequence[Any]) -> list[Any]:
    """The floating tensors of `args` in fp64, everything else as it is."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def oracle(op: str, *args: Any) -> Any:
    """The reference of `op` evaluated in fp64 on the schema's arguments."""
    args64 = to_fp64(args)
    if op == "embed_norm":
        args64[9] = torch.float64
    return getattr(reference, op)(*args64)


def peer_varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    tiles: Tensor | None,
    causal: bool = False,
    kv_heads: int = 0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    position_keys: Tensor | None = None,
    position_queries: Tensor | None = None,
    buckets: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention as plain torch does it in the dtype of `qkv`, sequence by sequence."""
    q, k, v = reference._heads(qkv, kv_heads)
    if query_norm is not None and key_norm is not None:
        q, k = (
            F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), norm_eps)
            for x, weight in ((q, query_norm), (k, key_norm))
        )
    if rotary_cos is not None and rotary_sin is not None:
        q = reference._rotate(q, rotary_cos, rotary_sin)
        k = reference._rotate(k, rotary_cos, rotary_sin)
    out = qkv.new_zeros(q.shape)
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if end == start:
            continue
        qs, ks, vs = (t[start:end].transpose(0, 1) for t in (q, k, v))
        positions = torch.arange(end - start)
        distance = positions[None] - positions[:, None]
        scores = qs @ ks.mT
        if buckets is not None:
            tables = position_keys, position_queries
            scores = reference._disentangle(scores, qs, ks.mT, distance, tables, buckets)
        scores = scores * scale
        scores = scores + reference._distance_terms(distance, bias, window, causal, qkv.dtype)
        weights = torch.softmax(scores, dim=-1)
        weights = drop(weights[None], dropout, seed, torch.arange(start, end)[None])[0]
        out[start:end] = (weights @ vs).transpose(0, 1)
    return out


def peer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, rms: bool = False) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if rms:
        return F.rms_norm(x, x.shape[-1:], weight, eps) + bias
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def peer_embed_norm(
    ids: Tensor,
    positions: Tensor | None,
    types: Tensor | None,
    word: Tensor,
    position_table: Tensor | None,
    type_table: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    rms: bool = False,
) -> Tensor:
    x = F.embedding(ids, word.to(out_dtype))
    if positions is not None and position_table is not None:
        x = x + F.embedding(positions, position_table.to(out_dtype))
    if type_table is not None:
        table = type_table.to(out_dtype)
        x = x + (table[0] if types is None else F.embedding(types, table))
    return x if weight is None or bias is None else peer_norm(x, weight, bias, eps, rms=rms)


def peer_add_norm(x: Tensor, *args: Any) -> Tensor:
    return peer_add_norm_sum(x, *args)[0]


def peer_add_norm_sum(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    for term in (bias, residual):
        x = x if term is None else x + term.to(x.dtype)
    return peer_norm(x, weight, ln_bias, eps, rms=rms), x


def peer_bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    x = x if bias is None else x + bias.to(x.dtype)
    return F.gelu(x, approximate="tanh" if tanh else "none")


def peer_gated_activation(x: Tensor, bias: Tensor | None, activation: int, first: bool) -> Tensor:
    x = x if bias is None else x + bias.to(x.dtype)
    a, b = x.chunk(2, dim=1) if first else reversed(x.chunk(2, dim=1))
    return reference._activate(a, activation) * b


def peer_linear(
    x: Tensor, panels: Tensor, bias: Tensor | None, features: int, activation: int, gated: bool
) -> Tensor:
    if gated:
        y = peer_linear(x, panels, bias, panel_layout.gated_columns(features), 0, False)
        return peer_gated_activation(panel_layout.separated(y, features), None, activation, True)
    bias = None if bias is None else bias.to(x.dtype)
    if panels.dtype == torch.int8:
        y = panel_layout.multiply_int8(x.float(), panels, features).to(x.dtype)
        y = y if bias is None else y + bias
    elif panel_layout.is_split(panels, x.shape[1]):
        y = peer_split(x, *panel_layout.unpack_split(panels, features))
        y = y if bias is None else y + bias
    else:
        y = F.linear(x, panel_layout.unpack(panels, features), bias)
    return reference._activate(y, activation)


def peer_split(x: Tensor, greater: Tensor, lesser: Tensor) -> Tensor:
    """The three products that torch documents for `high` precision of float32."""
    x_greater, x_lesser = (part.float() for part in panel_layout.split(x))
    y = F.linear(x_greater, lesser.float()) + F.linear(x_lesser, greater.float())
    return F.linear(x_greater, greater.float()) + y


def peer_linear_norm(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
) -> Tensor:
    y = peer_linear(x, panels, bias, residual.shape[1], 0, False)
    return peer_add_norm(y, None, residual, weight, ln_bias, eps)


def peer_segment_pool(
    x: Tensor, cu_seqlens: Tensor, mode: int, normalize: bool, skip: int, spans: Tensor | None
) -> Tensor:
    """The reference in fp32: pooling returns fp32 whatever the activations are."""
    return reference.segment_pool(x.float(), cu_seqlens, mode, normalize, skip, spans)


def peer_norm_pool(x: Tensor, *args: Any) -> Tensor:
    """The norm in the dtype of `x`, pooled in fp32."""
    return peer_segment_pool(peer_add_norm(x, *args[:5], *args[10:]), *args[5:10])


PEERS: dict[str, Callable[..., Any]] = {
    "varlen_attention": peer_varlen_attention,
    "embed_norm": peer_embed_norm,
    "add_norm": peer_add_norm,
    "add_norm_sum": peer_add_norm_sum,
    "bias_gelu": peer_bias_gelu,
    "gated_activation": peer_gated_activation,
    "linear": peer_linear,
    "linear_norm": peer_linear_norm,
    "segment_pool": peer_segment_pool,
    "norm_pool": peer_norm_pool,
}


def check_op(op: str, out: Any, args: Sequence[Any], eps_dtype: torch.dtype) -> None:
    """Compare `out` of `op` on the schema's `args` with the oracle by the 2x rule."""
    results: list[Any] = [out, oracle(op, *args), PEERS[op](*args)]
    if isinstance(out, Tensor):
        results = [(result,) for result in results]
    for ours, expected, peer in zip(*results, strict=True):
        assert_close_to_oracle(ours, expected, peer, eps_dtype)


def pack_lengths(lengths: Sequence[int]) -> Tensor:
    """`cu_seqlens` int32 `[B + 1]` of the given lengths."""
    return torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], dtype=torch.int32)


def worst_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest cosine between matching rows of two `[N, E]` arrays, in fp64."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    return float(((a64 * b64).sum(1) / norms).min())
