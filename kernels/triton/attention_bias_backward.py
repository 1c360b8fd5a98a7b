"""The gradient of the bias of attention, in the terms of `attention_backward.py`: sums of ds by the
distance of keys from their queries.

Blocks of scores that are equally far from the diagonal hold the same distances in the same places.
So a program adds them up as they are, over some sequences, in their order and that of tokens. What
lies at one distance is left to torch: in a program, it would be a shuffle of every block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sbert_fast.kernels.attention_backward import load_statistics, product
from sbert_fast.kernels.dropout import drop, staying
from sbert_fast.kernels.heads import exponentials, load_heads, load_qk, logits, restrict

_NUMBERS = ["tokens", "sequences", "diagonals", "before", "reach", "window", "threshold"]


@triton.jit(do_not_specialize=_NUMBERS)
def bias_kernel(
    grad_ptr, qkv_ptr, stats_ptr, sums_ptr,
    cu_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, seed_ptr,
    tokens, sequences, diagonals, before, scale, reach, window, norm_eps, threshold, factor,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of ds, `[BLOCK, BLOCK]` fp32 of queries and keys, over TOGETHER sequences, of one
    head, and those blocks of keys that are `diagonal - before` blocks ahead of those of queries."""
    ROW: tl.constexpr = (H + 2 * KV) * D
    drops = (seed_ptr, threshold, factor)
    head = tl.program_id(0) % H
    ahead = tl.program_id(0) // H % diagonals - before
    sequence = tl.program_id(0) // H // diagonals * TOGETHER
    last = tl.minimum(sequence + TOGETHER, sequences)
    row = tl.arange(0, BLOCK)
    at = qkv_ptr + head * D
    kv_at = qkv_ptr + (H + head // (H // KV)) * D
    distance = row[None, :] - row[:, None] + ahead * BLOCK
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    while sequence < last:
        start = tl.load(cu_ptr + sequence)
        end = tl.load(cu_ptr + sequence + 1)
        q_start = start + tl.maximum(-ahead, 0) * BLOCK
        while tl.maximum(q_start, q_start + ahead * BLOCK) < end:
            token = q_start.to(tl.int64)
            live = row < end - q_start
            q, q_side = load_qk(
                at, token, row, live, cos_ptr, sin_ptr, q_norm_ptr, norm_eps, ROW, D, WIDTH, SIDE,
                ROTARY,
            )  # fmt: skip
            grad = load_heads(
                grad_ptr + head * D, token, row, live, None, None, H * D, D, WIDTH, False
            )
            top, inverse, centre = load_statistics(stats_ptr, head, token, row, live, tokens, H)
            token += ahead * BLOCK
            known = row < end - q_start - ahead * BLOCK
            k, k_side = load_qk(
                kv_at, token, row, known, cos_ptr, sin_ptr, k_norm_ptr, norm_eps, ROW, D, WIDTH,
                SIDE, ROTARY,
            )  # fmt: skip
            v = load_heads(kv_at + KV * D, token, row, known, None, None, ROW, D, WIDTH, False)
            there = known[None, :] & live[:, None]
            allowed = restrict(there, distance, window, WINDOW, CAUSAL)
            scores = product(q, q_side, k, k_side, SIDE, PRECISION)
            scores = logits(scores, allowed, distance, scale, bias_ptr, head, reach, BIAS, PLAIN)
            weights = exponentials(scores, top[:, None], scale, PLAIN) * inverse[:, None]
            slopes = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            first = q_start - start + ahead * BLOCK
            slopes = drop(slopes, staying(drops, q_start, row, head, first, BLOCK), drops)
            total += weights * (slopes - centre[:, None])
            q_start += BLOCK
        sequence += 1
    place = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCK)
    tl.store(sums_ptr + place + row[:, None] * BLOCK + row[None, :], total)
