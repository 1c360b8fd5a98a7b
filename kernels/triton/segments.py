"""What the pooling kernels are made of: segments found, their tokens reduced, rows finished."""

from __future__ import annotations

import triton
import triton.language as tl

from sbert_fast.kernels.rows import (
    add_tiles,
    load_rows,
    load_vector,
    row_squares,
    scale_tiles,
    standardize,
    store_rows,
)

SHORT = tl.constexpr(32)
SLICE = tl.constexpr(128)
PIVOTS = tl.constexpr(128)
NORMALIZE_EPS = tl.constexpr(1e-12)

# Codes of the pooling modes, in the order of the op's.
CLS = tl.constexpr(1)
MAX = tl.constexpr(2)
MEAN_SQRT_LEN = tl.constexpr(3)
WEIGHTED_MEAN = tl.constexpr(4)
LAST_TOKEN = tl.constexpr(5)


@triton.jit
def token_range(ranges_ptr, segment, mask, SPANS: tl.constexpr):
    """Start and end of segments, in tokens: two neighbours of cu_seqlens, or a row of spans."""
    at = ranges_ptr + segment.to(tl.int64) * (2 if SPANS else 1)
    start = tl.load(at, mask=mask, other=0).to(tl.int64)
    return start, tl.load(at + 1, mask=mask, other=0).to(tl.int64)


@triton.jit
def kept_tokens(start, end, skip, POOLING: tl.constexpr):
    """The first of the tokens that are pooled, and their number."""
    length = end - start
    if POOLING == CLS:
        first, kept = start + tl.where(length > skip, skip, 0), tl.minimum(length, 1)
    elif POOLING == LAST_TOKEN:
        first, kept = end - 1, tl.where(length > skip, 1, 0)
    else:
        first, kept = start + skip, tl.maximum(length - skip, 0)
    return first, kept.to(tl.int32)


@triton.jit
def segment_at(cu_ptr, segments, position):
    """The last segment that starts at or before `position`."""
    low = segments * 0
    high = segments
    while high - low > 1:
        step = (high - low + PIVOTS - 1) // PIVOTS
        at = low + tl.arange(0, PIVOTS) * step
        starts = tl.load(cu_ptr + at, mask=at < high, other=0)
        low += (tl.sum(((at < high) & (starts <= position)).to(tl.int32), axis=0) - 1) * step
        high = tl.minimum(low + step, high)
    return low


@triton.jit
def _max_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def merge(a, b, POOLING: tl.constexpr):
    """Two tuples of tiles into one: the larger of each pair, or the sum."""
    if POOLING == MAX:
        tiles = ()
        for c in tl.static_range(len(a)):
            tiles = tiles + (_max_nan(a[c], b[c]),)
    else:
        tiles = add_tiles(a, b)
    return tiles


@triton.jit
def merge_rows(tiles, POOLING: tl.constexpr):
    """The rows of tiles into one, [1, CHUNK]."""
    out = ()
    for c in tl.static_range(len(tiles)):
        if POOLING == MAX:
            out = out + (tl.reduce(tiles[c], 0, _max_nan, keep_dims=True),)
        else:
            out = out + (tl.sum(tiles[c], axis=0, keep_dims=True),)
    return out


