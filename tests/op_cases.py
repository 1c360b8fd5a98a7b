"""Random arguments of every op schema, shared by the op tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sbert_fast.kernels import aot
from sbert_fast.ops import POOLING_MODES
from sbert_fast.ops.panels import pack as pack_panels
from sbert_fast.testing import pack_lengths

RAGGED = (3, 0, 17, 1, 64, 0, 5)
POOLED_LENGTHS = [5, 0, 1, 16, 3, 0, 40]
DEAD_TAIL = 7
# What Triton kernels are compiled for ahead of time: the GPUs most people run them on, and those
# with the least shared memory; `SBERT_FAST_EVERY_ARCH` adds the rest.
ARCHS = aot.ARCHS if os.environ.get("SBERT_FAST_EVERY_ARCH") else (90, 120)


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
    if op in ("add_norm", "add_norm_sum"):
        x, residual = randn(tokens, width), randn(tokens, width)
        return (x, randn(width, to=fp32), residual, weight, bias, 1e-12)
    if op == "bias_gelu":
        return (3 * randn(tokens, width), randn(width, to=fp32), False)
    if op == "gated_activation":
        return (3 * randn(tokens, width), randn(width, to=fp32), 1, True)
    if op in ("linear", "linear_norm"):
        x, panels = randn(tokens, 2 * width), pack_panels(randn(width, 2 * width))
        if op == "linear":
            return (x, panels, randn(width, to=fp32), width, 1, False)
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
    if op == "varlen_attention_backward":
        qkv, *rest = arguments("varlen_attention", dtype, lengths, heads, dim, seed)[:4]
        return (randn(tokens, heads, dim), qkv, *rest, randn(heads, 7, to=fp32), -1)
    if op == "add_norm_backward":
        x, linear_bias, residual, weight, _, eps = arguments("add_norm", dtype, lengths, heads, dim)
        return (randn(tokens, width), x, linear_bias, residual, weight, eps)
    if op == "bias_gelu_backward":
        gelu = arguments("bias_gelu", dtype, lengths, heads, dim, seed)
        return (randn(tokens, width), *gelu)
    if op == "gated_activation_backward":
        gated = arguments("gated_activation", dtype, lengths, heads, dim, seed)
        return (randn(tokens, width // 2), *gated)
    raise ValueError(f"op must name an op, got {op!r}")


def rotated(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[Any]:
    """Every pair of `first` and `second` with one of `third`, which take turns: each meets them all
    where the others are as many."""
    return [
        (a, b, third[(i + j) % len(third)])
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Rows of tables of distances, by distance.
BUCKETS = int32(3, 1, 0)


def table_of_distances(dim: int, rows: int = 4, heads: int = 2) -> torch.Tensor:
    return torch.ones(heads, rows, dim)


def norm_parameters(E: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + randn(E, scale=0.1), randn(E, scale=0.1)


def embed_args(
    T: int, E: int, dtype: torch.dtype, out_dtype: torch.dtype, types: str = "given"
) -> list[Any]:
    ids, positions = torch.randint(0, 50, (T,)).int(), torch.randint(0, 20, (T,)).int()
    type_ids = torch.randint(0, 2, (T,)).int() if types == "given" else None
    type_table = None if types == "no table" else randn(2, E, dtype=dtype)
    tables = randn(50, E, dtype=dtype), randn(20, E, dtype=dtype), type_table
    return [ids, positions, type_ids, *tables, *norm_parameters(E), 1e-12, out_dtype]


def add_norm_args(T: int, E: int, dtype: torch.dtype) -> list[Any]:
    x, residual = randn(T, E, dtype=dtype), randn(T, E, dtype=dtype)
    return [x, randn(E), residual, *norm_parameters(E), 1e-5]


def pool_args(
    E: int,
    dtype: torch.dtype,
    mode: str,
    lengths: Sequence[int] = POOLED_LENGTHS,
    **options: Any,
) -> list[Any]:
    cu_seqlens = pack_lengths(lengths)
    x = randn(sum(lengths) + DEAD_TAIL, E, dtype=dtype)
    x[-DEAD_TAIL:] = float("nan")
    normalize, skip = options.get("normalize", True), options.get("skip", 0)
    return [x, cu_seqlens, POOLING_MODES.index(mode), normalize, skip, options.get("spans")]


def assert_gelu_of_special_values(gelu: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What `gelu`, of fp32 `[1, 9]`, makes of zeros, infinities, NaN and extreme numbers."""
    inf, nan = float("inf"), float("nan")
    out = gelu(torch.tensor([[0.0, -0.0, inf, -inf, nan, 1e30, -1e30, -200.0, 1e-40]]))[0]
    assert out[:3].tolist() == [0.0, 0.0, inf]
    assert out[4].isnan() and out[5] == 1e30
    # The exact results are -0; the power of two stops at the smallest normal one.
    assert all(-1e-25 < value <= 0 for value in out[[3, 6, 7]].tolist())
