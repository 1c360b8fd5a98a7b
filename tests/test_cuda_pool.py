"""segment_pool and norm_pool in CUDA C++, run thread by thread on a CPU: figures, isolation, and
what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulation
from op_cases import add_norm_args, int32, pool_args, randn
from sbert_fast.ops import POOLING_MODES
from sbert_fast.testing import check_op

OPS = torch.ops.sbert_fast
HALVES = [torch.float16, torch.bfloat16]
# A group's segments, a team's, a block's: every border, and neighbours of every kind.
LENGTHS = [5, 0, 1, 15, 16, 17, 31, 33, 64, 0, 127, 128, 129, 300, 2, 0]
FEW_LENGTHS = [3, 0, 40, 1, 150, 16]
# Every layout of rows.
WIDTHS = [8, 24, 128, 136, 312, 384, 512, 768, 1024, 1032, 2048, 4096]
OPS_AND_MODES = [(op, mode) for op in ("segment_pool", "norm_pool") for mode in POOLING_MODES]
every_mode = pytest.mark.parametrize(("op", "mode"), OPS_AND_MODES)
both_ops = pytest.mark.parametrize("op", ["segment_pool", "norm_pool"])


@pytest.fixture(autouse=True)
def seeded(poisoned_memory: None) -> Iterator[None]:
    """Threads in a random order; unwritten memory is NaN."""
    torch.manual_seed(0)
    cuda_emulation.load()
    cuda_emulation.set_order(7)
    yield
    cuda_emulation.set_order(0)


def arguments(op: str, E: int, dtype: torch.dtype, mode: str, **options: Any) -> list[Any]:
    """The arguments of `op`, the dead tail NaN."""
    x, *how = pool_args(E, dtype, mode, **options)
    if op == "segment_pool":
        return [x, *how]
    _, bias, residual, *norm = add_norm_args(x.shape[0], E, dtype)
    return [x, bias, residual, *norm, *how]


def run(op: str, args: list[Any]) -> Tensor:
    return getattr(OPS, op).cuda(*args)


@every_mode
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("E", [24, 40])
def test_every_length(op: str, mode: str, dtype: torch.dtype, E: int) -> None:
    args = arguments(op, E, dtype, mode, lengths=LENGTHS, normalize=dtype != torch.bfloat16)
    out = run(op, args)
    check_op(op, out, args, torch.float32)
    assert not out[[i for i, length in enumerate(LENGTHS) if not length]].any()


@every_mode
@pytest.mark.parametrize("E", [768, 1032])
def test_every_length_of_wide_rows(op: str, mode: str, E: int) -> None:
    args = arguments(op, E, torch.float16, mode, lengths=[17, 0, 1, 16, 130, 100, 5])
    check_op(op, run(op, args), args, torch.float32)


@both_ops
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("E", WIDTHS)
def test_widths(op: str, mode: str, E: int, dtype: torch.dtype) -> None:
    args = arguments(op, E, dtype, mode, lengths=FEW_LENGTHS)
    check_op(op, run(op, args), args, torch.float32)


@both_ops
def test_a_long_document(op: str) -> None:
    args = arguments(op, 384, torch.float16, "weighted_mean", lengths=[8192])
    check_op(op, run(op, args), args, torch.float32)


@every_mode
@pytest.mark.parametrize("skip", [2, 17, 1000])
def test_skipped_tokens(op: str, mode: str, skip: int) -> None:
    args = arguments(op, 32, torch.float16, mode, lengths=[5, 0, 2, 18, 49, 17, 146], skip=skip)
    start = 5 + 2
    args[0][start : start + min(skip, 17)] = float("nan") if mode != "cls" else 7.0
    check_op(op, run(op, args), args, torch.float32)


@both_ops
@pytest.mark.parametrize("length", [3, 60])
def test_many_segments(op: str, length: int) -> None:
    """Blocks that own several segments of every kind."""
    lengths = (torch.rand(1500).pow(6) * 7 * length).int().tolist()
    args = arguments(op, 16, torch.float16, "mean", lengths=lengths)
    check_op(op, run(op, args), args, torch.float32)


@pytest.mark.parametrize("terms", ["bias", "residual", "neither"])
def test_optional_terms(terms: str) -> None:
    args = arguments("norm_pool", 40, torch.float16, "mean", lengths=FEW_LENGTHS)
    args[1] = args[1] if terms == "bias" else None
    args[2] = args[2] if terms == "residual" else None
    check_op("norm_pool", run("norm_pool", args), args, torch.float32)


@every_mode
def test_spans(op: str, mode: str) -> None:
    ranges = [[2, 9], [0, 200], [4, 4], [200, 200], [40, 73], [199, 200], [30, 50]]
    spans = torch.tensor(ranges, dtype=torch.int32)
    args = arguments(op, 48, torch.float16, mode, lengths=[150, 50], spans=spans, skip=1)
    check_op(op, run(op, args), args, torch.float32)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_a_strided_view_has_the_same_bits(mode: str) -> None:
    args = pool_args(40, torch.float16, mode, FEW_LENGTHS)
    expected = run("segment_pool", args)
    wide = torch.full((args[0].shape[0], 104), float("nan"), dtype=torch.float16)
    wide[:, 8:48] = args[0]
    assert torch.equal(run("segment_pool", [wide[:, 8:48], *args[1:]]), expected)


@both_ops
@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("column", [3, 4])
def test_rows_go_to_their_places(op: str, scattered: bool, column: int) -> None:
    args = arguments(op, 40, torch.float16, "mean", lengths=FEW_LENGTHS)
    rows = torch.randperm(9)[: len(FEW_LENGTHS)] if scattered else torch.arange(len(FEW_LENGTHS))
    wide = torch.full((9, 52), -7.0)
    expected = wide.clone()
    expected[rows, column : column + 40] = run(op, args)
    places = rows.int() if scattered else None
    out = wide[:, column : column + 40]
    assert getattr(OPS, f"{op}_out").cuda(*args, out, places) is None
    assert torch.equal(wide, expected)


@both_ops
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("length", [16, 40, 129, 300])
def test_segments_are_isolated(op: str, mode: str, dtype: torch.dtype, length: int) -> None:
    lengths = [7, 0, 45, length, 1, 130]
    args = arguments(op, 40, dtype, mode, lengths=lengths)
    expected = run(op, args)[3]
    assert expected.isfinite().all()
    whole = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() == 2]
    at = slice(52, 52 + length)
    alone = [args[i][at].clone() for i in whole]
    for i, part in zip(whole, alone, strict=True):
        args[i][:] = float("nan")
        args[i][at] = part
    assert torch.equal(run(op, args)[3], expected)
    for i, part in zip(whole, alone, strict=True):
        args[i] = part
    args[-5] = int32(0, length)
    assert torch.equal(run(op, args)[0], expected)


@both_ops
@pytest.mark.parametrize("E", [40, 1032])
def test_a_crowd_changes_no_bit(op: str, E: int) -> None:
    """The same segment alone, among short ones that share its block, among long ones."""
    expected: dict[int, Tensor] = {}
    for mates in ([], [3] * 700, [100] * 10):
        lengths = [11, 90, 140, *mates]
        args = arguments(op, E, torch.float16, "mean", lengths=lengths)
        torch.manual_seed(1)
        for i in [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() == 2]:
            args[i][:241] = randn(241, E, dtype=torch.float16)
        if op == "norm_pool":
            args[1], args[3], args[4] = randn(E), randn(E), randn(E)
        out = run(op, args)
        for row in range(3):
            assert torch.equal(out[row], expected.setdefault(row, out[row].clone()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_no_special_value_is_hidden(mode: str, value: float) -> None:
    lengths = [4, 40, 20, 140]
    args = pool_args(40, torch.float16, mode, lengths, normalize=False)
    # The first and the last token of every segment.
    args[0][[0, 3, 4, 43, 44, 63, 64, 203]] = value
    out = run("segment_pool", args)
    if mode == "max" and value < 0:
        assert out.isfinite().all()
    else:
        assert torch.equal(out, torch.full_like(out, value)) or out.isnan().all()


@both_ops
def test_nothing_to_pool(op: str) -> None:
    for lengths in ([], [0], [0] * 5):
        args = arguments(op, 16, torch.float16, "mean", lengths=lengths)
        out = run(op, args)
        assert out.shape == (len(lengths), 16) and not out.any()


@both_ops
def test_what_is_refused(op: str) -> None:
    def refused(message: str, at: int = 0, value: Any = None, E: int = 16) -> None:
        args = arguments(op, E, torch.float16, "mean", lengths=[3, 2])
        if value is not None:
            args[at] = value
        with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
            run(op, args)

    refused("x must have a multiple of 8 columns, at most 4096, .* got 20: impl='triton'", E=20)
    refused("x must be float16 or bfloat16, got float32", 0, randn(12, 16))
    refused("cu_seqlens must be contiguous int32", -5, torch.tensor([0, 3, 5]))
    refused("cu_seqlens must be int32", -5, int32())
    refused("skip must be at least 0, got -1", -2, -1)
    for out, rows, message in (
        (torch.zeros(1, 16), None, "out must have at least 2 rows"),
        (torch.zeros(2, 8), None, r"out must be float32 \[N, E\]"),
        (torch.zeros(2, 16).half(), None, r"out must be float32 \[N, E\]"),
        (torch.zeros(2, 16), int32(0), "out_rows must be contiguous int32"),
    ):
        args = [*arguments(op, 16, torch.float16, "mean", lengths=[3, 2]), out, rows]
        with pytest.raises(RuntimeError, match=f"^{op}_out: {message}"):
            run(f"{op}_out", args)


def test_views_that_are_not_aligned_are_refused() -> None:
    x, *how = pool_args(16, torch.float16, "mean", [3, 2])
    half = torch.float16
    for view, message in (
        (randn(12, 20, dtype=half)[:, :16], "must have rows a multiple of 8 columns apart"),
        (randn(12, 24, dtype=half)[:, 4:20], "must begin at a multiple of 16 bytes"),
        (randn(16, 12, dtype=half).T, r"must be \[T, E\] with unit inner stride"),
    ):
        with pytest.raises(RuntimeError, match=f"^segment_pool: x {message}"):
            run("segment_pool", [view, *how])
