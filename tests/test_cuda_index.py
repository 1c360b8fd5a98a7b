"""Which rows, keys, bytes and segments the threads of CUDA kernels have, against brute force."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import cuda_emulation
from sbert_fast.ops import POOLING_MODES

INT32_MAX = np.iinfo(np.int32).max


@pytest.fixture(scope="module")
def index() -> ctypes.CDLL:
    source = cuda_emulation.EMULATOR / "index.cu"
    return ctypes.CDLL(str(cuda_emulation.build("index", [source])))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def test_tiles_of_a_table_are_its_rows(index: ctypes.CDLL) -> None:
    table = np.array([[0, 7, 0, 3], [7, 135, 3, 1], [135, 200, 3, 1]], np.int32)
    cu_seqlens = np.array([0, 2, 2, 7, 200], np.int32)
    out = np.empty(4, np.int32)
    for i, (start, end, first, count) in enumerate(table):
        index.sbf_tile_of_sequences(pointer(table), i, 8, 4, pointer(out))
        assert out.tolist() == [start, end, first, first + count]
        index.sbf_tile_of_queries(pointer(table), pointer(cu_seqlens), i, 2, 128, pointer(out))
        assert out.tolist() == [start, end, first, first + count]


@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups_have_every_sequence_once(index: ctypes.CDLL, group: int) -> None:
    out = np.empty(4, np.int32)
    for sequences in range(30):
        seen: list[int] = []
        for i in range(-(-sequences // group)):
            index.sbf_tile_of_sequences(None, i, group, sequences, pointer(out))
            assert out[0] == 0 and out[1] == INT32_MAX
            seen += range(out[2], out[3])
        assert seen == list(range(sequences))


@pytest.mark.parametrize("rows", [1, 16, 128])
def test_query_blocks_have_every_query_once(index: ctypes.CDLL, rows: int) -> None:
    rng = np.random.default_rng(0)
    out = np.empty(4, np.int32)
    for origin in (0, INT32_MAX - 3000):  # sums of tokens and rows may pass 2^31
        lengths = rng.integers(0, 3 * rows + 2, 7)
        cu_seqlens = (origin + np.concatenate(([0], np.cumsum(lengths)))).astype(np.int32)
        blocks = max(1, -(-int(lengths.max()) // rows))
        seen: list[int] = []
        for i in range(len(lengths) * blocks):
            index.sbf_tile_of_queries(None, pointer(cu_seqlens), i, blocks, rows, pointer(out))
            assert out[3] == out[2] + 1
            assert cu_seqlens[out[2]] <= out[0] <= out[1] <= cu_seqlens[out[3]]
            seen += range(out[0], out[1])
        assert seen == list(range(cu_seqlens[0], cu_seqlens[-1]))


def test_windows_and_columns_of_a_bias(index: ctypes.CDLL) -> None:
    for distance in range(-40, 41):
        for reach in range(0, 20):
            assert bool(index.sbf_in_window(distance, reach)) == (abs(distance) <= reach)
            expected = int(np.clip(distance, -reach, reach)) + reach
            assert index.sbf_bias_column(distance, reach) == expected
        assert index.sbf_in_window(distance, -1)


@pytest.mark.parametrize("window", [-1, 0, 1, 5, 63, 64, 200, INT32_MAX])
def test_visible_keys_hold_every_key_that_is_seen(index: ctypes.CDLL, window: int) -> None:
    out = np.empty(2, np.int32)
    block = 64
    for length in (1, 63, 64, 65, 130, 300):
        for first in range(0, length, 7):
            for last in {first + 1, min(first + 128, length), length}:
                index.sbf_visible_keys(first, last, length, window, block, pointer(out))
                lowest = 0 if window < 0 else max(0, first - window)
                highest = length if window < 0 else min(length, last + window)
                assert out[0] == lowest // block * block and out[1] == highest


@pytest.mark.parametrize("name", ["pairs", "columns"])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_shared_memory_has_a_place_for_every_vector(
    index: ctypes.CDLL, width: int, name: str
) -> None:
    offset = getattr(index, f"sbf_offset_by_{name}")
    offsets = [offset(row, column, width) for row in range(64) for column in range(0, width, 8)]
    assert sorted(offsets) == list(range(0, 64 * width * 2, 16))


def banks(offsets: list[int]) -> set[int]:
    """Groups of four banks, of eight, that accesses of 16 bytes meet."""
    return {offset // 16 % 8 for offset in offsets}


@pytest.mark.parametrize("width", [32, 64, 128])
def test_accesses_meet_in_no_bank(index: ctypes.CDLL, width: int) -> None:
    """Eight lanes at a time: two rows of 64 bytes, or eight rows of one column."""
    for column in range(0, width, 32):
        for row in range(0, 64, 2):
            lanes = [(row + i // 4, column + i % 4 * 8) for i in range(8)]
            assert len(banks([index.sbf_offset_by_pairs(r, c, width) for r, c in lanes])) == 8
    for column in range(0, width, 8):
        for row in range(0, 64, 8):
            offsets = [index.sbf_offset_by_columns(row + i, column, width) for i in range(8)]
            assert len(banks(offsets)) == 8


SHORT_TOKENS, MEDIUM_TOKENS, TEAM = 16, 128, 128
MAX_OWNED, MANY_BLOCKS = 32, 256
# Rows of half a warp, of a warp, of four warps.
pool_layouts = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
pool_widths = pytest.mark.parametrize("E", [384, 768, 2048])


class PoolShape:
    """Threads of a pooling block, of a row, and the segments that a block can own."""

    def __init__(self, index: ctypes.CDLL, E: int, norm: bool) -> None:
        out = np.empty(3, np.int32)
        index.sbf_pool_shape(E, norm, pointer(out))
        self.threads, self.lanes, self.owned = out.tolist()
        self._index, self._row = index, (E, norm)

    def plan(
        self, ranges: np.ndarray, blocks: int, mode: str = "mean", skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, rounds and teams of the blocks, as in index.cu; -7 where nothing was written."""
        spans = ranges.ndim == 2
        tokens = np.full((blocks, MAX_OWNED, 3), -7, np.int32)
        rounds = np.full((blocks, 3), -7, np.int32)
        teams = np.full((blocks, MAX_OWNED + 1, self.threads, 3), -7, np.int32)
        error = ctypes.create_string_buffer(1000)
        self._index.sbf_plan_pool(
            *self._row,
            POOLING_MODES.index(mode),
            ctypes.c_int64(skip),
            pointer(ranges),
            spans,
            ctypes.c_int64(len(ranges) - (not spans)),
            ctypes.c_int64(blocks),
            *map(pointer, (tokens, rounds, teams)),
            error,
            ctypes.c_size_t(len(error)),
        )
        assert not error.value, error.value.decode()
        return tokens, rounds, teams


