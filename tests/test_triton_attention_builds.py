"""varlen_attention in Triton, compiled for absent GPUs: what its kernels need of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from op_cases import ARCHS
from sbert_fast.kernels import aot, tuning

kernel = pytest.importorskip("sbert_fast.kernels.varlen_attention")
backward = pytest.importorskip("sbert_fast.kernels.varlen_attention_backward")

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
TOKENS, HEADS = 1 << 16, 12
DECODER = {"causal": True, "kv_heads": 4, "normed": True, "rotary": True}


def meta(*shape: int, to: torch.dtype = SINGLE) -> Tensor:
    return torch.empty(*shape, dtype=to, device="meta")


def inputs(
    dim: int, dtype: torch.dtype, max_seqlen: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...], Any]:
    """qkv, what has the shape of the result, cu_seqlens, the tables of bias and positions, and the
    arguments that have defaults."""
    kv_heads = options.get("kv_heads", 0)
    shape = (HEADS + 2 * kv_heads,) if kv_heads else (3, HEADS)
    table = meta(TOKENS, dim // 2) if options.get("rotary") else None
    bias = meta(HEADS, 257) if options.get("bias") else None
    norm = meta(dim) if options.get("normed") else None
    rows = buckets = None
    if options.get("disentangled"):
        rows, buckets = meta(HEADS, 512, dim, to=dtype), meta(1023, to=torch.int32)
    rate = options.get("dropout", 0.0)
    seed = meta(1, to=torch.int64) if rate else None
    norms = norm, norm, 1e-6
    more = kernel.Options(
        options.get("causal", False), kv_heads, *norms, rows, rows, buckets, rate, seed
    )
    qkv, out = (meta(TOKENS, *each, dim, to=dtype) for each in (shape, (HEADS,)))
    cu_seqlens = meta(TOKENS // max_seqlen + 1, to=torch.int32)
    return qkv, out, cu_seqlens, (bias, table, table), more


def builds(
    dim: int, dtype: torch.dtype, arch: int, max_seqlen: int, **options: Any
) -> Iterator[aot.Build]:
    """What a batch of 64k tokens and 12 heads launches."""
    qkv, out, cu_seqlens, tables, more = inputs(dim, dtype, max_seqlen, **options)
    window, tiles = options.get("window", -1), meta(TOKENS // 128, 4, to=torch.int32)
    sizes = max_seqlen, dim**-0.5, window, tables, tiles, (arch // 10, arch % 10)
    for launch in kernel.plan(qkv, out, cu_seqlens, *sizes, more):
        yield aot.build_of(launch.kernel, launch.arguments, launch.options, arch)


def builds_of_gradients(
    dim: int, dtype: torch.dtype, arch: int, **options: Any
) -> Iterator[aot.Build]:
    """What the backward pass of such a batch launches."""
    qkv, grad, cu_seqlens, tables, more = inputs(dim, dtype, 512, **options)
    sizes = 512, dim**-0.5, options.get("window", -1)
    todo = backward.Todo(grad, qkv, cu_seqlens, *sizes, tables, more)
    for launch in todo.plan(todo.results()):
        yield aot.build_of(launch.kernel, launch.arguments, launch.options, arch)


def wanted(arch: int) -> Iterator[aot.Build]:
    """What needs most of a GPU; for compute capability 9.0 something of every kind."""
    for max_seqlen in (64, 512):
        yield from builds(64, HALF, arch, max_seqlen)
    yield from builds(64, HALF, arch, 512, **DECODER)
    yield from builds(256, HALF, arch, 512, **DECODER)
    for dtype in (HALF, SINGLE):
        yield from builds(64, dtype, arch, 512, disentangled=True)
    if arch != 90:
        return
    # Widths of the table, and dims that do not fill them.
    for dim in (26, 32, 58, 80, 128, 136, 256):
        yield from builds(dim, HALF, arch, 512)
    yield from builds(32, HALF, arch, 64)
    for dtype in (BFLOAT, SINGLE):
        yield from builds(64, dtype, arch, 64)
    everything = {"bias": True, "window": 64, "rotary": True}
    for options in ({"bias": True}, {"causal": True}, {"dropout": 0.1}, everything):
        yield from builds(64, HALF, arch, 64, **options)
    yield from builds(64, HALF, arch, 512, kv_heads=4)
    yield from builds(128, HALF, arch, 512, **DECODER)
    yield from builds(256, HALF, arch, 512, **DECODER, bias=True, window=64)
    yield from builds(256, SINGLE, arch, 512, **DECODER)


def wanted_of_gradients(arch: int) -> Iterator[aot.Build]:
    """The same of the backward pass."""
    everything = {"bias": True, "window": 64, "dropout": 0.1, **DECODER}
    for dim in (64, 256):
        yield from builds_of_gradients(dim, HALF, arch, **everything)
    if arch != 90:
        return
    for dim in (26, 32, 64, 128, 136, 256):
        yield from builds_of_gradients(dim, HALF, arch)
    yield from builds_of_gradients(128, HALF, arch, **everything)
    yield from builds_of_gradients(64, BFLOAT, arch, dropout=0.1)
    yield from builds_of_gradients(64, HALF, arch, rotary=True, window=64)
    for dim in (64, 128, 256):
        yield from builds_of_gradients(dim, SINGLE, arch, **everything)


@pytest.mark.slow
def test_compiled_gradients_fit() -> None:
    unique = list({repr(b): b for arch in aot.ARCHS for b in wanted_of_gradients(arch)}.values())
    usages = aot.compile_all(unique)
    print("\n" + aot.table(unique, usages))
    aot.assert_fits(unique, usages)


@pytest.mark.slow
def test_compiled_kernels_fit(request: pytest.FixtureRequest) -> None:
    """No spills; prints the table of registers and shared memory under `pytest -s`."""
    every = [build for arch in ARCHS for build in wanted(arch)]
    request.getfixturevalue("tf32")
    dims = {80: (64, 256), 90: (32, 64, 128, 256)}
    turned = [
        b
        for arch in dims
        if arch in ARCHS
        for dim in dims[arch]
        for b in builds(dim, SINGLE, arch, 512)
    ]
    assert {build.constexprs["PRECISION"] for build in turned} == {"tf32"}
    unique = list({repr(build): build for build in (*every, *turned)}.values())
    usages = aot.compile_all(unique)
    print("\n" + aot.table(unique, usages))
    aot.assert_fits(unique, usages)


def test_short_kernels_fill_a_multiprocessor() -> None:
    """Memory-bound kernels live on bytes in flight: what one H200 multiprocessor keeps of q, k and
    v under way must exceed bandwidth times latency, 4.3 TB/s / 132 * 0.9 us = 29 kB."""
    wanted = [b for dim in (32, 64) for s in (16, 32) for b in builds(dim, HALF, 90, s)]
    for build, usage in zip(wanted, aot.compile_all(wanted), strict=True):
        c = build.constexprs
        rows = c["GROUP"] * c["SHORT"]
        assert usage.blocks(90) * rows * 3 * c["D"] * 2 > 2 * 29_000


@pytest.mark.parametrize(("bits", "width"), tuning._ATTENTION)
@pytest.mark.parametrize("rotary", [False, True])
def test_norms_of_heads_are_added_up_alike_in_every_batch(
    bits: int, width: int, rotary: bool
) -> None:
    """The threads that hold a row decide about the order of its sum."""
    how: dict[str, Any] = {"plain": False, "rotary": rotary, "normed": True, "disentangled": False}
    how["capability"] = (9, 0)
    rows = {tuning.attention(width, bits, longest, **how) for longest in (16, 256, 257, 9999)}
    assert len(rows) == 1
    # One by one, sequences that share a program have as many threads each.
    (row,) = rows
    assert row.group == 1 or row.group_warps % row.group == 0
