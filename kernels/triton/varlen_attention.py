"""Attention over packed sequences: `softmax(scale * q k^T + bias) v`, a sequence at a time.

qkv `[T, 3, H, D]` -> out `[T, H, D]`, both contiguous. A program computes some heads of one tile: a
few consecutive whole sequences, or a piece of a long one.

Sequences of at most BLOCK tokens share a block: each is laid out from a slot of its own on (16, 32
or 64 slots, by its length), q, k and v are loaded once, and the mask is block-diagonal. A longer
sequence takes its keys in blocks of BLOCK from its own start, with the streaming softmax. So a row
meets the same sums in the same order whatever lies beside it: zeros of other sequences come in
whole steps of 16 keys, before and after.

Numerics: products of the inputs' dtype, everything else fp32; softmax weights are rounded to the
inputs' dtype before they meet v. fp32 inputs are multiplied as fp32, or as tf32 where torch's
`backends.cuda.matmul` says so. Exponentials are base 2, their factor folded into the scale.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels import tuning

BLOCK = 64
MIN_WIDTH = 16


@triton.jit
def _load_rotated(base, token, live, column, cos_ptr, sin_ptr, DIM: tl.constexpr):
    """Rows of q or k with the rotary tables applied, in their dtype."""
    HALF: tl.constexpr = DIM // 2
    first = column < HALF
    mask = live[:, None] & (column < DIM)[None, :]
    other = tl.where(first, column + HALF, column - HALF)
    angle = token[:, None] * HALF + tl.where(first, column, column - HALF)[None, :]
    x = tl.load(base + column[None, :], mask=mask, other=0.0)
    y = tl.load(base + other[None, :], mask=mask, other=0.0)
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    sin = tl.where(first[None, :], -sin, sin)
    return (x.to(tl.float32) * cos + y.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def _load_rows(
    base, token, live, column, cos_ptr, sin_ptr, DIM: tl.constexpr, ROTARY: tl.constexpr
):
    if ROTARY:
        return _load_rotated(base, token, live, column, cos_ptr, sin_ptr, DIM)
    mask = live[:, None] & (column < DIM)[None, :]
    return tl.load(base + column[None, :], mask=mask, other=0.0)


@triton.jit
def _weights(
    scores, allowed, distance, top, scale, bias_ptr, head, reach,
    BIAS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Unnormalised softmax weights of one key block, and the new maximum of each row.

    Logits are in units of log2. Where nothing but a positive scale acts on the products, the
    maximum is taken before scaling: one operation less on every score.
    """
    if BIAS:
        at = tl.minimum(tl.maximum(distance, -reach), reach) + reach
        bias = tl.load(bias_ptr + head * (2 * reach + 1) + at, mask=allowed, other=0.0)
        scores = tl.fma(scores, scale, bias * 1.4426950408889634)
    elif not PLAIN:
        scores = scores * scale
    scores = tl.where(allowed, scores, float("-inf"))
    top = tl.maximum(top, tl.max(scores, 1))
    # A row without a key yet: any finite maximum will do, every weight is 0.
    finite = tl.where(top == float("-inf"), 0.0, top)
    if PLAIN:
        return tl.exp2(tl.fma(scores, scale, -(finite * scale)[:, None])), top, finite
    return tl.exp2(scores - finite[:, None]), top, finite


