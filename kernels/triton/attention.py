"""Attention over packed sequences: `softmax(scale * q k^T + bias) v`, a sequence at a time.

qkv `[T, 3, H, D]`, or `[T, H + 2 KV, D]` where heads share keys and values -> out `[T, H, D]`, both
contiguous. What disentangled attention adds to `q k^T` is told in `distances.py`. Which kernel
computes a sequence, and in which steps, depends on its own length, the head dim, the dtype and the
options, never on its batch, so a sequence keeps its bits wherever it lies:

* the short kernel takes sequences of at most 32 tokens (16 with D > 64, with tables by distance, or
  with rotary tables or norms of heads and D > 32 in half precision): of a few neighbours at once,
  those of at most 16 tokens, then the others. Each has one matrix of scores, on a warp of its own.
  It reads no table of tiles;
* the long kernel takes a tile, or a query block of a sequence, skips what is short, and lets the
  keys of a sequence pass in blocks of 64 (32 in fp32; half as many with D > 128, and with tables by
  distance, but at least 16), counted from the start of the sequence, with the streaming softmax.
  Causal attention ends with the last query.

No matrix holds two sequences: a block-diagonal tile would let a NaN of one reach the others as
`0 * NaN`, and would spend most of its softmax on zeros. The sums of a row have the same terms in
the same order whatever lies beside its sequence; slots beyond the end only add zeros after the last
term.

Numerics: products of the inputs' dtype, everything else fp32; softmax weights are rounded to the
inputs' dtype before they meet v, and queries and keys after their norm and rotation. Dropout comes
between the sum of softmax and v. fp32 inputs are multiplied as fp32, or as tf32 where torch's
`backends.cuda.matmul` says so. Exponentials are base 2, their factor folded into the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sbert_fast.kernels.distances import add_products
from sbert_fast.kernels.dropout import drop, staying
from sbert_fast.kernels.heads import (
    clear_dead_tail,
    load_heads,
    load_qk,
    restrict,
    softmax_weights,
    store_heads,
)


@triton.jit
def _group(
    qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
    origin, start, length, head, scale, reach, window, norm_eps, tables, drops,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    SIDE: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sequences `origin + start` `[GROUP]` of `length` `[GROUP]`, at most SLOTS, tokens."""
    slot = tl.arange(0, SLOTS)
    row = start[:, None] + slot[None, :]  # [GROUP, SLOTS]
    live = slot[None, :] < length[:, None]
    allowed = live[:, None, :]
    distance = (slot[None, :] - slot[:, None])[None, :, :]  # key minus query
    allowed = restrict(allowed, distance, window, WINDOW, CAUSAL)
    nothing = tl.full([GROUP, SLOTS], float("-inf"), tl.float32)
    ROW: tl.constexpr = (H + 2 * KV) * D

    for _ in tl.range(0, HEADS, num_stages=STAGES):
        at = qkv_ptr + head * D
        q, q_side = load_qk(
            at, origin, row, live, cos_ptr, sin_ptr, q_norm_ptr, norm_eps, ROW, D, WIDTH, SIDE,
            ROTARY,
        )  # fmt: skip
        if KV < H:
            at = qkv_ptr + head // (H // KV) * D
        k_at = at + H * D
        k, k_side = load_qk(
            k_at, origin, row, live, cos_ptr, sin_ptr, k_norm_ptr, norm_eps, ROW, D, WIDTH, SIDE,
            ROTARY,
        )  # fmt: skip
        v_at = at + (H + KV) * D
        v = load_heads(v_at, origin, row, live, None, None, ROW, D, WIDTH, False)
        scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION)
        if SIDE:
            k_rest = tl.permute(k_side, (0, 2, 1))
            scores = tl.dot(q_side, k_rest, scores, input_precision=PRECISION)
        scores = add_products(
            scores, q, q_side, k, k_side, allowed, 1 - SLOTS, head, tables, D, WIDTH, SIDE,
            PRECISION,
        )  # fmt: skip
        weights, _, _ = softmax_weights(
            scores, allowed, distance, nothing, scale, bias_ptr, head, reach, BIAS, PLAIN, False
        )
        total = tl.sum(weights, 2)
        weights = drop(weights, staying(drops, origin, row, head, 0, SLOTS), drops)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        result = (result * tl.expand_dims(1.0 / total, 2)).to(v.dtype)
        store_heads(out_ptr + head * D, origin, row, live, result, H * D, D, WIDTH)
        head += 1