@triton.jit
def walk(
    x_ptr, x_stride, residual_ptr, bias_ptr, weight_ptr, ln_bias_ptr, eps,
    first, step: tl.constexpr, count, position,
    E: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    POOLING: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Tiles whose row r pools the `count[r]` tokens `first[r] + i * step`, the first of which has
    the weight `position[r]` in weighted pooling."""
    empty: tl.constexpr = float("-inf") if POOLING == MAX else 0.0
    total = ()
    for _ in tl.static_range(0, E, CHUNK):
        total = total + (tl.full((ROWS, CHUNK), empty, tl.float32),)
    NORM: tl.constexpr = weight_ptr is not None
    if bias_ptr is not None:
        bias = load_vector(bias_ptr, E, CHUNK, ROWS)
    if NORM and POOLING == MAX:
        weight = load_vector(weight_ptr, E, CHUNK, ROWS)
        ln_bias = load_vector(ln_bias_ptr, E, CHUNK, ROWS)
    for i in range(0, tl.max(count, axis=0), UNROLL):
        tokens = ()
        for u in tl.static_range(UNROLL):
            rows = first + (i + u) * step
            keep = i + u < count
            x = load_rows(x_ptr, rows * x_stride, keep, E, CHUNK)
            if residual_ptr is not None:
                x = add_tiles(x, load_rows(residual_ptr, rows * E, keep, E, CHUNK))
            tokens = tokens + (x,)
        pair = tokens[0]
        for u in tl.static_range(UNROLL):
            x = tokens[u]
            if NORM:
                if bias_ptr is not None:
                    x = add_tiles(x, bias)
                x = standardize(x, eps, E, CHUNK, RMS)
                if POOLING == MAX:
                    x = scale_tiles(x, weight, ln_bias)
            keep = (i + u < count)[:, None]
            factor = (position + (i + u) * step).to(tl.float32)[:, None]
            term = ()
            for c in tl.static_range(len(x)):
                tile = x[c]
                if POOLING == WEIGHTED_MEAN:
                    tile = tile * factor
                if NORM or POOLING == MAX:
                    tile = tl.where(keep, tile, empty)
                term = term + (tile,)
            # Tokens two by two, but not with a norm, whose registers are all taken.
            if NORM or UNROLL == 1:
                total = merge(total, term, POOLING)
            elif u % 2 == 0:
                pair = term
            else:
                total = merge(total, merge(pair, term, POOLING), POOLING)
    return total


@triton.jit
def finish(
    tiles, weight_ptr, ln_bias_ptr, kept, skipped, out_ptr, out_rows_ptr, segment, inside,
    out_stride, E: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    POOLING: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Pooled tokens to rows of the output: divide, weight and bias of the norm, L2, scatter.

    kept, skipped: tokens of each row that are pooled, and that come before them, [ROWS].
    """
    some = kept > 0
    tokens = kept.to(tl.float32)
    divisor = tl.full((ROWS,), 1.0, tl.float32)
    share = divisor  # of the bias of the norm
    if POOLING == MEAN_SQRT_LEN:
        divisor = tl.where(some, tl.sqrt_rn(tokens), 1.0)
        share = divisor
    elif POOLING == WEIGHTED_MEAN:
        kept64 = kept.to(tl.int64)
        weights = kept64 * skipped + kept64 * (kept64 + 1) // 2
        divisor = tl.where(some, weights.to(tl.float32), 1.0)
    elif POOLING == 0:
        divisor = tl.where(some, tokens, 1.0)
    inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), divisor)[:, None]
    pooled = ()
    for c in tl.static_range(len(tiles)):
        pooled = pooled + (tiles[c] * inverse,)
    if weight_ptr is not None and POOLING != MAX:
        weight = load_vector(weight_ptr, E, CHUNK, ROWS)
        ln_bias = load_vector(ln_bias_ptr, E, CHUNK, ROWS)
        shares = ()
        for c in tl.static_range(len(tiles)):
            shares = shares + (ln_bias[c] * share[:, None],)
        pooled = scale_tiles(pooled, weight, shares)
    rows = ()
    for c in tl.static_range(len(tiles)):
        rows = rows + (tl.where(some[:, None], pooled[c], 0.0),)
    if NORMALIZE:
        norm = tl.sqrt_rn(row_squares(rows))
        norm = tl.where(norm < NORMALIZE_EPS, NORMALIZE_EPS, norm)
        scale = tl.div_rn(tl.full((ROWS, 1), 1.0, tl.float32), norm)
        scaled = ()
        for c in tl.static_range(len(tiles)):
            scaled = scaled + (rows[c] * scale,)
        rows = scaled
    target = segment.to(tl.int64)
    if out_rows_ptr is not None:
        target = tl.load(out_rows_ptr + target, mask=inside, other=0).to(tl.int64)
    store_rows(out_ptr, target * out_stride, inside, rows, E, CHUNK)
