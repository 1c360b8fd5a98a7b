"""varlen_attention in CUDA C++: thread by thread on a CPU, and on a GPU.

The emulator runs the kernels of every GPU, and those of compute capability 9.0 where it is told so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulation
from attention_cases import (
    DEAD_TAIL,
    HEADS,
    KINDS,
    RAGGED,
    SHORT,
    Attend,
    Case,
    assert_dead_tail_is_zero,
    assert_nan_stays_in_its_sequence,
    assert_neighbours_change_no_bit,
    assert_nothing_to_attend,
    assert_place_changes_no_bit,
    assert_same_bits,
    check,
    tiles_of,
)
from sbert_fast.ops import extension

HALF, BFLOAT = torch.float16, torch.bfloat16
TINY = (9, 0, 1, 16, 17, 3, 32, 20, 0)
MANY = tuple(i % 37 for i in range(200))
LONG = (140, 5, 64, 300, 129, 128, 65)

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# Compute capability 9.0 has a long kernel of its own, and runs that of all others where it must.
GPU_BUT_SM90 = pytest.param("cuda but sm90", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("place", ["any", "sm90", GPU, GPU_BUT_SM90], indirect=True)
anywhere = pytest.mark.parametrize("place", ["any", GPU], indirect=True)
on_gpu = pytest.mark.parametrize("place", [GPU], indirect=True)
both_dtypes = pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)


def kernels(cases: list[tuple[str, torch.dtype]], *gpus: Any) -> pytest.MarkDecorator:
    """Places and dtypes. The emulator is slow: what does not depend on the dtype is tried in one
    there, and in both on a GPU."""
    there = [pytest.param(*g.values, d, marks=g.marks) for g in gpus for d in (HALF, BFLOAT)]
    return pytest.mark.parametrize(
        ("place", "dtype"), [*cases, *there], ids=str, indirect=["place"]
    )


every_kernel = kernels([("any", HALF), ("sm90", BFLOAT)], GPU, GPU_BUT_SM90)
any_half, any_bfloat = (kernels([("any", dtype)], GPU) for dtype in (HALF, BFLOAT))


@pytest.fixture
def place(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: None,
    poisoned_memory: None,
) -> Iterator[str]:
    """The device of the tensors; outputs hold NaN before a kernel runs."""
    if request.param.startswith("cuda"):
        if (reason := extension.cuda_refusal(torch.device("cuda"))) is not None:
            pytest.skip(reason)
        if request.param != "cuda":
            if torch.cuda.get_device_capability() != (9, 0):
                pytest.skip("the kernel of compute capability 9.0 does not run here")
            monkeypatch.setenv("SBERT_FAST_CUDA_SM90", "0")
        yield "cuda"
        return
    cuda_emulation.load()
    if request.param == "sm90":
        monkeypatch.setenv("SBF_EMULATED_SM90", "1")
    yield "cpu"


@pytest.fixture
def attend(place: str) -> Attend:
    """The op, its result back on the host."""

    def run(args: Sequence[Any]) -> Tensor:
        there = [a.to(place) if isinstance(a, Tensor) else a for a in args]
        return torch.ops.sbert_fast.varlen_attention.cuda(*there).cpu()

    return run


@everywhere
@both_dtypes
@pytest.mark.parametrize(("dim", "tile"), [(32, 128), (32, None), (64, None), (96, 64), (128, 128)])
def test_ragged_lengths(
    attend: Attend, place: str, dim: int, tile: int | None, dtype: torch.dtype
) -> None:
    lengths = RAGGED if dim == 64 or place == "cuda" else (*RAGGED[:-2], 260)
    check(Case(lengths, dim, dtype), attend, tile)


@any_bfloat
@pytest.mark.parametrize("dim", [8, 16, 24, 40, 72, 80, 104])
def test_any_head_dim(attend: Attend, dim: int, dtype: torch.dtype) -> None:
    check(Case(TINY, dim, dtype), attend)
    check(Case((5, 70, 20, 150), dim, dtype), attend)


@any_half
@pytest.mark.parametrize("tile", [None, 128])
def test_sequences_that_share_a_block(attend: Attend, tile: int | None, dtype: torch.dtype) -> None:
    check(Case(MANY, 32, dtype, heads=1), attend, tile)
    check(Case(TINY, 32, dtype, heads=13), attend, tile)
    check(Case((1,) * 70, 64, dtype), attend, tile)


@every_kernel
@pytest.mark.parametrize("heads", [1, 5])
def test_blocks_that_take_several_tiles(attend: Attend, heads: int, dtype: torch.dtype) -> None:
    for dim, tile in ((32, 128), (64, 300)):
        check(Case((*LONG, 130, 200), dim, dtype, heads=heads), attend, tile)


@any_half
@pytest.mark.parametrize(("reach", "dim"), [(0, 40), (3, 32), (128, 64), (20, 128)])
def test_relative_bias(attend: Attend, dim: int, reach: int, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 200), dim, dtype, reach=reach), attend)


@any_bfloat
@pytest.mark.parametrize(("window", "dim"), [(0, 32), (1, 64), (20, 72), (64, 128), (1000, 64)])
def test_window(attend: Attend, dim: int, window: int, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 300), dim, dtype, window=window), attend)
    check(Case((*SHORT, 200), dim, dtype, window=window, reach=9), attend, 128)


@every_kernel
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_any_scale(attend: Attend, scale: float, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 150), 32, dtype, scale=scale), attend)
    check(Case((*SHORT, 150), 32, dtype, scale=scale, reach=2, window=9), attend)


@everywhere
@both_dtypes
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_adversarial_inputs(attend: Attend, kind: str, dtype: torch.dtype) -> None:
    if dtype == HALF and kind in ("huge logits", "outlier channels"):
        return  # beyond what float16 holds, the inputs or the logits of the peer
    check(Case((12, 60, 150), 32, dtype, kind=kind, scale=0.25), attend)


@anywhere
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_nothing_to_attend(attend: Attend, lengths: tuple[int, ...]) -> None:
    assert_nothing_to_attend(attend, lengths, HALF)


@everywhere
def test_dead_tail_is_zero_whatever_it_holds(attend: Attend) -> None:
    assert_dead_tail_is_zero(attend, Case(LONG, 32, HALF).args())


@every_kernel
@pytest.mark.parametrize("options", [{}, {"reach": 4, "window": 50}], ids=["plain", "options"])
def test_neighbours_change_no_bit(
    attend: Attend, options: dict[str, int], dtype: torch.dtype
) -> None:
    case = Case((5, 0, 16, 30, 33, 140), 32, dtype, **options)
    assert_neighbours_change_no_bit(attend, case.args())


@everywhere
@pytest.mark.parametrize("part", range(3))
def test_nan_spreads_through_its_own_sequence_only(attend: Attend, part: int) -> None:
    assert_nan_stays_in_its_sequence(attend, part, HALF)


@everywhere
@pytest.mark.parametrize("window", [-1, 30])
def test_place_in_the_batch_changes_no_bit(attend: Attend, window: int) -> None:
    case = Case((*TINY, *SHORT, 200), 32, HALF, window=window)
    assert_place_changes_no_bit(attend, case.args())


@pytest.mark.parametrize("place", ["any", "sm90"], indirect=True)
@pytest.mark.parametrize("dim", [32, 128])
def test_order_of_threads_changes_no_bit(attend: Attend, dim: int) -> None:
    """Where a barrier is missing, some order of the threads reads what is not there yet."""
    args = Case((*TINY, 64, 65, 300), dim, HALF).args()
    args[-1] = tiles_of(args[1], 128)
    expected = attend(args)
    try:
        for seed in (0, 2, 3, 4, 5):
            cuda_emulation.set_order(seed)
            assert_same_bits(attend(args), expected)
    finally:
        cuda_emulation.set_order(1)


@pytest.mark.parametrize("place", ["sm90", GPU_BUT_SM90], indirect=True)
def test_compute_capability_9_has_a_kernel_of_its_own(
    attend: Attend, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = Case((330,), 64, HALF).args()
    one = attend(args)
    monkeypatch.delenv("SBERT_FAST_CUDA_SM90" if place == "cuda" else "SBF_EMULATED_SM90")
    assert not torch.equal(one, attend(args))


BAD = {
    "qkv must be float16": lambda a: [a[0].float(), *a[1:]],
    r"qkv must be contiguous .* \[T, 3, H, D\]": lambda a: [a[0][:, :2], *a[1:]],
    "D must be a multiple of 8": lambda a: [a[0][..., :20].contiguous(), *a[1:]],
    "qkv must begin at a multiple of 16": lambda a: [
        a[0].flatten()[1 : 1 - 3 * HEADS * 32].view(-1, 3, HEADS, 32),
        *a[1:],
    ],
    r"cu_seqlens must be contiguous int32 \[B \+ 1\]": lambda a: [a[0], a[1].long(), *a[2:]],
    "max_seqlen must not be negative": lambda a: [*a[:2], -1, *a[3:]],
    r"bias must be contiguous float32 \[H, 2R \+ 1\]": lambda a: [
        *a[:4],
        torch.zeros(HEADS + 1, 3),
        *a[5:],
    ],
    "bias must be .* odd": lambda a: [*a[:4], torch.zeros(HEADS, 4), *a[5:]],
    "window must be at least -1": lambda a: [*a[:5], -2, *a[6:]],
    "rotary_cos and rotary_sin must be None": lambda a: [
        *a[:6],
        torch.zeros(len(a[0]), 16),
        torch.zeros(len(a[0]), 16),
        a[8],
    ],
    r"tiles must be contiguous int32 \[n, 4\]": lambda a: [
        *a[:8],
        torch.zeros(3, 3, dtype=torch.int32),
    ],
}


@anywhere
@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_arguments(attend: Attend, place: str, message: str) -> None:
    # Changed where they are: a copy to a device is aligned again.
    args = [a.to(place) if isinstance(a, Tensor) else a for a in Case(SHORT, 32, HALF).args()]
    with pytest.raises(RuntimeError, match=f"varlen_attention: {message}"):
        attend(BAD[message](args))


@on_gpu
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_runs_repeat_bit_for_bit(attend: Attend, dim: int) -> None:
    args = Case(tuple(i * 7 % 300 for i in range(600)), dim, HALF, heads=12).args()
    expected = attend(args)
    for _ in range(5):
        assert_same_bits(attend(args), expected)


@on_gpu
def test_seventy_thousand_sequences_of_one_token(attend: Attend) -> None:
    args = Case((1,) * 70_000, 32, HALF).args()
    assert_same_bits(attend(args)[:-DEAD_TAIL], args[0][:-DEAD_TAIL, 2])
    args[2] = 200
    assert_same_bits(attend(args)[:-DEAD_TAIL], args[0][:-DEAD_TAIL, 2])


@on_gpu
def test_more_than_two_to_the_31_elements(place: str) -> None:
    op = torch.ops.sbert_fast.varlen_attention.cuda
    tokens, heads, dim = 1_000_000, 12, 64
    assert tokens * 3 * heads * dim > 2**31
    qkv = torch.randn(tokens, 3, heads, dim, device=place, dtype=HALF)
    for length in (16, 50, 200):
        cu = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=place)
        options = (length, dim**-0.5, None, -1, None, None, None)
        last = qkv[-length:].clone()
        one = torch.tensor([0, length], dtype=torch.int32, device=place)
        assert_same_bits(op(qkv, cu, *options)[-length:], op(last, one, *options))


@on_gpu
@pytest.mark.parametrize("length", [16, 100, 300])
def test_graphs_and_other_streams(place: str, length: int) -> None:
    case = Case((length,) * 40, 64, HALF, heads=12)
    args = [a.to(place) if isinstance(a, Tensor) else a for a in case.args()]
    op = torch.ops.sbert_fast.varlen_attention.cuda
    expected = op(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same_bits(op(*args), expected)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*args)
    args[0].copy_(args[0].flip(0))
    again = op(*args)
    graph.replay()
    assert_same_bits(out, again)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device(place: str) -> None:
    args = Case((*SHORT, 200), 64, HALF).args()
    results = []
    for index in (0, 1):
        there = [a.to(f"cuda:{index}") if isinstance(a, Tensor) else a for a in args]
        results.append(torch.ops.sbert_fast.varlen_attention.cuda(*there).cpu())
    assert_same_bits(*results)