@triton.jit(do_not_specialize=["tokens", "sequences", "reach", "window", "threshold"])
def short_kernel(
    qkv_ptr, out_ptr, cu_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
    keys_ptr, queries_ptr, buckets_ptr, seed_ptr,
    tokens, sequences, scale, reach, window, norm_eps, table_rows, table_reach, threshold, factor,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    SIDE: tl.constexpr, GROUP: tl.constexpr, SHORTEST: tl.constexpr, SHORT: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Those of GROUP sequences that are short, HEADS heads; and the dead tail.

    `tokens` T, `sequences` B; `scale` carries log2(e); `reach` is the R of the bias `[H, 2R + 1]`;
    the norms of heads are `[D]` fp32, or None, as is their eps; the tables by distance are told in
    `distances.py`, `table_rows` P, `table_reach` R, None where there is none; the seed of dropout,
    its threshold and the factor of what stays in `dropout.py`.
    """
    tables = (keys_ptr, queries_ptr, buckets_ptr, table_rows, table_reach)
    drops = (seed_ptr, threshold, factor)
    clear_dead_tail(out_ptr, tl.load(cu_ptr + sequences), tokens, H * D)
    HEAD_GROUPS: tl.constexpr = H // HEADS
    sequence = tl.program_id(0) // HEAD_GROUPS * GROUP
    head = tl.program_id(0) % HEAD_GROUPS * HEADS
    item = sequence + tl.arange(0, GROUP)
    start = tl.load(cu_ptr + item, mask=item < sequences, other=0)
    length = tl.load(cu_ptr + item + 1, mask=item < sequences, other=0) - start
    origin = tl.load(cu_ptr + tl.minimum(sequence, sequences))
    start -= origin
    origin = origin.to(tl.int64)

    shortest = tl.where(length <= SHORTEST, length, 0)
    if tl.max(shortest, 0) > 0:
        _group(
            qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
            origin, start, shortest, head, scale, reach, window, norm_eps, tables, drops, H, KV, D,
            HEADS, WIDTH, SIDE, GROUP, SHORTEST, STAGES, BIAS, WINDOW, CAUSAL, ROTARY, PLAIN,
            PRECISION,
        )  # fmt: skip
    if SHORT > SHORTEST:
        short = tl.where((length > SHORTEST) & (length <= SHORT), length, 0)
        if tl.max(short, 0) > 0:
            _group(
                qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
                origin, start, short, head, scale, reach, window, norm_eps, tables, drops, H, KV, D,
                HEADS, WIDTH, SIDE, GROUP, SHORT, STAGES, BIAS, WINDOW, CAUSAL, ROTARY, PLAIN,
                PRECISION,
            )  # fmt: skip


@triton.jit
def _long(
    qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
    start, end, q_start, q_end, head, scale, reach, window, norm_eps, tables, drops,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    SIDE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows `[q_start, q_end)`, at most BLOCK_Q, of the sequence `[start, end)`."""
    ROW: tl.constexpr = (H + 2 * KV) * D
    row, slot = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK)
    live = row < q_end - q_start
    first, stop = start, end
    if WINDOW:
        # Key blocks are counted from the start of the sequence, whatever the query block.
        skipped = tl.maximum(q_start - window - start, 0) // BLOCK
        first = start + skipped * BLOCK
        stop = tl.minimum(end, q_end + window)
    if CAUSAL:
        stop = q_end
    q_token = q_start.to(tl.int64)
    at = qkv_ptr + head * D
    q, q_side = load_qk(
        at, q_token, row, live, cos_ptr, sin_ptr, q_norm_ptr, norm_eps, ROW, D, WIDTH, SIDE, ROTARY
    )
    if KV < H:
        at = qkv_ptr + head // (H // KV) * D
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    for block in tl.range(first, stop, BLOCK, num_stages=STAGES):
        token = start.to(tl.int64) + (block - start)
        known = slot < end - block
        k, k_side = load_qk(
            at + H * D, token, slot, known, cos_ptr, sin_ptr, k_norm_ptr, norm_eps, ROW, D, WIDTH,
            SIDE, ROTARY,
        )  # fmt: skip
        v = load_heads(at + (H + KV) * D, token, slot, known, None, None, ROW, D, WIDTH, False)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK] fp32
        if SIDE:
            scores = tl.dot(q_side, tl.trans(k_side), scores, input_precision=PRECISION)
        distance = slot[None, :] - row[:, None] + (block - q_start)
        allowed = restrict(known[None, :], distance, window, WINDOW, CAUSAL)
        scores = add_products(
            scores, q, q_side, k, k_side, allowed, block - q_start - (BLOCK_Q - 1), head, tables, D,
            WIDTH, SIDE, PRECISION,
        )  # fmt: skip
        old = top
        weights, top, finite = softmax_weights(
            scores, allowed, distance, old, scale, bias_ptr, head, reach, BIAS, PLAIN, WINDOW
        )
        if PLAIN:
            shrink = tl.exp2((old - finite) * scale)
        else:
            shrink = tl.exp2(old - finite)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None]
        weights = drop(weights, staying(drops, q_token, row, head, block - start, BLOCK), drops)
        result = tl.dot(weights.to(v.dtype), v, result, input_precision=PRECISION)
    result = (result * (1.0 / total)[:, None]).to(q.dtype)
    store_heads(out_ptr + head * D, q_token, row, live, result, H * D, D, WIDTH)


