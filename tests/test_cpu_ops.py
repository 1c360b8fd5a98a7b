"""The C++ ops on every instruction set this CPU has: figures, isolation, determinism, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from op_cases import POOLED_LENGTHS as LENGTHS
from op_cases import (
    add_norm_args,
    assert_gelu_of_special_values,
    embed_args,
    int32,
    pool_args,
    randn,
)
from sbert_fast.ops import POOLING_MODES, extension
from sbert_fast.ops.reference import Activation
from sbert_fast.testing import check_op, pack_lengths

OPS = torch.ops.sbert_fast
DTYPES = [torch.float32, torch.bfloat16]
# One vector and less, no multiple of any vector, a common width, and longer than the kept row.
SHAPES = [(1, 8), (3, 1), (7, 37), (33, 384), (2, 4103)]

pytestmark = [
    pytest.mark.skipif(not extension.CPU.available, reason=str(extension.CPU.reason)),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2],
)
@pytest.mark.parametrize(("T", "E"), SHAPES)
def test_embed_norm(isa: str, T: int, E: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for types in ("given", "type 0", "no table"):
        args = embed_args(T, E, dtype, out_dtype, types)
        check_op("embed_norm", OPS.embed_norm.cpu(*args), args, out_dtype)
        for place in (1, 4):  # no positions
            args[place] = None
        check_op("embed_norm", OPS.embed_norm.cpu(*args), args, out_dtype)
        for place in (6, 7):  # no norm
            args[place] = None
        check_op("embed_norm", OPS.embed_norm.cpu(*args), args, out_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E"), SHAPES)
def test_add_norm(isa: str, T: int, E: int, dtype: torch.dtype) -> None:
    x, bias, residual, *norm = add_norm_args(T, E, dtype)
    for optional in ([bias, residual], [bias, None], [None, residual], [None, None]):
        for rms in (False, True):
            args = [x, *optional, *norm, rms]
            check_op("add_norm", OPS.add_norm.cpu(*args), args, dtype)
            check_op("add_norm_sum", OPS.add_norm_sum.cpu(*args), args, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_of_a_large_mean_keeps_its_variance(isa: str, dtype: torch.dtype) -> None:
    args = add_norm_args(9, 37, dtype)
    args[0] = (args[0].float() + 100).to(dtype)
    check_op("add_norm", OPS.add_norm.cpu(*args), args, dtype)


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_bias_gelu(isa: str, T: int, F: int, dtype: torch.dtype, tanh: bool) -> None:
    for scale in (1e-3, 0.1, 1.0, 4.0):
        x = randn(T, F, dtype=dtype, scale=scale)
        for args in ([x, randn(F, scale=scale), tanh], [x, None, tanh]):
            check_op("bias_gelu", OPS.bias_gelu.cpu(*args), args, dtype)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_gated_activation(isa: str, T: int, F: int, dtype: torch.dtype, first: bool) -> None:
    for activation in Activation:
        for bias in (randn(2 * F), None):
            args = [randn(T, 2 * F, dtype=dtype, scale=3.0), bias, activation, first]
            check_op("gated_activation", OPS.gated_activation.cpu(*args), args, dtype)


def test_gates_of_special_values(isa: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, inf, nan, 1e30, -1e30, -200.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0]])
    out = OPS.gated_activation.cpu(x, None, Activation.SILU, True)[0]
    assert out[:2].tolist() == [0.0, inf] and out[2].isnan()
    assert out[3] == 2e30 and out[4:].abs().max() == 0.0


@pytest.mark.parametrize("tanh", [True, False])
def test_bias_gelu_of_special_values(isa: str, tanh: bool) -> None:
    assert_gelu_of_special_values(lambda x: OPS.bias_gelu.cpu(x, None, tanh))


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("E", [1, 37, 384])
def test_segment_pool(isa: str, E: int, dtype: torch.dtype, mode: str) -> None:
    for skip, normalize in ((0, True), (0, False), (2, True), (5, False), (100, True)):
        args = pool_args(E, dtype, mode, normalize=normalize, skip=skip)
        out = OPS.segment_pool.cpu(*args)
        check_op("segment_pool", out, args, torch.float32)
        assert not out[[1, 5]].any(), "an empty sequence must give zeros"


@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len", "weighted_mean"])
def test_segment_pool_error_does_not_grow_with_the_length(isa: str, mode: str) -> None:
    x, cu_seqlens = 1 + randn(20_000, 33), int32(0, 20_000)
    args = [x, cu_seqlens, POOLING_MODES.index(mode), False, 0, None]
    check_op("segment_pool", OPS.segment_pool.cpu(*args), args, torch.float32)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_segment_pool_of_spans(isa: str, mode: str) -> None:
    spans = torch.tensor([[2, 9], [0, 65], [4, 4], [65, 65], [64, 65]], dtype=torch.int32)
    args = pool_args(48, torch.float32, mode, spans=spans, skip=1)
    check_op("segment_pool", OPS.segment_pool.cpu(*args), args, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_segment_pool_of_a_strided_view_has_the_same_bits(
    isa: str, dtype: torch.dtype, mode: str
) -> None:
    args = pool_args(37, dtype, mode)
    wide = torch.full((args[0].shape[0], 100), float("nan"), dtype=dtype)
    wide[:, 5:42] = args[0]
    assert torch.equal(OPS.segment_pool.cpu(*args), OPS.segment_pool.cpu(wide[:, 5:42], *args[1:]))


def test_segment_pool_out_writes_its_rows_and_no_others(isa: str) -> None:
    args = pool_args(37, torch.float32, "mean")
    rows = torch.randperm(12)[: len(LENGTHS)]
    wide = torch.full((12, 50), -7.0)
    out = wide[:, 3:40]
    assert OPS.segment_pool_out.cpu(*args, out, rows.int()) is None
    expected = torch.full_like(wide, -7.0)
    expected[rows, 3:40] = OPS.segment_pool.cpu(*args)
    assert torch.equal(wide, expected)
    OPS.segment_pool_out.cpu(*args, out, None)
    assert torch.equal(out[: len(LENGTHS)], OPS.segment_pool.cpu(*args))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("token", [0, 3, 4])
def test_segment_pool_hides_no_special_value(isa: str, mode: str, value: float, token: int) -> None:
    for normalize in (False, True):
        args = pool_args(37, torch.float32, mode, normalize=normalize)
        args[0][token, 11] = value
        reference = OPS.segment_pool.reference(*args)
        torch.testing.assert_close(OPS.segment_pool.cpu(*args), reference, equal_nan=True)


def test_kernels_share_no_code_between_instruction_sets() -> None:
    """A function of the C++ library would be merged over all of them, whichever CPU it needs."""
    sources = Path(__file__).parent.parent.joinpath("csrc", "cpu")
    allowed = {"cstdint", "stdint.h", "immintrin.h", "arm_neon.h"}
    pending, seen = ["kernel_table.h"], set()
    while pending:
        seen.add(name := pending.pop())
        text = sources.joinpath(name).read_text()
        assert set(re.findall(r"#include <(.+)>", text)) <= allowed, name
        pending += set(re.findall(r'#include "(.+)"', text)) - seen


def row_ops(dtype: torch.dtype, T: int, E: int) -> dict[str, tuple[list[Any], int]]:
    """Arguments of each op that maps rows to rows, and which of them holds the rows."""
    return {
        "add_norm": (add_norm_args(T, E, dtype), 0),
        "bias_gelu": ([randn(T, E, dtype=dtype), randn(E), False], 0),
        "gated_activation": ([randn(T, 2 * E, dtype=dtype), randn(2 * E), 1, True], 0),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "options"),
    [
        *(("add_norm", {"rms": rms}) for rms in (False, True)),
        *(("add_norm_sum", {"rms": rms}) for rms in (False, True)),
        ("bias_gelu", {}),
        ("gated_activation", {}),
    ],
)
def test_rows_are_isolated(isa: str, op: str, options: Any, dtype: torch.dtype) -> None:
    args, rows = row_ops(dtype, 9, 37)[op.removesuffix("_sum")]

    def fifth() -> list[Tensor]:
        found = getattr(OPS, op).cpu(*args, **options)
        return [x[4] for x in (found if isinstance(found, tuple) else (found,))]

    expected = fifth()
    args[rows] = args[rows].clone()
    args[rows][torch.arange(9) != 4] = float("nan")
    assert all(map(torch.equal, fifth(), expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_segments_are_isolated(isa: str, mode: str, dtype: torch.dtype) -> None:
    args = pool_args(37, dtype, mode)
    expected = OPS.segment_pool.cpu(*args)
    alone = args[0][6:22].clone()
    args[0][:6] = args[0][22:] = float("nan")
    assert torch.equal(OPS.segment_pool.cpu(*args)[3], expected[3])
    args[:2] = [alone, int32(0, 16)]
    assert torch.equal(OPS.segment_pool.cpu(*args)[0], expected[3])


def large_calls(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Calls that are large enough to be spread over threads, one long sequence among them."""
    T, E = 2048, 257
    x, cu_seqlens = randn(T, E, dtype=dtype), pack_lengths([1500, 3, 0, 200, *[10] * 34])
    embed = embed_args(T, E, dtype, dtype)
    rows = row_ops(dtype, T, E)
    qkv = randn(T, 3, 2, 16, dtype=dtype)
    attention = (qkv, cu_seqlens, 1500, 0.25, None, -1, None, None, None)
    return {
        "embed_norm": lambda: OPS.embed_norm.cpu(*embed),
        "add_norm": lambda: OPS.add_norm.cpu(*rows["add_norm"][0]),
        "bias_gelu": lambda: OPS.bias_gelu.cpu(*rows["bias_gelu"][0]),
        "gated_activation": lambda: OPS.gated_activation.cpu(*rows["gated_activation"][0]),
        "segment_pool": lambda: OPS.segment_pool.cpu(x, cu_seqlens, 0, True, 0, None),
        "varlen_attention": lambda: OPS.varlen_attention.cpu(*attention),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    try:
        for op, call in large_calls(dtype).items():
            torch.set_num_threads(1)
            expected = call()
            for count in (2, 3):
                torch.set_num_threads(count)
                assert torch.equal(call(), expected), f"{op} differs with {count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_without_rows(isa: str, dtype: torch.dtype) -> None:
    assert OPS.embed_norm.cpu(*embed_args(0, 16, dtype, dtype)).shape == (0, 16)
    assert OPS.add_norm.cpu(*add_norm_args(0, 16, dtype)).shape == (0, 16)
    assert OPS.bias_gelu.cpu(randn(0, 16, dtype=dtype), None, False).shape == (0, 16)
    pooled = OPS.segment_pool.cpu(randn(0, 16, dtype=dtype), int32(0), 0, True, 0, None)
    assert pooled.shape == (0, 16) and pooled.dtype == torch.float32
    empty = OPS.segment_pool.cpu(randn(0, 16, dtype=dtype), int32(0, 0, 0), 2, True, 0, None)
    assert torch.equal(empty, torch.zeros(2, 16))
