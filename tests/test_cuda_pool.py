"""segment_pool and norm_pool in CUDA C++, thread by thread on a CPU, and on a GPU: figures,
isolation, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import assert_same_bits
from cuda_places import (
    Run,
    assert_devices_agree,
    assert_streams_and_graphs,
    enter,
    needs_memory,
    roomy,
    runner,
    there,
    two_gpus,
)
from op_cases import add_norm_args, int32, norm_parameters, pool_args, randn
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
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_gpu = pytest.mark.parametrize("place", [GPU], indirect=True)
both_ops = pytest.mark.parametrize("op", ["segment_pool", "norm_pool"])


@pytest.fixture(autouse=True, params=[7, GPU])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Threads in a random order, and those of a GPU."""
    yield from enter(request)


@pytest.fixture
def run(place: str) -> Run:
    return runner(place)


def arguments(op: str, E: int, dtype: torch.dtype, mode: str, **options: Any) -> list[Any]:
    """The arguments of `op`, the dead tail NaN."""
    x, *how = pool_args(E, dtype, mode, **options)
    if op == "segment_pool":
        return [x, *how]
    _, bias, residual, *norm = add_norm_args(x.shape[0], E, dtype)
    return [x, bias, residual, *norm, *how]


@every_mode
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("E", [24, 40])
def test_every_length(run: Run, op: str, mode: str, dtype: torch.dtype, E: int) -> None:
    args = arguments(op, E, dtype, mode, lengths=LENGTHS, normalize=dtype != torch.bfloat16)
    out = run(op, args)
    check_op(op, out, args, torch.float32)
    assert not out[[i for i, length in enumerate(LENGTHS) if not length]].any()


@every_mode
@pytest.mark.parametrize("E", [768, 1032])
def test_every_length_of_wide_rows(run: Run, op: str, mode: str, E: int) -> None:
    args = arguments(op, E, torch.float16, mode, lengths=[17, 0, 1, 16, 130, 100, 5])
    check_op(op, run(op, args), args, torch.float32)


@both_ops
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("E", WIDTHS)
def test_widths(run: Run, op: str, mode: str, E: int, dtype: torch.dtype) -> None:
    args = arguments(op, E, dtype, mode, lengths=FEW_LENGTHS)
    check_op(op, run(op, args), args, torch.float32)


@both_ops
def test_a_long_document(run: Run, op: str) -> None:
    args = arguments(op, 384, torch.float16, "weighted_mean", lengths=[8192])
    check_op(op, run(op, args), args, torch.float32)


@every_mode
@pytest.mark.parametrize("skip", [2, 17, 1000])
def test_skipped_tokens(run: Run, op: str, mode: str, skip: int) -> None:
    args = arguments(op, 32, torch.float16, mode, lengths=[5, 0, 2, 18, 49, 17, 146], skip=skip)
    start = 5 + 2
    args[0][start : start + min(skip, 17)] = float("nan") if mode != "cls" else 7.0
    check_op(op, run(op, args), args, torch.float32)


@both_ops
@pytest.mark.parametrize("length", [3, 60])
def test_many_segments(run: Run, op: str, length: int) -> None:
    """Blocks that own several segments of every kind."""
    lengths = (torch.rand(1500).pow(6) * 7 * length).int().tolist()
    args = arguments(op, 16, torch.float16, "mean", lengths=lengths)
    check_op(op, run(op, args), args, torch.float32)


@pytest.mark.parametrize("terms", ["bias", "residual", "neither"])
def test_optional_terms(run: Run, terms: str) -> None:
    args = arguments("norm_pool", 40, torch.float16, "mean", lengths=FEW_LENGTHS)
    args[1] = args[1] if terms == "bias" else None
    args[2] = args[2] if terms == "residual" else None
    check_op("norm_pool", run("norm_pool", args), args, torch.float32)


@every_mode
def test_spans(run: Run, op: str, mode: str) -> None:
    ranges = [[2, 9], [0, 200], [4, 4], [200, 200], [40, 73], [199, 200], [30, 50]]
    spans = torch.tensor(ranges, dtype=torch.int32)
    args = arguments(op, 48, torch.float16, mode, lengths=[150, 50], spans=spans, skip=1)
    check_op(op, run(op, args), args, torch.float32)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_a_strided_view_has_the_same_bits(run: Run, place: str, mode: str) -> None:
    args = pool_args(40, torch.float16, mode, FEW_LENGTHS)
    expected = run("segment_pool", args)
    wide = torch.full((args[0].shape[0], 104), float("nan"), dtype=torch.float16, device=place)
    wide[:, 8:48] = args[0].to(place)
    assert torch.equal(run("segment_pool", [wide[:, 8:48], *args[1:]]), expected)


