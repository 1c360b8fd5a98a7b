"""The gradients of attention over packed sequences; `attention.py` tells what is differentiated.

With the weights p of a query i, `dp_ij = grad_i . v_j` and `centre_i = sum_j p_ij dp_ij`:

    ds = p (dp - centre);  d_q = scale * ds k;  d_k = scale * ds^T q;  d_v = p^T grad

Dropout multiplies p by a mask where it meets values, and dp as well. Nothing is kept of the forward
pass. Each row of a result has one program that writes it, and that adds in the order of tokens:

* `query_kernel`: a block of queries of one head. The keys pass twice: for the maximum and the sum
  of softmax and the centre, which the other kernels read, and for d_q;
* `key_kernel`: a block of keys of one head, and the queries that see it, of all heads that share
  the keys, one head after the other;
* `bias_kernel` of `attention_bias_backward.py`, where there is a bias: sums of ds.

Blocks are counted from the start of a sequence, so its gradients depend on nothing beside it.
Queries and keys that are normed or rotated are held in halves: the gradients of both meet again
where they are turned back.

Numerics: as forward; p and ds are rounded to the dtype of qkv before they are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sbert_fast.kernels.dropout import drop, staying
from sbert_fast.kernels.heads import (
    clear_dead_tail,
    exponentials,
    load_heads,
    load_qk,
    logits,
    restrict,
    softmax_weights,
    store_gradient,
    store_heads,
)


@triton.jit
def product(a, a_side, b, b_side, SIDE: tl.constexpr, PRECISION: tl.constexpr):
    """`a b^T`, of two halves each where they have a width."""
    out = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if SIDE:
        out = tl.dot(a_side, tl.trans(b_side), out, input_precision=PRECISION)
    return out


@triton.jit
def load_statistics(stats_ptr, head, token, row, live, tokens, H: tl.constexpr):
    """Maximum, inverse sum and centre of queries; zeros, weights too, where they are not `live`."""
    at = stats_ptr + head.to(tl.int64) * tokens + token + row
    step = tokens.to(tl.int64) * H
    top = tl.load(at, mask=live, other=0.0)
    inverse = tl.load(at + step, mask=live, other=0.0)
    return top, inverse, tl.load(at + 2 * step, mask=live, other=0.0)


@triton.jit
def _query_statistics(
    q, q_side, grad, at, start, end, q_start, first, stop, head, scale, reach, window, norm_eps,
    bias_ptr, cos_ptr, sin_ptr, k_norm_ptr, drops,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum, inverse sum and centre `[BLOCK_Q]` of queries, in one pass over the keys."""
    ROW: tl.constexpr = (H + 2 * KV) * D
    row = tl.arange(0, BLOCK_Q)
    slot = tl.arange(0, BLOCK)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    centre = tl.zeros([BLOCK_Q], tl.float32)
    finite = top
    for block in tl.range(first, stop, BLOCK, num_stages=STAGES):
        token = start.to(tl.int64) + (block - start)
        known = slot < end - block
        k, k_side = load_qk(
            at + H * D, token, slot, known, cos_ptr, sin_ptr, k_norm_ptr, norm_eps, ROW, D, WIDTH,
            SIDE, ROTARY,
        )  # fmt: skip
        v = load_heads(at + (H + KV) * D, token, slot, known, None, None, ROW, D, WIDTH, False)
        scores = product(q, q_side, k, k_side, SIDE, PRECISION)  # [BLOCK_Q, BLOCK] fp32
        slopes = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        stay = staying(drops, q_start, row, head, block - start, BLOCK)
        slopes = drop(slopes, stay, drops)
        distance = slot[None, :] - row[:, None] + (block - q_start)
        allowed = restrict(known[None, :], distance, window, WINDOW, CAUSAL)
        old = top
        weights, top, finite = softmax_weights(
            scores, allowed, distance, old, scale, bias_ptr, head, reach, BIAS, PLAIN, WINDOW
        )
        if PLAIN:
            shrink = tl.exp2((old - finite) * scale)
        else:
            shrink = tl.exp2(old - finite)
        total = total * shrink + tl.sum(weights, 1)
        centre = centre * shrink + tl.sum(weights * slopes, 1)
    # Rows behind the sequence may see no key.
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
    return finite, inverse, centre * inverse


