"""Plain-torch reference of every op: the specification, and the oracle of the tests in fp64.

Every function takes the arguments of the op schema in :mod:`sbert_fast.ops.schemas` and runs on any
device. Accumulation is fp32, or fp64 for fp64 inputs; results are rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor

# Bound here, as activations of transformers bind theirs: functions that are replaced in torch later
# reach neither.
from torch.nn.functional import embedding, gelu, layer_norm, rms_norm, silu
from torch.nn.functional import normalize as l2_normalize

from sbert_fast.ops import panels as panel_layout
from sbert_fast.ops.dropout import drop

POOLING_MODES = ("mean", "cls", "max", "mean_sqrt_len", "weighted_mean", "last_token")
NORMALIZE_EPS = 1e-12


class Activation(IntEnum):
    """Activation functions; the values are those of the schemas."""

    NONE = 0
    GELU = 1
    GELU_TANH = 2
    SILU = 3


_Tables = tuple[Tensor | None, Tensor | None]  # position_keys and position_queries
# Scores held at once by attention, in elements: bounds memory, changes no result.
_SCORE_BUDGET = 1 << 24


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_by_length(cu_seqlens: Tensor) -> Iterator[Tensor]:
    """Yield, for each distinct sequence length L > 0, the packed rows `[n, L]` of its sequences."""
    cu = cu_seqlens.to(torch.int64)
    lengths = cu[1:] - cu[:-1]
    for length in torch.unique(lengths).tolist():
        if length > 0:
            starts = cu[:-1][lengths == length]
            yield starts[:, None] + torch.arange(length, device=cu.device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary tables `[T, D/2]` to `x` `[T, H, D]`, first half against second half."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def _heads(qkv: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values `[T, H, D]`; consecutive query heads share one of `kv_heads`."""
    if not kv_heads:
        return qkv.unbind(1)
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    return q, *(t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))


def _distance_terms(
    distance: Tensor, bias: Tensor | None, window: int, causal: bool, dtype: torch.dtype
) -> Tensor | float:
    """The terms `[H or 1, Q, L]` that `distance` alone, of keys from queries `[Q, L]`, adds."""
    if bias is None and window < 0 and not causal:
        return 0.0
    terms = torch.zeros(1, *distance.shape, dtype=dtype, device=distance.device)
    if bias is not None:
        reach = bias.shape[1] // 2
        terms = bias.to(dtype)[:, distance.clamp(-reach, reach) + reach]
    if window >= 0:
        terms = terms.masked_fill(distance.abs() > window, float("-inf"))
    return terms.masked_fill(distance > 0, float("-inf")) if causal else terms


def _disentangle(
    scores: Tensor, q: Tensor, keys: Tensor, distance: Tensor, tables: _Tables, buckets: Tensor
) -> Tensor:
    """`scores` of queries and keys, and their products with the rows of tables at each distance."""
    reach = buckets.shape[0] // 2
    rows = buckets.long()[distance.clamp(-reach, reach) + reach].expand_as(scores)
    position_keys, position_queries = tables
    if position_keys is not None:
        scores = scores + (q @ position_keys.to(q.dtype).mT).gather(-1, rows)
    if position_queries is not None:
        scores = scores + (position_queries.to(q.dtype) @ keys).gather(-2, rows)
    return scores


