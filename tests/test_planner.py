"""The batch planner: its promises, and that the native and the numpy planner agree to the bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sbert_fast import packing

_host = pytest.importorskip("sbert_fast._host", reason="the native planner is not built")

BATCH_PLANNERS = [packing.plan_batches_numpy, _host.plan_batches]
TILE_PLANNERS = [packing.plan_tiles_numpy, _host.plan_tiles]
PLANNER_IDS = ["numpy", "native"]

# Short texts, empty ones, ties, and texts above any budget. The longest also cross the length from
# which the native planner sorts by comparison instead of counting.
LENGTHS = st.lists(
    st.one_of(st.integers(0, 12), st.integers(0, 600), st.integers(60_000, 80_000)), max_size=60
)
BUDGETS = st.one_of(st.integers(1, 64), st.integers(1, 200_000), st.just(2**40))
SEQUENCES = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 300)), max_size=40)
TILES = st.one_of(st.integers(1, 16), st.integers(1, 400), st.just(2**40))

no_deadline = settings(deadline=None)


def _int32(lengths: list) -> NDArray[np.int32]:
    return np.array(lengths, dtype=np.int32)


@no_deadline
@given(lengths=LENGTHS, budget=BUDGETS)
def test_batches_native_equals_numpy(lengths: list[int], budget: int) -> None:
    expected = packing.plan_batches_numpy(_int32(lengths), budget)
    got = _host.plan_batches(_int32(lengths), budget)
    for want, have in zip(expected, got, strict=True):
        assert have.dtype == want.dtype == np.int64
        np.testing.assert_array_equal(have, want)


@no_deadline
@given(lengths=SEQUENCES, tile=TILES)
def test_tiles_native_equals_numpy(lengths: list[int], tile: int) -> None:
    expected = packing.plan_tiles_numpy(_int32(lengths), tile)
    got = _host.plan_tiles(_int32(lengths), tile)
    assert got.dtype == expected.dtype == np.int32
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("plan", BATCH_PLANNERS, ids=PLANNER_IDS)
@no_deadline
@given(lengths=LENGTHS, budget=BUDGETS)
def test_batches_keep_their_promises(plan: Callable, lengths: list[int], budget: int) -> None:
    order, starts = plan(_int32(lengths), budget)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    # A stable sort: ties are ordered by index.
    keys = [(-lengths[i], i) for i in order]
    assert keys == sorted(keys)

    assert starts[0] == 0
    assert starts[-1] == len(lengths)
    assert (np.diff(starts) > 0).all()
    batches = [order[a:b].tolist() for a, b in pairwise(starts)]
    tokens = [sum(lengths[i] for i in batch) for batch in batches]
    assert all(n <= budget or len(batch) == 1 for n, batch in zip(tokens, batches, strict=True))
    # Greedy: the first text of each batch did not fit into the one before.
    for used, batch in zip(tokens, batches[1:], strict=False):
        assert used + lengths[batch[0]] > budget


@pytest.mark.parametrize("plan", TILE_PLANNERS, ids=PLANNER_IDS)
@no_deadline
@given(lengths=SEQUENCES, tile=TILES)
def test_tiles_keep_their_promises(plan: Callable, lengths: list[int], tile: int) -> None:
    ends = np.cumsum([0, *lengths])
    tiles = plan(_int32(lengths), tile).tolist()
    # The tiles cover every token once, in order.
    assert [q for q, *_ in tiles] == [0, *(q_end for _, q_end, *_ in tiles)][: len(tiles)]
    assert (tiles[-1][1] if tiles else 0) == ends[-1]
    cuts: dict[int, int] = {}
    for q_start, q_end, first, count in tiles:
        assert 0 < q_end - q_start <= tile
        if lengths[first] > tile:
            assert count == 1
            assert ends[first] <= q_start < q_end <= ends[first + 1]
            cuts[first] = cuts.get(first, 0) + 1
        else:
            assert (q_start, q_end) == (ends[first], ends[first + count])
    for sequence, length in enumerate(lengths):
        assert cuts.get(sequence, 0) == (-(-length // tile) if length > tile else 0)


def test_examples_from_the_contract() -> None:
    order, starts = _host.plan_batches(_int32([3, 9, 3, 0, 20]), 10)
    assert order.tolist() == [4, 1, 0, 2, 3]
    assert starts.tolist() == [0, 1, 2, 5]
    # Two share a tile with an empty one; 10 tokens are cut by fours; empty ones alone make none.
    tiles = _host.plan_tiles(_int32([0, 2, 2, 10, 0, 0]), 4)
    assert tiles.tolist() == [[0, 4, 0, 3], [4, 8, 3, 1], [8, 12, 3, 1], [12, 14, 3, 1]]


@pytest.mark.parametrize("plan", BATCH_PLANNERS, ids=PLANNER_IDS)
def test_nothing_to_plan(plan: Callable) -> None:
    order, starts = plan(_int32([]), 8)
    assert order.shape == (0,)
    assert starts.tolist() == [0]


@pytest.mark.parametrize("plan", TILE_PLANNERS, ids=PLANNER_IDS)
def test_no_tiles_for_no_tokens(plan: Callable) -> None:
    assert plan(_int32([]), 8).shape == (0, 4)
    assert plan(_int32([0, 0]), 8).shape == (0, 4)


def test_one_endless_text_costs_no_endless_memory() -> None:
    order, starts = _host.plan_batches(_int32([1, 2**31 - 1, 5]), 8)
    assert order.tolist() == [1, 2, 0]
    assert starts.tolist() == [0, 1, 3]


# What `lengths` and the limit of a planner must not be, and words of the message.
BAD_ARGUMENTS = [
    (_int32([1, 2]), 0, ValueError, r"{limit} must be at least 1, got 0"),
    (_int32([1, 2]), -7, ValueError, r"{limit} must be at least 1, got -7"),
    (_int32([1, 2]), 8.0, TypeError, r"{limit} must be an int, got float 8\.0"),
    (_int32([1, 2]), True, TypeError, r"{limit} must be an int, got bool True"),
    (_int32([1, 2]), "8", TypeError, r"{limit} must be an int, got str '8'"),
    (_int32([1, 2]), None, TypeError, r"{limit} must be an int, got NoneType None"),
    (_int32([4, -2, -5]), 8, ValueError, r"lengths must be at least 0, got -5 at index 2"),
    (np.int32(3), 8, TypeError, r"lengths must be a numpy array int32 \[N\], got int32"),
    ([1, 2], 8, TypeError, r"lengths must be a numpy array int32 \[N\], got list"),
    (["a", "b"], 8, TypeError, r"lengths must be a numpy array int32 \[N\], got list"),
    (None, 8, TypeError, r"lengths must be a numpy array int32 \[N\], got NoneType"),
    (np.array([1, 2]), 8, ValueError, r"lengths must be int32 \[N\], got int64 with shape \[2\]"),
    (np.array([1.0, 2.0]), 8, ValueError, r"lengths must be int32 \[N\], got float64 with shape"),
    (np.array(["a"]), 8, ValueError, r"lengths must be int32 \[N\], got <U1 with shape \[1\]"),
    (
        _int32([[1, 2]]),
        8,
        ValueError,
        r"lengths must be int32 \[N\], got int32 with shape \[1, 2\]",
    ),
]


@pytest.fixture(params=PLANNER_IDS)
def planner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each planner; it is the one that the package uses for the test."""
    if request.param == "numpy":
        monkeypatch.setattr(packing, "_host", None)
    else:
        assert packing._host is _host
    return request.param


