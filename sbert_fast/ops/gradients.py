"""Plain-torch reference of the ops that compute gradients, written out as formulas.

As in :mod:`sbert_fast.ops.reference`: the arguments of the schemas, any device, accumulation in
fp32 or fp64, one rounding, and sums in an order that depends on nothing but the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_fast.ops import reference
from sbert_fast.ops.dropout import drop

_Rotary = tuple[Tensor | None, Tensor | None]  # rotary_cos and rotary_sin


def varlen_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int,
    causal: bool = False,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    kv_heads: int = 0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, tokens = reference._accumulator(qkv.dtype), int(cu_seqlens[-1])
    heads = grad.shape[1]
    sizes = [heads, kv_heads or heads, kv_heads or heads]
    given = qkv[:tokens].to(dtype).flatten(1, -2).split(sizes, dim=1)
    cos, sin = (None if part is None else part[:tokens] for part in (rotary_cos, rotary_sin))
    rotary, norms = (cos, sin), (query_norm, key_norm)
    q, k = (
        _prepared(part, norm, norm_eps, rotary) for part, norm in zip(given[:2], norms, strict=True)
    )
    group = heads // sizes[1]
    parts = [q, *(part.repeat_interleave(group, dim=1) for part in (k, given[2]))]
    upstream = grad[:tokens].to(dtype)
    how = scale, bias, window, causal, dropout, seed
    d_q, d_k, d_v, d_bias = _attention(parts, upstream, cu_seqlens, *how)
    d_k, d_v = (part.unflatten(1, (-1, group)).sum(2) for part in (d_k, d_v))
    d_q, *of_queries = _unprepared(d_q, given[0], query_norm, norm_eps, rotary)
    d_k, *of_keys = _unprepared(d_k, given[1], key_norm, norm_eps, rotary)
    d_qkv, d_norms = torch.zeros_like(qkv), [*of_queries, *of_keys]
    d_qkv[:tokens] = torch.cat((d_q, d_k, d_v), dim=1).view_as(qkv[:tokens])
    return d_qkv, d_bias, torch.stack(d_norms) if d_norms else q.new_zeros(0)


def _prepared(x: Tensor, norm: Tensor | None, eps: float, rotary: _Rotary) -> Tensor:
    """Heads `[T, H, D]` of queries or keys, normed and rotated where they are."""
    if norm is not None:
        x = F.rms_norm(x, x.shape[-1:], norm.to(x.dtype), eps)
    cos, sin = rotary
    return x if cos is None or sin is None else reference._rotate(x, cos, sin)


def _unprepared(
    grad: Tensor, x: Tensor, norm: Tensor | None, eps: float, rotary: _Rotary
) -> tuple[Tensor, ...]:
    """The gradients of the heads `x`, and of their norm where there is one, by that of what
    :func:`_prepared` makes of them."""
    cos, sin = rotary
    if cos is not None and sin is not None:
        grad = reference._rotate(grad, cos, -sin)
    if norm is None:
        return (grad,)
    rows = grad.flatten(0, 1), x.flatten(0, 1)
    d_x, sums = add_norm_backward(*rows, None, None, norm, eps, rms=True)
    return d_x.view_as(grad), sums[0]


def _attention(
    parts: Sequence[Tensor],
    grad: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    bias: Tensor | None,
    window: int,
    causal: bool,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `parts`, queries, keys and values `[T, H, D]`, and of `bias`."""
    heads, dtype = grad.shape[1], grad.dtype
    d_parts = [torch.zeros_like(part) for part in parts]
    d_bias = grad.new_zeros((0,) if bias is None else bias.shape)
    for rows in reference._rows_by_length(cu_seqlens):
        length = rows.shape[1]
        block = max(1, min(length, reference._SCORE_BUDGET // (heads * length)))
        group = max(1, reference._SCORE_BUDGET // (heads * length * block))
        for some in rows.split(group):
            q, k, v, upstream = (
                part[some].transpose(1, 2) for part in (*parts, grad)
            )  # [n, H, L, D]
            d_q, d_k, d_v = (torch.zeros_like(k) for _ in range(3))
            for first in range(0, length, block):
                these = slice(first, first + block)
                positions = torch.arange(length, device=rows.device)
                distance = positions[None] - positions[these, None]
                terms = reference._distance_terms(distance, bias, window, causal, dtype)
                weights = torch.softmax(q[:, :, these] @ k.mT * scale + terms, dim=-1)
                place = dropout, seed, some[:, these]
                d_v += drop(weights, *place).mT @ upstream[:, :, these]
                d_weights = drop(upstream[:, :, these] @ v.mT, *place)
                centre = (weights * d_weights).sum(-1, keepdim=True)
                d_scores = weights * (d_weights - centre)
                d_q[:, :, these] = d_scores @ k * scale
                d_k += d_scores.mT @ q[:, :, these] * scale
                if bias is not None:
                    d_bias += _by_distance(d_scores.sum(0), first, bias.shape[1] // 2)
            for whole, part in zip(d_parts, (d_q, d_k, d_v), strict=True):
                whole[some] = part.transpose(1, 2)
    d_q, d_k, d_v = d_parts
    return d_q, d_k, d_v, d_bias


def _by_distance(scores: Tensor, first: int, reach: int) -> Tensor:
    """The sums `[H, 2R + 1]` over the pairs at each distance, clamped, of `scores` `[H, Q, L]`,
    whose queries begin at `first`."""
    heads, queries, keys = scores.shape
    # A row that is one longer than the rows it is cut into moves one to the right from row to row.
    skewed = F.pad(scores.flip(1), (0, queries)).flatten(1)[:, : queries * (queries + keys - 1)]
    sums = skewed.view(heads, queries, -1).sum(1)
    distance = torch.arange(sums.shape[1], device=sums.device) - (queries - 1) - first
    out = sums.new_zeros(heads, 2 * reach + 1)
    near = distance.abs() <= reach
    out[:, distance[near] + reach] = sums[:, near]
    out[:, 0] += sums[:, distance < -reach].sum(1)
    out[:, -1] += sums[:, distance > reach].sum(1)
    return out


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
    total = reference._sum(x, bias, residual)
    upstream = grad.to(total.dtype)
    if not rms:
        total = total - total.mean(-1, keepdim=True)
    inverse = (total.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, d_normed = total * inverse, upstream * weight.to(total.dtype)
    d_total = d_normed - normed * (d_normed * normed).mean(-1, keepdim=True)
    if not rms:
        d_total = d_total - d_normed.mean(-1, keepdim=True)
    d_total = reference._sum(d_total * inverse, grad_sum)
    sums = torch.stack([part.sum(0) for part in (upstream * normed, upstream, d_total)])
    return d_total.to(x.dtype), sums


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    total = reference._sum(x, bias)
    activation = reference.Activation.GELU_TANH if tanh else reference.Activation.GELU
    return _through(activation, grad.to(total.dtype), total).to(x.dtype)


def gated_activation_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: int, first: bool
) -> Tensor:
    halves = reference._sum(x, bias).chunk(2, dim=1)
    activated, gate = halves if first else halves[::-1]
    upstream = grad.to(gate.dtype)
    parts = (
        _through(activation, upstream * gate, activated),
        upstream * reference._activate(activated, activation),
    )
    return torch.cat(parts if first else parts[::-1], dim=1).to(x.dtype)


def _through(activation: int, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of the argument `x` of an activation."""
    if activation == reference.Activation.NONE:
        return grad
    if activation == reference.Activation.SILU:
        d_x: Tensor = torch.ops.aten.silu_backward(grad, x)
    else:
        approximate = "tanh" if activation == reference.Activation.GELU_TANH else "none"
        d_x = torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
    return d_x