@both_ops
@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("column", [3, 4])
def test_rows_go_to_their_places(
    run: Run, place: str, op: str, scattered: bool, column: int
) -> None:
    args = arguments(op, 40, torch.float16, "mean", lengths=FEW_LENGTHS)
    rows = torch.randperm(9)[: len(FEW_LENGTHS)] if scattered else torch.arange(len(FEW_LENGTHS))
    wide = torch.full((9, 52), -7.0)
    expected = wide.clone()
    expected[rows, column : column + 40] = run(op, args)
    wide = wide.to(place)
    out, places = wide[:, column : column + 40], rows.int() if scattered else None
    assert getattr(OPS, f"{op}_out").cuda(*there([*args, out, places], place)) is None
    assert torch.equal(wide.cpu(), expected)


@both_ops
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("length", [16, 40, 129, 300])
def test_segments_are_isolated(
    run: Run, op: str, mode: str, dtype: torch.dtype, length: int
) -> None:
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
def test_a_crowd_changes_no_bit(run: Run, op: str, E: int) -> None:
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
def test_no_special_value_is_hidden(run: Run, mode: str, value: float) -> None:
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
def test_nothing_to_pool(run: Run, op: str) -> None:
    for lengths in ([], [0], [0] * 5):
        args = arguments(op, 16, torch.float16, "mean", lengths=lengths)
        out = run(op, args)
        assert out.shape == (len(lengths), 16) and not out.any()


@both_ops
def test_what_is_refused(run: Run, place: str, op: str) -> None:
    def base(E: int = 16) -> list[Any]:
        args = arguments(op, E, torch.float16, "mean", lengths=[3, 2])
        return [roomy(a, place) for a in args]

    def refused(message: str, at: int = 0, value: Any = None, E: int = 16) -> None:
        args = base(E)
        if value is not None:
            args[at] = roomy(value, place)
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
        args = [*base(), roomy(out, place), roomy(rows, place)]
        with pytest.raises(RuntimeError, match=f"^{op}_out: {message}"):
            getattr(OPS, f"{op}_out").cuda(*args)


def test_views_that_are_not_aligned_are_refused(run: Run, place: str) -> None:
    x, *how = pool_args(16, torch.float16, "mean", [3, 2])
    half = torch.float16
    # Views of what is on the device already: a copy would be aligned.
    for view, message in (
        (roomy(randn(12, 20, dtype=half), place)[:, :16], "must have rows a multiple of 8 columns"),
        (roomy(randn(12, 24, dtype=half), place)[:, 4:20], "must begin at a multiple of 16 bytes"),
        (roomy(randn(16, 12, dtype=half), place).T, r"must be \[T, E\] with unit inner stride"),
    ):
        with pytest.raises(RuntimeError, match=f"^segment_pool: x {message}"):
            run("segment_pool", [view, *how])


@on_gpu
@both_ops
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_runs_repeat_bit_for_bit(place: str, op: str, mode: str) -> None:
    lengths = [i * 7 % 300 for i in range(600)]
    args = there(arguments(op, 384, torch.float16, mode, lengths=lengths), place)
    expected = getattr(OPS, op).cuda(*args)
    for _ in range(5):
        assert_same_bits(getattr(OPS, op).cuda(*args), expected)


@on_gpu
@both_ops
@pytest.mark.parametrize("E", [384, 2048])
def test_streams_and_graphs(place: str, op: str, E: int) -> None:
    lengths = [5, 0, 16, 60, 128, 300] * 5
    args = arguments(op, E, torch.float16, "weighted_mean", lengths=lengths)
    assert_streams_and_graphs(op, there(args, place))


@on_gpu
@two_gpus
@both_ops
def test_tensors_of_another_device(op: str) -> None:
    assert_devices_agree(op, arguments(op, 384, torch.float16, "mean", lengths=LENGTHS))


@on_gpu
@both_ops
def test_more_than_two_to_the_31_elements(place: str, op: str) -> None:
    """Of x, of the residual, and of the output where every token is a segment."""
    needs_memory(40)
    T, E = 2_100_000, 1024
    assert T * E > 2**31
    rows = [torch.randn(T, E, dtype=torch.float16, device=place)]
    norm: list[Any] = []
    if op == "norm_pool":
        rows.append(torch.randn_like(rows[0]))
        norm = there([*norm_parameters(E), 1e-5], place)
    how = (POOLING_MODES.index("mean"), True, 0, None)

    def pool(rows: list[Tensor], cu_seqlens: Tensor) -> Tensor:
        x, *residual = rows
        args = [x, None, *residual, *norm] if norm else [x]
        return getattr(OPS, op).cuda(*args, cu_seqlens, *how)

    for length in (1, 100, 1000):
        cu_seqlens = torch.arange(0, T + 1, length, dtype=torch.int32, device=place)
        last = pool(rows, cu_seqlens)[-1:].cpu()
        alone = pool([r[-length:].clone() for r in rows], int32(0, length).to(place))
        assert_same_bits(last, alone.cpu())