@triton.jit(do_not_specialize=["q_blocks", "reach", "window", "threshold"])
def long_kernel(
    qkv_ptr, out_ptr, cu_ptr, tiles_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
    keys_ptr, queries_ptr, buckets_ptr, seed_ptr,
    q_blocks, scale, reach, window, norm_eps, table_rows, table_reach, threshold, factor,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
    SHORT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    TILES: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    ROTARY: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of the sequences of one tile that are longer than SHORT.

    Without a table of tiles, tile i is the query block `i % q_blocks` of sequence `i // q_blocks`.
    """
    LOOK_AHEAD: tl.constexpr = 16
    tables = (keys_ptr, queries_ptr, buckets_ptr, table_rows, table_reach)
    drops = (seed_ptr, threshold, factor)
    tile = tl.program_id(0) // H
    head = tl.program_id(0) % H
    if TILES:
        entry = tiles_ptr + tile.to(tl.int64) * 4
        q_start = tl.load(entry)
        q_end = tl.load(entry + 1)
        sequence = tl.load(entry + 2)
        last = sequence + tl.load(entry + 3)
    else:
        sequence = tile // q_blocks
        q_start = tl.load(cu_ptr + sequence) + tile % q_blocks * BLOCK_Q
        q_end = q_start + BLOCK_Q
        last = sequence + (q_start < tl.load(cu_ptr + sequence + 1)).to(tl.int32)

    # One level of loops: two, and their bounds, would cost the registers of a whole block.
    while sequence < last:
        item = tl.arange(0, LOOK_AHEAD)
        present = item < last - sequence
        starts = tl.load(cu_ptr + sequence + item, mask=present, other=0)
        ends = tl.load(cu_ptr + sequence + item + 1, mask=present, other=0)
        sequence += tl.min(tl.where(ends - starts > SHORT, item, LOOK_AHEAD), 0)
        if sequence < last:
            start = tl.load(cu_ptr + sequence)
            end = tl.load(cu_ptr + sequence + 1)
            q_start = tl.maximum(start, q_start)
            stop = tl.minimum(end, q_end)
            _long(
                qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
                start, end, q_start, tl.minimum(stop, q_start + BLOCK_Q), head, scale, reach,
                window, norm_eps, tables, drops, H, KV, D, WIDTH, SIDE, BLOCK_Q, BLOCK, STAGES,
                BIAS, WINDOW, CAUSAL, ROTARY, PLAIN, PRECISION,
            )  # fmt: skip
            q_start = tl.minimum(stop, q_start + BLOCK_Q)
            sequence += (q_start == stop).to(tl.int32)
