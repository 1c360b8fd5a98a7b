"""Plain-torch reference of the ops that compute gradients, written out as formulas.

As in :mod:`sbert_fast.ops.reference`: the arguments of the schemas, any device, accumulation in
fp32 or fp64, one rounding, and sums in an order that depends on nothing but the sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_fast.ops import reference


def varlen_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype = reference._accumulator(qkv.dtype)
    parts = [*qkv.to(dtype).unbind(1), grad.to(dtype)]
    d_qkv, heads = torch.zeros_like(qkv), qkv.shape[2]
    d_bias = qkv.new_zeros((0,) if bias is None else bias.shape, dtype=dtype)
    for rows in reference._rows_by_length(cu_seqlens):
        length = rows.shape[1]
        block = max(1, min(length, reference._SCORE_BUDGET // (heads * length)))
        group = max(1, reference._SCORE_BUDGET // (heads * length * block))
        for some in rows.split(group):
            q, k, v, upstream = (part[some].transpose(1, 2) for part in parts)  # [n, H, L, D]
            d_q, d_k, d_v = (torch.zeros_like(k) for _ in range(3))
            for first in range(0, length, block):
                these = slice(first, first + block)
                positions = torch.arange(length, device=rows.device)
                distance = positions[None] - positions[these, None]
                terms = reference._distance_terms(distance, bias, window, causal, dtype)
                weights = torch.softmax(q[:, :, these] @ k.mT * scale + terms, dim=-1)
                d_v += weights.mT @ upstream[:, :, these]
                d_weights = upstream[:, :, these] @ v.mT
                centre = (weights * d_weights).sum(-1, keepdim=True)
                d_scores = weights * (d_weights - centre)
                d_q[:, :, these] = d_scores @ k * scale
                d_k += d_scores.mT @ q[:, :, these] * scale
                if bias is not None:
                    d_bias += _by_distance(d_scores.sum(0), first, bias.shape[1] // 2)
            d_qkv[some] = torch.stack((d_q, d_k, d_v), dim=1).permute(0, 3, 1, 2, 4).to(qkv.dtype)
    return d_qkv, d_bias if bias is None else d_bias.to(bias.dtype)


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
    d_total = d_total * inverse
    sums = torch.stack([part.sum(0) for part in (upstream * normed, upstream, d_total)])
    return d_total.to(x.dtype), sums
