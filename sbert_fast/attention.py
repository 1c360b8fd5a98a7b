"""Attention of the packed engine: prepared from what an adapter has read, and run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_fast import ops
from sbert_fast.linears import PreparedLinear, prepare_linear
from sbert_fast.models import base
from sbert_fast.norms import PreparedNorm, attached
from sbert_fast.packing import PackedBatch
from sbert_fast.target import Target

# Cosines and sines fp32 `[T, D / 2]` of every kind of rotary positions of a model.
Turns = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True)
class PreparedAttention:
    """Attention, its projections, and the kernel for it.

    Attributes:
        shape: of a token in `qkv`.
        bias: fp32 `[H, 2R + 1]`, or None.
        window: in tokens; -1 is none.
        rotary: which of the rotary positions of the model, or None.
        dropout: the share of weights that is dropped.
    """

    qkv: PreparedLinear
    output: PreparedLinear
    kernel: ops.Kernel
    shape: tuple[int, ...]
    scale: float
    bias: Tensor | None
    window: int
    rotary: int | None
    dropout: float

    def __call__(self, x: Tensor, batch: PackedBatch, turns: Turns) -> Tensor:
        """What the heads attend to, `[T, H * D]`."""
        cos, sin = (None, None) if self.rotary is None else turns[self.rotary]
        options: dict[str, Any] = {}
        if self.dropout:
            options = {"dropout": self.dropout, "seed": ops.draw_seed(x.device)}
        attended: Tensor = self.kernel(
            self.qkv(x).view(x.shape[0], *self.shape),
            batch.cu_seqlens,
            batch.max_seqlen,
            self.scale,
            self.bias,
            self.window,
            cos,
            sin,
            batch.tiles,
            **options,
        )
        return attended.view(x.shape[0], -1)


def attention_options(attention: base.Attention) -> dict[str, Any]:
    """What attention asks of its kernel, as :func:`ops.bind` takes it."""
    grouped = attention.kv_heads if attention.kv_heads != attention.heads else 0
    tensors: dict[str, Any] = {"rotary": attention.rotary, "query_norm": attention.query_norm}
    if (part := attention.disentangled) is not None:
        tensors |= {"position_keys": part.keys, "position_queries": part.queries}
    return {
        "head_dim": attention.head_dim,
        "options": {"causal": attention.causal, "kv_heads": grouped},
        "needs": tuple(name for name, tensor in tensors.items() if tensor is not None),
    }


def _attention_kernel(attention: base.Attention, target: Target) -> ops.Kernel:
    kernel = target.bind("varlen_attention", **attention_options(attention))
    options: dict[str, Any] = {}
    if attention.query_norm is not None and attention.key_norm is not None:
        query, key = map(PreparedNorm.of, (attention.query_norm, attention.key_norm))
        options = {"query_norm": query.weight, "key_norm": key.weight, "norm_eps": query.eps}
    if attention.disentangled is not None:
        options |= _tables(attention.disentangled, attention.heads, target.dtype)
    return replace(kernel, options={**kernel.options, **options})


def _tables(part: base.Disentangled, heads: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The tables of distances: what the projections make of the rows, computed in fp32."""
    rows = part.table.detach()[: max(part.buckets) + 1].float()
    if part.norm is not None:
        norm = PreparedNorm.of(part.norm)
        rows = F.layer_norm(rows, rows.shape[-1:], norm.weight, norm.bias, norm.eps)

    def project(linear: base.Linear | None) -> Tensor | None:
        if linear is None:
            return None
        bias = None if linear.bias is None else linear.bias.detach().float()
        projected = F.linear(rows, linear.weight.detach().float(), bias)
        return projected.view(len(rows), heads, -1).transpose(0, 1).to(dtype).contiguous()

    return {
        "position_keys": project(part.keys),
        "position_queries": project(part.queries),
        "buckets": torch.tensor(part.buckets, dtype=torch.int32, device=rows.device),
    }


def prepare_attention(
    attention: base.Attention, kinds: list[int], target: Target
) -> PreparedAttention:
    """Prepare attention for `target`; `kinds` are the rotary positions of the model."""
    heads, grouped, dim = attention.heads, attention.kv_heads, attention.head_dim
    relative, rotary = attention.relative_bias, attention.rotary
    bias = None
    if relative is not None:
        rows = torch.tensor(relative.buckets, device=relative.table.device)
        bias = F.embedding(rows, attached(relative.table).float()).T.contiguous()
    return PreparedAttention(
        qkv=prepare_linear(attention.qkv, target),
        output=prepare_linear((attention.output,), target),
        kernel=_attention_kernel(attention, target),
        shape=(3, heads, dim) if grouped == heads else (heads + 2 * grouped, dim),
        scale=attention.scale,
        bias=bias,
        window=-1 if attention.window is None else attention.window,
        rotary=None if rotary is None else kinds.index(id(rotary.frequencies)),
        dropout=attention.dropout.rate if target.drops and attention.dropout is not None else 0.0,
    )
