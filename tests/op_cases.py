"""Random arguments of every op schema, shared by the op tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sbert_fast.ops.panels import pack as pack_panels
from sbert_fast.testing import pack_lengths

RAGGED = (3, 0, 17, 1, 64, 0, 5)


def arguments(
    op: str,
    dtype: torch.dtype,
    lengths: Sequence[int] = RAGGED,
    heads: int = 2,
    dim: int = 26,
    seed: int = 0,
) -> tuple[Any, ...]:
    """The arguments of `op`, in schema order, for sequences of the given lengths."""
    g = torch.Generator().manual_seed(seed)
    cu = pack_lengths(lengths)
    tokens = -(-int(cu[-1]) // 16) * 16 + 16
    width = heads * dim

    def randn(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(to)

    def integers(high: int) -> torch.Tensor:
        return torch.randint(0, high, (tokens,), generator=g, dtype=torch.int32)

    fp32 = torch.float32
    weight, bias = 1 + 0.2 * randn(width, to=fp32), 0.2 * randn(width, to=fp32)
    if op == "varlen_attention":
        longest = max(lengths, default=0)
        return (randn(tokens, 3, heads, dim), cu, longest, dim**-0.5, None, -1, None, None, None)
    if op == "embed_norm":
        tables = randn(50, width), randn(40, width), randn(2, width)
        ids = integers(50), integers(40), integers(2)
        return (*ids, *tables, weight, bias, 1e-12, dtype)
    if op == "add_norm":
        x, residual = randn(tokens, width), randn(tokens, width)
        return (x, randn(width, to=fp32), residual, weight, bias, 1e-12)
    if op == "bias_gelu":
        return (3 * randn(tokens, width), randn(width, to=fp32), False)
    if op in ("linear", "linear_norm"):
        x, panels = randn(tokens, 2 * width), pack_panels(randn(width, 2 * width))
        if op == "linear":
            return (x, panels, randn(width, to=fp32), width, 1)
        return (x, panels, randn(width, to=fp32), randn(tokens, width), weight, bias, 1e-12)
    if op == "segment_pool":
        return (randn(tokens, width), cu, 0, True, 0, None)
    if op == "segment_pool_out":
        rows = torch.randperm(len(lengths), generator=g).to(torch.int32)
        out = torch.full((len(lengths) + 1, width), float("nan"))
        return (randn(tokens, width), cu, 0, True, 0, None, out, rows)
    if op in ("norm_pool", "norm_pool_out"):
        norm = arguments("add_norm", dtype, lengths, heads, dim, seed)
        pooled = arguments(op.replace("norm", "segment"), dtype, lengths, heads, dim, seed)
        return (*norm, *pooled[1:])
    raise ValueError(f"op must name an op, got {op!r}")