@triton.jit
def _query_gradients(
    q, q_side, grad, top, inverse, centre, at, start, end, q_start, first, stop, head, scale, reach,
    window, norm_eps, bias_ptr, cos_ptr, sin_ptr, k_norm_ptr, drops,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`ds k` of queries, in whole rows or in halves, in another pass over the keys."""
    ROW: tl.constexpr = (H + 2 * KV) * D
    row = tl.arange(0, BLOCK_Q)
    slot = tl.arange(0, BLOCK)
    d_q = tl.zeros(q.shape, tl.float32)
    d_q_side = d_q
    for block in tl.range(first, stop, BLOCK, num_stages=STAGES):
        token = start.to(tl.int64) + (block - start)
        known = slot < end - block
        k, k_side = load_qk(
            at + H * D, token, slot, known, cos_ptr, sin_ptr, k_norm_ptr, norm_eps, ROW, D,
            WIDTH, SIDE, ROTARY,
        )  # fmt: skip
        v = load_heads(at + (H + KV) * D, token, slot, known, None, None, ROW, D, WIDTH, False)
        scores = product(q, q_side, k, k_side, SIDE, PRECISION)
        slopes = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        slopes = drop(slopes, staying(drops, q_start, row, head, block - start, BLOCK), drops)
        distance = slot[None, :] - row[:, None] + (block - q_start)
        allowed = restrict(known[None, :], distance, window, WINDOW, CAUSAL)
        scores = logits(scores, allowed, distance, scale, bias_ptr, head, reach, BIAS, PLAIN)
        weights = exponentials(scores, top[:, None], scale, PLAIN) * inverse[:, None]
        d_scores = (weights * (slopes - centre[:, None])).to(k.dtype)
        d_q = tl.dot(d_scores, k, d_q, input_precision=PRECISION)
        if SIDE:
            d_q_side = tl.dot(d_scores, k_side, d_q_side, input_precision=PRECISION)
    return d_q, d_q_side


@triton.jit(do_not_specialize=["tokens", "sequences", "q_blocks", "reach", "window", "threshold"])
def query_kernel(
    grad_ptr, qkv_ptr, d_qkv_ptr, stats_ptr, d_norm_ptr,
    cu_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, seed_ptr,
    tokens, sequences, q_blocks, scale, reach, window, norm_eps, threshold, factor, natural_scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_q of one head of the query block `i % q_blocks` of sequence `i // q_blocks`, and what is in
    `stats` `[3, H, T]` fp32: maximum, inverse sum, centre; and the dead tail of d_qkv.

    `d_norm_ptr`, None without norms: `[programs, D]` fp32, zeros where a program has no rows. The
    others are those of the forward pass, `scale` carrying log2(e), `natural_scale` without it.
    """
    ROW: tl.constexpr = (H + 2 * KV) * D
    drops = (seed_ptr, threshold, factor)
    clear_dead_tail(d_qkv_ptr, tl.load(cu_ptr + sequences), tokens, ROW)
    head = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    start = tl.load(cu_ptr + tile // q_blocks)
    end = tl.load(cu_ptr + tile // q_blocks + 1)
    q_start = start + tile % q_blocks * BLOCK_Q
    if q_start >= end:
        return
    row = tl.arange(0, BLOCK_Q)
    live = row < end - q_start
    first, stop = start, end
    if WINDOW:
        first = start + tl.maximum(q_start - window - start, 0) // BLOCK * BLOCK
        stop = tl.minimum(end, q_start + BLOCK_Q + window)
    if CAUSAL:
        stop = tl.minimum(end, q_start + BLOCK_Q)
    q_token = q_start.to(tl.int64)
    at = qkv_ptr + head * D
    q, q_side = load_qk(
        at, q_token, row, live, cos_ptr, sin_ptr, q_norm_ptr, norm_eps, ROW, D, WIDTH, SIDE, ROTARY
    )
    grad = load_heads(grad_ptr + head * D, q_token, row, live, None, None, H * D, D, WIDTH, False)
    kv_at = at
    if KV < H:
        kv_at = qkv_ptr + head // (H // KV) * D
    top, inverse, centre = _query_statistics(
        q, q_side, grad, kv_at, start, end, q_start, first, stop, head, scale, reach, window,
        norm_eps, bias_ptr, cos_ptr, sin_ptr, k_norm_ptr, drops, H, KV, D, WIDTH, SIDE, BLOCK_Q,
        BLOCK, STAGES, BIAS, WINDOW, CAUSAL, ROTARY, PLAIN, PRECISION,
    )  # fmt: skip
    stats_at = stats_ptr + head.to(tl.int64) * tokens + q_token + row
    step = tokens.to(tl.int64) * H
    tl.store(stats_at, top, mask=live)
    tl.store(stats_at + step, inverse, mask=live)
    tl.store(stats_at + 2 * step, centre, mask=live)

    d_q, d_q_side = _query_gradients(
        q, q_side, grad, top, inverse, centre, kv_at, start, end, q_start, first, stop, head, scale,
        reach, window, norm_eps, bias_ptr, cos_ptr, sin_ptr, k_norm_ptr, drops, H, KV, D, WIDTH,
        SIDE, BLOCK_Q, BLOCK, STAGES, BIAS, WINDOW, CAUSAL, ROTARY, PLAIN, PRECISION,
    )  # fmt: skip
    store_gradient(
        d_qkv_ptr + head * D, at, q_token, row, live, d_q * natural_scale, d_q_side * natural_scale,
        cos_ptr, sin_ptr, q_norm_ptr, norm_eps, d_norm_ptr, ROW, D, WIDTH, SIDE,
    )  # fmt: skip


@triton.jit
def _key_gradients(
    k, k_side, v, grad_ptr, qkv_ptr, stats_ptr, start, end, k_start, first, stop, kv_head, known,
    tokens, scale, reach, window, norm_eps, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, drops,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`ds^T q` of keys, in whole rows or in halves, and d_v, in one pass over the queries."""
    ROW: tl.constexpr = (H + 2 * KV) * D
    SHARED: tl.constexpr = H // KV
    row = tl.arange(0, BLOCK_Q)
    slot = tl.arange(0, BLOCK)
    blocks = tl.cdiv(stop - first, BLOCK_Q)
    d_k = tl.zeros(k.shape, tl.float32)
    d_k_side = d_k
    d_v = tl.zeros([BLOCK, WIDTH], tl.float32)
    for step in tl.range(0, SHARED * blocks, num_stages=STAGES):
        head = kv_head * SHARED + step // blocks
        q_start = first + step % blocks * BLOCK_Q
        token = start.to(tl.int64) + (q_start - start)
        live = row < end - q_start
        q, q_side = load_qk(
            qkv_ptr + head * D, token, row, live, cos_ptr, sin_ptr, q_norm_ptr, norm_eps, ROW, D,
            WIDTH, SIDE, ROTARY,
        )  # fmt: skip
        grad = load_heads(grad_ptr + head * D, token, row, live, None, None, H * D, D, WIDTH, False)
        top, inverse, centre = load_statistics(stats_ptr, head, token, row, live, tokens, H)
        # Keys in rows: so the weights are multiplied as they come.
        scores = product(k, k_side, q, q_side, SIDE, PRECISION)  # [BLOCK, BLOCK_Q] fp32
        distance = slot[:, None] - row[None, :] + (k_start - q_start)
        # The statistics of rows that are not there bound no weight.
        allowed = restrict(known[:, None] & live[None, :], distance, window, WINDOW, CAUSAL)
        scores = logits(scores, allowed, distance, scale, bias_ptr, head, reach, BIAS, PLAIN)
        weights = exponentials(scores, top[None, :], scale, PLAIN) * inverse[None, :]
        slopes = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        stay = staying(drops, q_start, row, head, k_start - start, BLOCK)
        if drops[0] is not None:
            stay = tl.trans(stay)
        dropped = drop(weights, stay, drops).to(v.dtype)
        d_v = tl.dot(dropped, grad, d_v, input_precision=PRECISION)
        d_scores = (weights * (drop(slopes, stay, drops) - centre[None, :])).to(q.dtype)
        d_k = tl.dot(d_scores, q, d_k, input_precision=PRECISION)
        if SIDE:
            d_k_side = tl.dot(d_scores, q_side, d_k_side, input_precision=PRECISION)
    return d_k, d_k_side, d_v


@triton.jit(do_not_specialize=["tokens", "sequences", "k_blocks", "reach", "window", "threshold"])
def key_kernel(
    grad_ptr, qkv_ptr, d_qkv_ptr, stats_ptr, d_norm_ptr,
    cu_ptr, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, seed_ptr,
    tokens, sequences, k_blocks, scale, reach, window, norm_eps, threshold, factor, natural_scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of one head of the key block `i % k_blocks` of sequence `i // k_blocks`."""
    ROW: tl.constexpr = (H + 2 * KV) * D
    drops = (seed_ptr, threshold, factor)
    kv_head = tl.program_id(0) % KV
    tile = tl.program_id(0) // KV
    start = tl.load(cu_ptr + tile // k_blocks)
    end = tl.load(cu_ptr + tile // k_blocks + 1)
    k_start = start + tile % k_blocks * BLOCK
    if k_start >= end:
        return
    slot = tl.arange(0, BLOCK)
    known = slot < end - k_start
    # Blocks of queries are counted from the start of the sequence, whatever the block of keys.
    first, stop = start, end
    if WINDOW:
        first = start + tl.maximum(k_start - window - start, 0) // BLOCK_Q * BLOCK_Q
        stop = tl.minimum(end, k_start + BLOCK + window)
    if CAUSAL:
        first = start + (k_start - start) // BLOCK_Q * BLOCK_Q
    k_token = k_start.to(tl.int64)
    at = qkv_ptr + (H + kv_head) * D
    k, k_side = load_qk(
        at, k_token, slot, known, cos_ptr, sin_ptr, k_norm_ptr, norm_eps, ROW, D, WIDTH, SIDE,
        ROTARY,
    )  # fmt: skip
    v = load_heads(at + KV * D, k_token, slot, known, None, None, ROW, D, WIDTH, False)
    d_k, d_k_side, d_v = _key_gradients(
        k, k_side, v, grad_ptr, qkv_ptr, stats_ptr, start, end, k_start, first, stop, kv_head,
        known, tokens, scale, reach, window, norm_eps, bias_ptr, cos_ptr, sin_ptr, q_norm_ptr,
        drops, H, KV, D, WIDTH, SIDE, BLOCK_Q, BLOCK, STAGES, BIAS, WINDOW, CAUSAL, ROTARY, PLAIN,
        PRECISION,
    )  # fmt: skip
    to = d_qkv_ptr + (H + kv_head) * D
    store_heads(to + KV * D, k_token, slot, known, d_v, ROW, D, WIDTH)
    store_gradient(
        to, at, k_token, slot, known, d_k * natural_scale, d_k_side * natural_scale, cos_ptr,
        sin_ptr, k_norm_ptr, norm_eps, d_norm_ptr, ROW, D, WIDTH, SIDE,
    )  # fmt: skip
