"""Disentangled attention: products of queries and keys with rows of tables, by distance.

`q_i . position_keys[h, b]` and `position_queries[h, b] . k_j` are added to the score of query i and
key j; b is the row `buckets[clamp(j - i, -R, R) + R]` of the tables `[H, P, D]`.

A block of queries and one of keys are less than two blocks of distances apart. The rows of these
distances are read by their buckets and multiplied with all queries of the block, and with all keys:
two bands `[block, distances]`, in which the scores of a query lie one column further to the left
than those of the query before. Each score gathers its two products from there, in shared memory:
global memory holds nothing but the tables.

Half of a band belongs to no score. To multiply no row twice, the products of every token with every
row would have to lie in memory, `[T, H, P]`: in DeBERTa-v3 25 kB a token in half precision, five
times its q, k and v, and most of it for distances that a text of a few sentences does not have.

Numerics: products of the inputs' dtype, sums fp32; queries and keys are normed and turned before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sbert_fast.kernels.heads import load_qk


@triton.jit
def _swapped(x):
    """The last two dimensions in each other's place."""
    if len(x.shape) == 3:
        return tl.permute(x, (0, 2, 1))
    else:
        return tl.trans(x)


@triton.jit
def _products(
    x, x_side, table_ptr, origin, row,
    AHEAD: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block `x` `[..., BLOCK, WIDTH]` of queries, or of keys, with the rows of its distances from
    each of the others, all in one dimension: AHEAD is 1 for queries, -1 for keys."""
    rows, side = load_qk(
        table_ptr, origin, row, row >= 0, None, None, None, None, D, D, WIDTH, SIDE, False
    )
    SPAN: tl.constexpr = row.shape[0]
    BLOCK: tl.constexpr = SPAN // 2
    LINES: tl.constexpr = x.numel // x.shape[-1]
    x = tl.reshape(x, [LINES, x.shape[-1]])
    band = tl.dot(x, tl.trans(rows), input_precision=PRECISION)  # [LINES, SPAN] fp32
    if SIDE:
        x_side = tl.reshape(x_side, [LINES, x_side.shape[-1]])
        band = tl.dot(x_side, tl.trans(side), band, input_precision=PRECISION)
    line = tl.arange(0, LINES)[:, None]
    away = tl.arange(0, BLOCK)[None, :] - line % BLOCK
    at = line * SPAN + (BLOCK - 1 + away * AHEAD)
    # Of one dimension: a gather along one of several would shuffle every register of a line.
    return tl.gather(tl.reshape(band, [LINES * SPAN]), tl.reshape(at, [LINES * BLOCK]), 0)


@triton.jit
def add_products(
    scores, q, q_side, k, k_side, allowed, first, head, tables,
    D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`scores` `[..., BLOCK, BLOCK]` with what distances, from `first` on, add to those that are
    `allowed`: the others stay finite, also where rows of the tables are not.

    `tables` are position_keys and position_queries, one of them or both, buckets, P and R; or None.
    """
    keys_ptr, queries_ptr, buckets_ptr, table_rows, reach = tables
    if buckets_ptr is not None:
        ahead = first + tl.arange(0, 2 * scores.shape[-1])
        row = tl.load(buckets_ptr + tl.minimum(tl.maximum(ahead, -reach), reach) + reach)
        row = row.to(tl.int64)
        origin = head.to(tl.int64) * table_rows
        if keys_ptr is not None:
            terms = _products(q, q_side, keys_ptr, origin, row, 1, D, WIDTH, SIDE, PRECISION)
            scores += tl.where(allowed, tl.reshape(terms, scores.shape), 0.0)
        if queries_ptr is not None:
            terms = _products(k, k_side, queries_ptr, origin, row, -1, D, WIDTH, SIDE, PRECISION)
            scores += tl.where(allowed, _swapped(tl.reshape(terms, scores.shape)), 0.0)
    return scores
