"""What the C++ ops refuse by themselves, and what they say: every caller's last line of defence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from op_cases import BUCKETS, arguments, table_of_distances
from sbert_fast.ops import extension, schemas

OPS = torch.ops.sbert_fast
RAGGED = (3, 5)
TOKENS, WIDTH = 32, 52

pytestmark = pytest.mark.skipif(not extension.CPU.available, reason=str(extension.CPU.reason))


def int8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def changed(index: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


# (op, position of the argument, what becomes of it, words of the message)
REFUSALS = [
    ("varlen_attention", 0, Tensor.half, "qkv must be float32 or bfloat16, got float16"),
    (
        "varlen_attention",
        0,
        lambda x: x[:, :, :, :7].contiguous(),
        r"D must be in \[8, 256\], got 7",
    ),
    (
        "varlen_attention",
        0,
        lambda x: x[:, :2].contiguous(),
        r"qkv must be .*\[\*, 3, \*, \*\], got",
    ),
    ("varlen_attention", 0, lambda x: x[:, :, :, :20], "qkv must be contiguous .* strides"),
    ("varlen_attention", 1, Tensor.long, r"cu_seqlens must be contiguous int32 \[B \+ 1\].*int64"),
    (
        "varlen_attention",
        1,
        constant(int32()),
        r"cu_seqlens must be int32 \[B \+ 1\], got int32 \[0\]",
    ),
    ("varlen_attention", 1, constant(int32(1, 8)), "cu_seqlens must start at 0, got 1"),
    ("varlen_attention", 1, constant(int32(0, 5, 3)), "never decrease, got 3 after 5 at index 2"),
    ("varlen_attention", 1, constant(int32(0, 40)), "end at or before T = 32, got 40"),
    ("varlen_attention", 2, constant(4), "max_seqlen must be at least 5, .*, got 4"),
    ("varlen_attention", 4, constant(torch.zeros(2, 4)), "odd number of columns, got float32"),
    ("varlen_attention", 4, constant(torch.zeros(3, 5)), r"bias must be .* = \[2, \*\], got"),
    ("varlen_attention", 5, constant(-2), "window must be at least -1, got -2"),
    ("varlen_attention", 6, constant(torch.zeros(TOKENS, 13)), "both be None, got only rotary_cos"),
    ("varlen_attention", 8, constant(torch.zeros(3, 3)), "tiles must be contiguous int32"),
    (
        "embed_norm",
        0,
        Tensor.long,
        r"ids must be contiguous int32 \[T\] = \[\*\], got int64 \[32\]",
    ),
    ("embed_norm", 0, changed(7, 50), r"ids\[7\] must be in \[0, 50\), the rows of word, got 50"),
    ("embed_norm", 0, changed(31, -1), r"ids\[31\] must be in \[0, 50\), .* got -1"),
    (
        "embed_norm",
        1,
        changed(0, 99),
        r"positions\[0\] must be in \[0, 40\), .*position_table, got 99",
    ),
    ("embed_norm", 2, changed(2, 2), r"types\[2\] must be in \[0, 2\), .*type_table, got 2"),
    ("embed_norm", 1, lambda x: x[1:], r"positions must be .* = \[32\], got int32 \[31\]"),
    ("embed_norm", 4, Tensor.bfloat16, "position_table must be contiguous float32 .* got bfloat16"),
    ("embed_norm", 5, constant(None), "types must be None where there is no type_table"),
    (
        "embed_norm",
        9,
        constant(torch.float16),
        "out_dtype must be float32 or bfloat16, got float16",
    ),
    ("add_norm", 0, Tensor.double, "x must be float32 or bfloat16, got float64"),
    ("add_norm", 0, lambda x: x.t(), "x must be contiguous .* strides"),
    (
        "add_norm",
        1,
        Tensor.bfloat16,
        r"bias must be contiguous float32 \[E\] = \[52\], got bfloat16",
    ),
    ("add_norm", 2, lambda x: x[1:], r"residual must be .* = \[32, 52\], got float32 \[31, 52\]"),
    ("add_norm", 3, lambda x: x[1:], r"weight must be .* = \[52\], got float32 \[51\]"),
    ("add_norm", 4, Tensor.double, r"ln_bias must be .* = \[52\], got float64 \[52\]"),
    ("bias_gelu", 0, lambda x: x[0], r"x must be .*\[T, F\] = \[\*, \*\], got float32 \[52\]"),
    ("bias_gelu", 1, lambda x: x[None], r"bias must be .* = \[52\], got float32 \[1, 52\]"),
    ("linear", 0, Tensor.half, "x must be float32 or bfloat16, got float16"),
    ("linear", 0, lambda x: x[:, :100], "x must be contiguous .* strides"),
    (
        "linear",
        0,
        lambda x: x[:, :0].contiguous(),
        r"x must have at least one column, got \[\d+, 0\]",
    ),
    ("linear", 1, Tensor.half, r"panels must be contiguous float32 .* got float16"),
    ("linear", 1, lambda x: x[:1], r"panels must be .* = \[2, 104, 48\], got float32 \[1, 104"),
    ("linear", 2, Tensor.bfloat16, r"bias must be contiguous float32 \[N\] = \[52\], got bfloat16"),
    ("linear", 3, constant(0), "features must be at least 1, got 0"),
    ("linear", 3, constant(97), r"panels must be .* = \[3, 104, 48\], got"),
    ("linear", 4, constant(4), r"activation must be in \[0, 4\), got 4"),
    ("linear", 5, constant(True), r"panels must be .* = \[4, 104, 48\], got float32 \[2, 104"),
    ("linear_norm", 3, lambda x: x[1:], r"residual must be .* = \[\d+, 52\], got float32"),
    ("linear_norm", 3, Tensor.bfloat16, "residual must be contiguous float32 .* got bfloat16"),
    ("linear_norm", 4, lambda x: x[1:], r"weight must be .* = \[52\], got float32 \[51\]"),
    ("linear_norm", 5, Tensor.double, r"ln_bias must be .* = \[52\], got float64 \[52\]"),
    ("segment_pool", 0, lambda x: x[:, ::2], "x must be .* unit inner stride, got"),
    ("segment_pool", 1, constant(int32(0, 33)), "end at or before T = 32, got 33"),
    ("segment_pool", 2, constant(6), r"mode must be in \[0, 6\), got 6"),
    ("segment_pool", 4, constant(-1), "skip must be at least 0, got -1"),
    ("segment_pool", 5, constant(int32([0, 3], [5, 4])), r"spans\[1\] must be .* got \[5, 4\]"),
    ("segment_pool", 5, constant(int32([0, 9])), r"0 <= start <= end <= 8, got \[0, 9\]"),
    ("segment_pool_out", 6, Tensor.double, r"out must be float32 .* got float64 \[3, 52\]"),
    ("segment_pool_out", 6, lambda x: x[:, :51], r"out must be float32 \[N, E\] = \[\*, 52\]"),
    ("segment_pool_out", 6, lambda x: x[:1].expand(3, -1), "separate rows, got"),
    ("segment_pool_out", 7, changed(1, 3), r"out_rows\[1\] must be in \[0, 3\), the rows of out"),
    ("segment_pool_out", 7, constant(int32(2, 2)), "must name a row at most once, got 2 twice"),
    ("segment_pool_out", 7, lambda x: x[1:], r"out_rows must be .*\[B\] = \[2\], got int32 \[1\]"),
]


@pytest.mark.parametrize(("op", "position", "change", "message"), REFUSALS)
def test_refusals(op: str, position: int, change: Callable[[Any], Any], message: str) -> None:
    args = list(arguments(op, torch.float32, RAGGED))
    args[position] = change(args[position])
    with pytest.raises(RuntimeError, match=f"^{op}: .*{message}"):
        getattr(OPS, op).cpu(*args)


def test_bfloat16_tables_give_no_float32() -> None:
    args = list(arguments("embed_norm", torch.bfloat16, RAGGED))
    args[-1] = torch.float32
    with pytest.raises(RuntimeError, match="out_dtype must be bfloat16, the dtype of the tables"):
        OPS.embed_norm.cpu(*args)


@pytest.mark.parametrize(
    ("x", "panels", "message"),
    [
        (torch.zeros(4, 5).bfloat16(), torch.zeros(1, 2, 48, 2).bfloat16(), "K must be even in"),
        (torch.zeros(4, 6), int8(3, 3, 16, 4), "K must be a multiple of 4 and below 65536 in int8"),
        (torch.zeros(4, 1 << 16), int8(3, 3, 16, 4), "K must be a multiple of 4 and below 65536"),
        (
            torch.zeros(4, 8),
            int8(3, 3, 16, 4),
            r"panels must be contiguous int8 .* \[3, 4, 16, 4\]",
        ),
    ],
)
def test_panels_take_some_numbers_of_inputs(x: Tensor, panels: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"linear: {message}"):
        OPS.linear.cpu(x, panels, None, 48, 0, False)


def test_out_must_hold_every_row_when_no_row_is_named() -> None:
    args = list(arguments("segment_pool_out", torch.float32, RAGGED))
    args[6:] = [torch.zeros(1, WIDTH), None]
    with pytest.raises(RuntimeError, match="out must have at least 2 rows, got float32"):
        OPS.segment_pool_out.cpu(*args)


def test_rotary_needs_an_even_head_dim() -> None:
    args = list(arguments("varlen_attention", torch.float32, RAGGED, dim=9))
    args[6] = args[7] = torch.zeros(args[0].shape[0], 4)
    with pytest.raises(RuntimeError, match="D must be even with rotary, got 9"):
        OPS.varlen_attention.cpu(*args)


@pytest.mark.parametrize(
    "op", [op for op in schemas.SCHEMAS if "cpu" in schemas.implementations(op)]
)
def test_arguments_that_are_not_changed_are_accepted(op: str) -> None:
    getattr(OPS, op).cpu(*arguments(op, torch.float32, RAGGED))


def test_instruction_sets_have_names() -> None:
    names = OPS.cpu_isas().split(",")
    assert names[-1] == "generic" and OPS.cpu_isa() in names
    with pytest.raises(RuntimeError, match="set_cpu_isa: isa must be one of .*generic, got mmx"):
        OPS.set_cpu_isa("mmx")
    assert OPS.cpu_isa() in names


TABLE = table_of_distances(26)
BAD_TABLES = [
    ((None, None, BUCKETS), "buckets must be given with .*, got buckets alone"),
    ((TABLE, None, None), "buckets must be given with .*, got no buckets"),
    ((TABLE[:1], None, BUCKETS), r"position_keys must be .* = \[2, \*, 26\], got float32 \[1, 4"),
    ((TABLE, TABLE[:, 1:], BUCKETS), r"position_queries must be .* = \[2, 4, 26\], got"),
    ((None, TABLE.bfloat16(), BUCKETS), "position_queries must be .* float32 .* got bfloat16"),
    ((TABLE, None, BUCKETS.long()), r"buckets must be contiguous int32 \[2R \+ 1\] .* got int64"),
    ((TABLE, None, BUCKETS[1:]), r"buckets must be \[2R \+ 1\], an odd number, got int32 \[2\]"),
    ((TABLE, None, BUCKETS + 1), r"buckets\[0\] must be in \[0, 4\), the rows of .*tables, got 4"),
]


@pytest.mark.parametrize(("tables", "message"), BAD_TABLES)
def test_tables_of_distances(tables: tuple[Tensor | None, ...], message: str) -> None:
    args = arguments("varlen_attention", torch.float32, RAGGED)
    with pytest.raises(RuntimeError, match=f"^varlen_attention: {message}"):
        OPS.varlen_attention.cpu(*args, False, 0, None, None, 0.0, *tables)