def varlen_attention(
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
    q, k, v = _heads(qkv.to(_accumulator(qkv.dtype)), kv_heads)
    if query_norm is not None and key_norm is not None:
        q, k = (
            rms_norm(part, part.shape[-1:], weight.to(part.dtype), norm_eps)
            for part, weight in ((q, query_norm), (k, key_norm))
        )
    if rotary_cos is not None and rotary_sin is not None:
        q, k = _rotate(q, rotary_cos, rotary_sin), _rotate(k, rotary_cos, rotary_sin)
    out = qkv.new_zeros(q.shape)
    heads, tables = q.shape[1], (position_keys, position_queries)
    width = max(0 if table is None else table.shape[1] for table in tables)
    for rows in _rows_by_length(cu_seqlens):
        length = rows.shape[1]
        block = max(1, min(length, _SCORE_BUDGET // (heads * length)))
        group = max(1, _SCORE_BUDGET // (heads * length * max(block, width)))
        for some in rows.split(group):
            keys, values = k[some].permute(0, 2, 3, 1), v[some].transpose(1, 2)
            for queries in torch.arange(length, device=rows.device).split(block):
                target = some[:, queries]
                distance = torch.arange(length, device=rows.device)[None] - queries[:, None]
                some_q = q[target].transpose(1, 2)
                scores = some_q @ keys  # [n, H, block, L]
                if buckets is not None:
                    scores = _disentangle(scores, some_q, keys, distance, tables, buckets)
                scores = scores * scale + _distance_terms(distance, bias, window, causal, q.dtype)
                weights = drop(torch.softmax(scores, dim=-1), dropout, seed, target)
                result = (weights @ values).transpose(1, 2)
                out[target] = result.to(qkv.dtype)
    return out


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rms: bool) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if rms:
        return rms_norm(x, x.shape[-1:], weight, eps) + bias
    return layer_norm(x, x.shape[-1:], weight, bias, eps)


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
    out_dtype: torch.dtype,
    rms: bool = False,
) -> Tensor:
    dtype = _accumulator(word.dtype)
    x = embedding(ids, word).to(dtype)
    if positions is not None and position_table is not None:
        x = x + embedding(positions, position_table).to(dtype)
    if type_table is not None:
        x = x + (type_table[0] if types is None else embedding(types, type_table)).to(dtype)
    if weight is not None and bias is not None:
        x = _norm(x, weight, bias, eps, rms)
    return x.to(out_dtype)


def add_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    rms: bool = False,
) -> Tensor:
    return _norm(_sum(x, bias, residual), weight, ln_bias, eps, rms).to(x.dtype)


def add_norm_sum(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    total = _sum(x, bias, residual)
    # A result of an op never shares memory with an argument.
    return _norm(total, weight, ln_bias, eps, rms).to(x.dtype), total.to(x.dtype, copy=True)


def _sum(x: Tensor, *terms: Tensor | None) -> Tensor:
    total = x.to(_accumulator(x.dtype))
    for term in terms:
        if term is not None:
            total = total + term.to(total.dtype)
    return total


def _activate(x: Tensor, activation: int) -> Tensor:
    if activation == Activation.NONE:
        return x
    if activation == Activation.SILU:
        return silu(x)
    return gelu(x, approximate="tanh" if activation == Activation.GELU_TANH else "none")


def bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return _activate(_sum(x, bias), Activation.GELU_TANH if tanh else Activation.GELU).to(x.dtype)


def gated_activation(x: Tensor, bias: Tensor | None, activation: int, first: bool) -> Tensor:
    halves = _sum(x, bias).chunk(2, dim=1)
    activated, gate = halves if first else halves[::-1]
    return (_activate(activated, activation) * gate).to(x.dtype)


def linear(
    x: Tensor, panels: Tensor, bias: Tensor | None, features: int, activation: int, gated: bool
) -> Tensor:
    y = _linear(x, panels, bias, panel_layout.gated_columns(features) if gated else features)
    if gated:
        y = panel_layout.separated(y, features)
        return gated_activation(y, None, activation, first=True).to(x.dtype)
    return _activate(y, activation).to(x.dtype)


def linear_norm(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
) -> Tensor:
    y = _linear(x, panels, bias, residual.shape[1]) + residual
    return _norm(y, weight, ln_bias, eps, rms=False).to(x.dtype)


def _linear(x: Tensor, panels: Tensor, bias: Tensor | None, features: int) -> Tensor:
    return _sum(panel_layout.multiply(x.to(_accumulator(x.dtype)), panels, features), bias)


def segment_pool(
    x: Tensor, cu_seqlens: Tensor, pooling: int, normalize: bool, skip: int, spans: Tensor | None
) -> Tensor:
    dtype = _accumulator(x.dtype)
    ranges = torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), dim=1) if spans is None else spans
    out = x.new_zeros((ranges.shape[0], x.shape[1]), dtype=dtype)
    for row, (start, end) in enumerate(ranges.tolist()):
        pooled = _pool_one(x[start:end].to(dtype), POOLING_MODES[pooling], skip)
        if pooled is not None:
            out[row] = pooled
    return l2_normalize(out, dim=1, eps=NORMALIZE_EPS) if normalize else out


def _pool_one(x: Tensor, mode: str, skip: int) -> Tensor | None:
    """Pool one sequence `[L, E]`; None where nothing is left to pool."""
    length = x.shape[0]
    if mode == "cls":
        return None if length == 0 else x[skip if length > skip else 0]
    if length <= skip:
        return None
    if mode == "last_token":
        return x[-1]
    kept = x[skip:]
    if mode == "max":
        return kept.amax(0)
    if mode == "weighted_mean":
        weights = torch.arange(skip + 1, length + 1, device=x.device, dtype=x.dtype)
        return (kept * weights[:, None]).sum(0) / weights.sum()
    count = length - skip
    return kept.sum(0) / (count if mode == "mean" else count**0.5)


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
    _scatter(segment_pool(x, cu_seqlens, pooling, normalize, skip, spans), out, out_rows)


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
    normalized = _norm(_sum(x, bias, residual), weight, ln_bias, eps, rms)
    return segment_pool(normalized, cu_seqlens, pooling, normalize, skip, spans)


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
    args = bias, residual, weight, ln_bias, eps, cu_seqlens, pooling, normalize, skip, spans, rms
    _scatter(norm_pool(x, *args), out, out_rows)


def _scatter(pooled: Tensor, out: Tensor, out_rows: Tensor | None) -> None:
    pooled = pooled.to(out.dtype)
    if out_rows is None:
        out[: pooled.shape[0]] = pooled
    else:
        out[out_rows.to(torch.int64)] = pooled