def cu_seqlens_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


@pool_widths
@pool_layouts
@pytest.mark.parametrize(
    "choices",
    [[0, 1, 16], [17, 128], [129, 1000], [0, 1, 16, 17, 128, 129], [1] * 8 + [50, 500]],
    ids=["short", "medium", "long", "borders", "few long"],
)
def test_every_segment_has_its_threads_once(
    index: ctypes.CDLL, E: int, norm: bool, choices: list[int]
) -> None:
    shape, rng, blocks = PoolShape(index, E, norm), np.random.default_rng(0), 3
    for owned in range(1, shape.owned + 1):
        # The last block owns one less.
        lengths = rng.choice(choices, blocks * owned - 1)
        tokens, rounds, teams = shape.plan(cu_seqlens_of(lengths), blocks)
        for block in range(blocks):
            own = lengths[block::blocks]
            assert tokens[block, :, 1].tolist() == [*own, *[-1] * (MAX_OWNED - len(own))]
            assert_planned(shape, own, rounds[block], teams[block])


def assert_planned(
    shape: PoolShape, lengths: np.ndarray, rounds: np.ndarray, teams: np.ndarray
) -> None:
    """A block of segments of `lengths` tokens gives each its threads, in one round."""
    begin, first_long, end = rounds.tolist()
    threads = np.arange(shape.threads)
    has_teams = shape.lanes < TEAM
    most_of_team = MEDIUM_TOKENS if has_teams else SHORT_TOKENS
    medium = sum(SHORT_TOKENS < n <= most_of_team for n in lengths)
    assert begin == (0 if (lengths <= SHORT_TOKENS).any() else 1)
    assert first_long == 1 + -(-medium // (shape.threads // TEAM))
    assert end == first_long + (lengths > most_of_team).sum() <= MAX_OWNED + 1
    assert set(teams[begin:end, :, 0].flat) <= {-1, *range(len(lengths))}
    assert (teams[:begin] == -7).all() and (teams[end:] == -7).all()
    for segment, length in enumerate(lengths):
        where, own = np.nonzero(teams[:, :, 0] == segment)
        assert len(set(where)) == 1
        round, (_, groups, group) = where[0], teams[where[0], own].T
        if length <= SHORT_TOKENS:
            assert round == 0
            assert own.tolist() == threads[threads // shape.lanes == segment].tolist()
            assert (groups == 1).all() and not group.any()
            continue
        if length <= most_of_team:
            assert 1 <= round < first_long
            assert own.tolist() == threads[threads // TEAM == own[0] // TEAM].tolist()
        else:
            assert round >= first_long
            assert own.tolist() == threads.tolist()
        assert (groups == len(own) // shape.lanes).all()
        assert group.tolist() == ((own - own[0]) // shape.lanes).tolist()


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("skip", [0, 1, 5, 2**40])
def test_tokens_of_a_segment(index: ctypes.CDLL, mode: str, skip: int) -> None:
    rng = np.random.default_rng(0)
    shape, blocks = PoolShape(index, 384, False), 2
    near_the_end = INT32_MAX - 100 + cu_seqlens_of(np.arange(13))
    starts = rng.integers(0, 100, 40)
    spans = np.stack((starts, starts + rng.integers(0, 20, 40)), 1).astype(np.int32)
    for ranges in (cu_seqlens_of(rng.integers(0, 9, 60)), near_the_end.astype(np.int32), spans):
        tokens, _, _ = shape.plan(ranges, blocks, mode, skip)
        pairs = ranges if ranges.ndim == 2 else np.stack((ranges[:-1], ranges[1:]), 1)
        for segment, (start, end) in enumerate(pairs.tolist()):
            expected = range(start, end)[skip:]
            if mode == "cls":
                expected = expected[:1] or range(start, end)[:1]
            elif mode == "last_token":
                expected = expected[-1:]
            first, kept, before = tokens[segment % blocks, segment // blocks].tolist()
            assert kept == len(expected)
            if kept:
                assert (first, before) == (expected[0], expected[0] - start)


@pool_widths
@pool_layouts
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_blocks_can_own_their_segments(index: ctypes.CDLL, E: int, norm: bool, mode: str) -> None:
    index.sbf_count_pool_blocks.restype = ctypes.c_int64
    shape = PoolShape(index, E, norm)
    for segments in (1, 2, 255, 256, 511, 512, 513, 10_000, INT32_MAX):
        for average in (0, 1, 16, 17, 128, 129):
            T = ctypes.c_int64(segments * average)
            count = ctypes.c_int64(segments)
            how = (E, norm, POOLING_MODES.index(mode), T, count)
            blocks = index.sbf_count_pool_blocks(*how)
            assert min(segments, MANY_BLOCKS) <= blocks <= segments
            assert -(-segments // blocks) <= shape.owned
            if mode == "mean" and average > MEDIUM_TOKENS:
                assert blocks == segments