@triton.jit
def _short(
    qkv_ptr, out_ptr, cu_ptr, bias_ptr, cos_ptr, sin_ptr,
    sequence, last, q_start, q_end, head, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, ROTARY: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As many of the sequences `[sequence, last)` as fit one block; returns how many that were.

    Rows outside `[q_start, q_end)` are computed and not written.
    """
    CANDIDATES: tl.constexpr = 16
    candidate = tl.arange(0, CANDIDATES)
    present = candidate < last - sequence
    starts = tl.load(cu_ptr + sequence + candidate, mask=present, other=0)
    ends = tl.load(cu_ptr + sequence + 1 + candidate, mask=present, other=0)
    lengths = ends - starts
    slots = tl.where(lengths > 32, 64, tl.where(lengths > 16, 32, tl.where(lengths > 0, 16, 0)))
    limits = tl.cumsum(slots, 0)
    fits = present & (limits <= BLOCK)
    # A sequence that breaks the promise of max_seqlen must not stop the loop over sequences.
    taken = tl.maximum(tl.sum(fits.to(tl.int32), 0), 1)

    row = tl.arange(0, BLOCK)
    before = limits[None, :] <= row[:, None]
    index = tl.sum(before.to(tl.int32), 1)
    low = tl.max(tl.where(before, limits[None, :], 0), 1)
    inside = index < taken
    start = tl.load(cu_ptr + sequence + index, mask=inside, other=0)
    end = tl.load(cu_ptr + sequence + 1 + index, mask=inside, other=0)
    high = low + end - start
    live = row < high
    token = (start + row - low).to(tl.int64)
    written = live & (token >= q_start) & (token < q_end)

    distance = row[None, :] - row[:, None]  # [BLOCK, BLOCK], key minus query
    allowed = (row[None, :] >= low[:, None]) & (row[None, :] < high[:, None])
    if WINDOW:
        allowed = allowed & (distance <= window) & (distance >= -window)
    column = tl.arange(0, WIDTH)
    mask = live[:, None] & (column < D)[None, :]
    nothing = tl.full([BLOCK], float("-inf"), tl.float32)

    for _ in range(HEADS):
        base = qkv_ptr + (token * (3 * H * D) + head * D)[:, None]
        q = _load_rows(base, token, live, column, cos_ptr, sin_ptr, D, ROTARY)
        k = _load_rows(base + H * D, token, live, column, cos_ptr, sin_ptr, D, ROTARY)
        v = tl.load(base + 2 * H * D + column[None, :], mask=mask, other=0.0)
        # 0 * NaN is NaN: a row of v that is not finite must not meet the zero weights of the other
        # sequences. It becomes zeros, and its key becomes NaN for its own sequence.
        poison = tl.sum(v * 0.0, 1)
        v = tl.where((poison == 0.0)[:, None], v, 0.0)
        k = k + poison[:, None].to(k.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK, BLOCK] fp32
        weights, _, _ = _weights(
            scores, allowed, distance, nothing, scale, bias_ptr, head, reach, BIAS, PLAIN
        )  # fmt: skip
        total = tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        result = result * (1.0 / total)[:, None]
        at = (token * (H * D) + head * D)[:, None] + column[None, :]
        tl.store(out_ptr + at, result.to(v.dtype), mask=written[:, None] & (column < D)[None, :])
        head += 1
    return taken


@triton.jit
def _long(
    qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr,
    start, end, q_start, q_end, head, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    WINDOW: tl.constexpr, ROTARY: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows `[q_start, q_end)`, at most BLOCK_Q, of the sequence `[start, end)`."""
    query = q_start + tl.arange(0, BLOCK_Q)
    column = tl.arange(0, WIDTH)
    live = query < q_end
    token = query.to(tl.int64)
    first, stop = start, end
    if WINDOW:
        # Key blocks are counted from the start of the sequence, whatever the query block.
        skipped = tl.maximum(q_start - window - start, 0) // BLOCK
        first = start + skipped * BLOCK
        stop = tl.minimum(end, q_end + window)
    for _ in range(HEADS):
        base = qkv_ptr + head * D
        q_base = base + (token * (3 * H * D))[:, None]
        q = _load_rows(q_base, token, live, column, cos_ptr, sin_ptr, D, ROTARY)
        top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        result = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
        for block in tl.range(first, stop, BLOCK, num_stages=STAGES):
            key = block + tl.arange(0, BLOCK)
            known = key < end
            key_token = key.to(tl.int64)
            key_base = base + (key_token * (3 * H * D) + H * D)[:, None]
            k = _load_rows(key_base, key_token, known, column, cos_ptr, sin_ptr, D, ROTARY)
            v_mask = known[:, None] & (column < D)[None, :]
            v = tl.load(key_base + H * D + column[None, :], mask=v_mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK] fp32
            distance = key[None, :] - query[:, None]
            allowed = known[None, :]
            if WINDOW:
                allowed = allowed & (distance <= window) & (distance >= -window)
            old = top
            weights, top, finite = _weights(
                scores, allowed, distance, old, scale, bias_ptr, head, reach, BIAS, PLAIN
            )  # fmt: skip
            if PLAIN:
                shrink = tl.exp2((old - finite) * scale)
            else:
                shrink = tl.exp2(old - finite)
            total = total * shrink + tl.sum(weights, 1)
            result = tl.dot(
                weights.to(v.dtype), v, result * shrink[:, None], input_precision=PRECISION
            )
        result = result * (1.0 / total)[:, None]
        at = (token * (H * D) + head * D)[:, None] + column[None, :]
        mask = live[:, None] & (column < D)[None, :]
        tl.store(out_ptr + at, result.to(q.dtype), mask=mask)
        head += 1


@triton.jit(do_not_specialize=["tokens", "sequences", "num_tiles", "q_blocks", "reach", "window"])
def _varlen_attention_kernel(
    qkv_ptr, out_ptr, cu_ptr, tiles_ptr, bias_ptr, cos_ptr, sin_ptr,
    tokens, sequences, num_tiles, q_blocks, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SHARED: tl.constexpr,
    LONG: tl.constexpr, TILES: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    ROTARY: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile, HEADS heads.

    Without a table of tiles, tile i holds the sequences from `i * SHARED` on, or with LONG the
    query block `i % q_blocks` of sequence `i // q_blocks`.

    `tokens` T, `sequences` B; `scale` carries log2(e); `reach` is the R of the bias `[H, 2R + 1]`.
    """
    GROUPS: tl.constexpr = H // HEADS
    program = tl.program_id(0)
    # The dead tail is a few rows as a rule, and any program may write any of them.
    CLEARED: tl.constexpr = 256
    row_end = tokens.to(tl.int64) * (H * D)
    dead = tl.load(cu_ptr + sequences).to(tl.int64) * (H * D) + program.to(tl.int64) * CLEARED
    step = tl.num_programs(0).to(tl.int64) * CLEARED
    while dead < row_end:
        at = dead + tl.arange(0, CLEARED)
        tl.store(out_ptr + at, tl.zeros([CLEARED], out_ptr.dtype.element_ty), mask=at < row_end)
        dead += step

    tile = program // GROUPS
    head = program % GROUPS * HEADS
    sequence = 0
    last = 0
    q_start = 0
    q_end = 0
    if tile < num_tiles:
        if TILES:
            row = tiles_ptr + tile.to(tl.int64) * 4
            q_start = tl.load(row)
            q_end = tl.load(row + 1)
            sequence = tl.load(row + 2)
            last = sequence + tl.load(row + 3)
        elif LONG:
            sequence = tile // q_blocks
            last = sequence + 1
            q_end = tl.load(cu_ptr + last)
            q_start = tl.load(cu_ptr + sequence) + tile % q_blocks * BLOCK_Q
            q_end = tl.minimum(q_end, q_start + BLOCK_Q)
            last = tl.where(q_start < q_end, last, sequence)
        else:
            sequence = tile * SHARED
            last = tl.minimum(sequence + SHARED, sequences)
            q_start = tl.load(cu_ptr + sequence)
            q_end = tl.load(cu_ptr + last)

    while sequence < last:
        start = tl.load(cu_ptr + sequence)
        end = tl.load(cu_ptr + sequence + 1)
        if LONG & (end - start > BLOCK):
            begin = tl.maximum(start, q_start)
            stop = tl.minimum(end, q_end)
            while begin < stop:
                _long(
                    qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr,
                    start, end, begin, tl.minimum(stop, begin + BLOCK_Q), head, scale, reach,
                    window, H, D, HEADS, WIDTH, BLOCK_Q, BLOCK, STAGES, BIAS, WINDOW, ROTARY,
                    PLAIN, PRECISION,
                )  # fmt: skip
                begin += BLOCK_Q
            sequence += 1
        else:
            sequence += _short(
                qkv_ptr, out_ptr, cu_ptr, bias_ptr, cos_ptr, sin_ptr,
                sequence, last, q_start, q_end, head, scale, reach, window, H, D, HEADS, WIDTH,
                BLOCK, BIAS, WINDOW, ROTARY, PLAIN, PRECISION,
            )  # fmt: skip


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    tiles: Tensor | None,
) -> Tensor:
    """Launch the kernel; arguments and result as in :func:`sbert_fast.ops.varlen_attention`.

    Args:
        qkv: fp16, bf16 or fp32 `[T, 3, H, D]`, contiguous.
        cu_seqlens: int32 `[B + 1]`.
        max_seqlen: at least the longest sequence, in tokens.
        scale: factor of the logits.
        bias: fp32 `[H, 2R + 1]` or None.
        window: largest distance of a key, or -1.
        rotary_cos, rotary_sin: fp32 `[T, D/2]` or None.
        tiles: int32 `[n, 4]`, or None.

    Returns:
        `[T, H, D]`, dtype of `qkv`; zeros in the dead tail.
    """
    tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(tokens, heads, dim)
    if out.numel() == 0:
        return out
    width = max(MIN_WIDTH, triton.next_power_of_2(dim))
    config = tuning.attention(width, qkv.element_size() * 8)
    sequences = cu_seqlens.shape[0] - 1
    is_long = max_seqlen > BLOCK
    shared = 1 if is_long else BLOCK // max(16, triton.next_power_of_2(max_seqlen))
    q_blocks = triton.cdiv(max_seqlen, config.block_q) if is_long else 1
    if tiles is None:
        num_tiles = sequences * q_blocks if is_long else triton.cdiv(sequences, shared)
    else:
        num_tiles = tiles.shape[0]
    together = tuning.heads_together(config.heads, heads, num_tiles)
    _varlen_attention_kernel[(max(1, num_tiles * (heads // together)),)](
        qkv,
        out,
        cu_seqlens,
        tiles,
        bias,
        rotary_cos,
        rotary_sin,
        tokens,
        sequences,
        num_tiles,
        q_blocks,
        scale * math.log2(math.e),
        0 if bias is None else bias.shape[1] // 2,
        window,
        H=heads,
        D=dim,
        HEADS=together,
        WIDTH=width,
        BLOCK_Q=config.block_q,
        BLOCK=BLOCK,
        STAGES=config.num_stages,
        SHARED=shared,
        LONG=is_long,
        TILES=tiles is not None,
        BIAS=bias is not None,
        WINDOW=window >= 0,
        ROTARY=rotary_cos is not None,
        PLAIN=bias is None and scale > 0,
        PRECISION=_precision(qkv.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _precision(dtype: torch.dtype) -> str:
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"
