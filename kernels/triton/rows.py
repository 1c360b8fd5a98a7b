"""Rows of E columns as a tuple of `[ROWS, CHUNK]` tiles, and LayerNorm and RMSNorm over them.

A tile has a power of two of columns, and few widths are one: 384 is three chunks of 128, where one
padded tile would idle a quarter of its lanes. A chunk is no wider than what a warp (for wide rows,
the program) loads at once in 16-byte pieces, so all tiles of a row share one layout, sums over the
chunks stay inside a thread and one reduction finishes the row. A row of up to 1,024 columns stays
within one warp, so its statistics need no shared memory. Rows have at most 4,096 columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_WIDTH = 4096
WARPS = 4
_LANES = 32
_MAX_PER_LANE = 32


class RowTile(NamedTuple):
    """How a program holds rows: `rows` of them at once, `per_lane` fp32 values in every lane of its
    `warps`."""

    chunk: int
    rows: int
    per_lane: int
    warps: int


def row_tile(width: int, dtype: torch.dtype, most: int = _MAX_PER_LANE) -> RowTile:
    """The tile for rows of `width` elements of `dtype`, with at most `most` values in a lane if it
    can be; it depends on nothing else.

    Raises:
        ValueError: `width` is not in [1, 4096].
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"the Triton kernels take rows of 1 to {MAX_WIDTH} columns, got {width}")
    vector = 16 // dtype.itemsize
    span = 1
    while width > span * _LANES * most:
        span *= 2
    best: tuple[int, RowTile] | None = None
    for lanes in (span * _LANES, span * _LANES // 2, span * _LANES // 4):
        chunk = lanes * vector
        padded = -(-width // chunk) * chunk
        warps = max(WARPS, lanes // _LANES)
        tile = RowTile(chunk, warps * _LANES // lanes, padded // lanes, warps)
        if best is None or (padded < best[0] and tile.per_lane <= most):
            best = padded, tile
    assert best is not None
    return best[1]


@triton.jit
def load_rows(ptr, offsets, keep, E: tl.constexpr, CHUNK: tl.constexpr):
    """Tiles in fp32 of the rows at element `offsets` [ROWS]; zeros where not `keep` [ROWS]."""
    tiles = ()
    for start in tl.static_range(0, E, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        mask = keep[:, None]
        if start + CHUNK > E:
            mask = mask & (cols < E)[None, :]
        at = ptr + offsets[:, None] + cols[None, :]
        tiles = tiles + (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def store_rows(ptr, offsets, keep, tiles, E: tl.constexpr, CHUNK: tl.constexpr):
    """Write tiles to the rows at element `offsets` [ROWS] where `keep` [ROWS]."""
    for start in tl.static_range(0, E, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        mask = keep[:, None]
        if start + CHUNK > E:
            mask = mask & (cols < E)[None, :]
        tile = tiles[start // CHUNK].to(ptr.dtype.element_ty)
        tl.store(ptr + offsets[:, None] + cols[None, :], tile, mask=mask)


@triton.jit
def load_vector(ptr, E: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """A vector [E] repeated over rows, fp32, zeros beyond E.

    Tiles of the full shape get the layout of the rows; a `[1, CHUNK]` tile gets one of its own, and
    the compiler then moves every row through shared memory to meet it.
    """
    rows = tl.zeros((ROWS,), tl.int32)
    return load_rows(ptr, rows, rows == 0, E, CHUNK)


@triton.jit
def add_tiles(a, b):
    """The sum of two tuples of tiles."""
    tiles = ()
    for c in tl.static_range(len(a)):
        tiles = tiles + (a[c] + b[c],)
    return tiles


@triton.jit
def multiply_tiles(a, b):
    """The products of two tuples of tiles."""
    tiles = ()
    for c in tl.static_range(len(a)):
        tiles = tiles + (a[c] * b[c],)
    return tiles


@triton.jit
def scale_tiles(a, weight, bias):
    """`a * weight + bias`, tuples of tiles."""
    tiles = ()
    for c in tl.static_range(len(a)):
        tiles = tiles + (a[c] * weight[c] + bias[c],)
    return tiles


@triton.jit
def row_sum(tiles):
    """The sum of every row, [ROWS, 1]."""
    total = tiles[0]
    for c in tl.static_range(1, len(tiles)):
        total += tiles[c]
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def row_squares(tiles):
    """The sum of squares of every row, [ROWS, 1]."""
    total = tiles[0] * tiles[0]
    for c in tl.static_range(1, len(tiles)):
        total += tiles[c] * tiles[c]
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def row_mean(total, E: tl.constexpr):
    """The means of rows of E columns, of their sums."""
    return tl.div_rn(total, tl.full((1, 1), E, tl.float32))


@triton.jit
def centre(tiles, E: tl.constexpr, CHUNK: tl.constexpr, RMS: tl.constexpr):
    """`x - mean` of every row, with RMS the rows themselves. Columns beyond E are zeros."""
    if RMS:
        centred = tiles
    else:
        mean = row_mean(row_sum(tiles), E)
        centred = ()
        for start in tl.static_range(0, E, CHUNK):
            tile = tiles[start // CHUNK] - mean
            if start + CHUNK > E:
                cols = start + tl.arange(0, CHUNK)
                tile = tl.where((cols < E)[None, :], tile, 0.0)
            centred = centred + (tile,)
    return centred


@triton.jit
def inverse_deviation(centred, eps, E: tl.constexpr):
    """`1 / sqrt(mean of squares + eps)` of every row, [ROWS, 1]."""
    return tl.rsqrt(row_mean(row_squares(centred), E) + eps)


@triton.jit
def standardize(tiles, eps, E: tl.constexpr, CHUNK: tl.constexpr, RMS: tl.constexpr):
    """`(x - mean) / sqrt(variance + eps)` of every row, in two passes over registers; with RMS,
    `x / sqrt(mean of squares + eps)`. Columns beyond E are zeros."""
    centred = centre(tiles, E, CHUNK, RMS)
    scale = inverse_deviation(centred, eps, E)
    out = ()
    for c in tl.static_range(len(centred)):
        out = out + (centred[c] * scale,)
    return out