PUBLIC_PLANNERS = pytest.mark.parametrize(
    ("plan", "limit"), [(packing.plan_batches, "budget"), (packing.plan_tiles, "tile")]
)


@PUBLIC_PLANNERS
@pytest.mark.parametrize(("lengths", "value", "error", "message"), BAD_ARGUMENTS)
def test_both_planners_refuse_in_the_same_words(
    planner: str,
    plan: Callable,
    limit: str,
    lengths: Any,
    value: Any,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message.format(limit=limit)) as raised:
        plan(lengths, value)
    assert raised.type is error


@PUBLIC_PLANNERS
def test_both_planners_take_strides_and_any_limit(planner: str, plan: Callable, limit: str) -> None:
    lengths = _int32([7, 0, 7, 0, 7, 0])[::2]
    expected = plan(lengths.copy(), 1000)
    for value in (np.int32(1000), sys.maxsize, 2**80):
        for want, have in zip(expected, plan(lengths, value), strict=True):
            np.testing.assert_array_equal(have, want)


def test_tiles_refuse_offsets_beyond_int32(planner: str) -> None:
    with pytest.raises(ValueError, match=r"lengths must sum to less than 2\^31 tokens, got 2147"):
        packing.plan_tiles(_int32([2**31 - 1, 1]), 2**30)


# Callers of the native module itself.
NATIVE_REFUSALS = [
    (_int32([1, 2]), 0, r"{limit} must be at least 1, got 0"),
    (_int32([4, -2, -5]), 8, r"lengths must be at least 0, got -5 at index 2"),
    (_int32([[1, 2]]), 8, r"lengths must be int32 \[N\], got int32 with shape \[1, 2"),
    (np.array([1, 2]), 8, r"lengths must be int32 \[N\], got int64 with shape"),
    (_int32([1, 2, 3, 4])[::2], 8, "lengths must be contiguous, got a stride of 8 bytes"),
]


@pytest.mark.parametrize(("lengths", "value", "message"), NATIVE_REFUSALS)
def test_the_native_module_refuses_by_itself(
    lengths: NDArray[np.int32], value: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message.format(limit="budget")):
        _host.plan_batches(lengths, value)
    with pytest.raises(ValueError, match=message.format(limit="tile")):
        _host.plan_tiles(lengths, value)


class TestCpuFeatures:
    """The processor as the native module sees it, against what Linux says of it."""

    def test_agrees_with_linux(self) -> None:
        try:
            text = open("/proc/cpuinfo").read()
        except OSError:
            pytest.skip("no /proc/cpuinfo")
        lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
        flags = set(lines[0].partition(":")[2].split())
        linux_names = {
            "neon": "asimd",
            "neon_dotprod": "asimddp",
            "neon_i8mm": "i8mm",
            "neon_bf16": "bf16",
        }
        features = _host.cpu_features()
        expected = {name: linux_names.get(name, name) in flags for name in features}
        assert features == expected

    def test_has_a_name(self) -> None:
        assert _host.cpu_name().strip()
