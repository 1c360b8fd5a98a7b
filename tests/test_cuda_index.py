"""Which rows, keys and bytes the threads of the CUDA kernels have, against brute force."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import cuda_emulation

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
