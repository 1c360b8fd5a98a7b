"""Attention over packed sequences: `softmax(scale * q k^T + bias) v`, a sequence at a time.

qkv `[T, 3, H, D]` -> out `[T, H, D]`, both contiguous. A program computes some heads of one tile: a
few consecutive whole sequences, or a piece of a long one.

Sequences of at most 16 tokens go GROUP at a time, each as one 16 x 16 matrix of scores on one warp;
those of at most 32 tokens likewise. A longer one takes its keys in blocks of BLOCK from its own
start, with the streaming softmax. No matrix holds two sequences: nothing of one meets another,
not even as a product with zero, and a row's sums have the same terms in the same order whatever
lies beside it. Slots beyond the end of a sequence only add zeros after the last term.

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

# Keys of a block: every length has its own order of summation, so this is no matter of tuning.
BLOCK = 64
# The longest sequences that are computed GROUP at a time.
SHORT = (16, 32)
MIN_WIDTH = 16


@triton.jit
def _load_rows(
    ptr, origin, row, live, cos_ptr, sin_ptr,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Rows `origin + row` of q, k or v, `[*row.shape, WIDTH]`; zeros beyond D and where not `live`.

    `origin` is one int64 token, `row` int32 offsets from it: 64 bits for every row would fill the
    registers.
    """
    column = tl.arange(0, WIDTH)
    mask = tl.expand_dims(live, -1)
    if D < WIDTH:
        mask = mask & (column < D)
    rows = ptr + origin * STRIDE + tl.expand_dims(row * STRIDE, -1)
    x = tl.load(rows + column, mask=mask, other=0.0)
    if ROTARY:
        HALF: tl.constexpr = D // 2
        first = column < HALF
        partner = tl.load(
            rows + tl.where(first, column + HALF, column - HALF), mask=mask, other=0.0
        )
        angle = tl.expand_dims(row * HALF, -1) + tl.where(first, column, column - HALF)
        cos = tl.load(cos_ptr + origin * HALF + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + origin * HALF + angle, mask=mask, other=0.0)
        sin = tl.where(first, -sin, sin)
        x = (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(x.dtype)
    return x


@triton.jit
def _store_rows(
    ptr, origin, row, live, x, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):
    column = tl.arange(0, WIDTH)
    mask = tl.expand_dims(live, -1)
    if D < WIDTH:
        mask = mask & (column < D)
    tl.store(ptr + origin * STRIDE + tl.expand_dims(row * STRIDE, -1) + column, x, mask=mask)


@triton.jit
def _weights(
    scores, allowed, distance, top, scale, bias_ptr, head, reach,
    BIAS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Unnormalised softmax weights of one block of keys, and the new maximum of each row: as it is,
    and with a finite number for that of a row without a key.

    Logits are in units of log2. Where nothing but a positive scale acts on the products, the
    maximum is taken before scaling: one operation less on every score.
    """
    AXIS: tl.constexpr = len(scores.shape) - 1
    if BIAS:
        at = tl.minimum(tl.maximum(distance, -reach), reach) + reach
        bias = tl.load(bias_ptr + head * (2 * reach + 1) + at)
        scores = tl.fma(scores, scale, bias * 1.4426950408889634)
    elif not PLAIN:
        scores = scores * scale
    scores = tl.where(allowed, scores, float("-inf"))
    top = tl.maximum(top, tl.max(scores, AXIS))
    finite = tl.where(top == float("-inf"), 0.0, top)
    if PLAIN:
        weights = tl.exp2(tl.fma(scores, scale, tl.expand_dims(-finite * scale, AXIS)))
    else:
        weights = tl.exp2(scores - tl.expand_dims(finite, AXIS))
    return weights, top, finite


@triton.jit
def _group(
    qkv_ptr, out_ptr, cu_ptr, bias_ptr, cos_ptr, sin_ptr,
    sequence, last, head, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    ROTARY: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sequences from `sequence` on that have at most SLOTS tokens, up to `last`, GROUP of them
    or the first longer one; returns how many those are."""
    item = tl.arange(0, GROUP)
    present = item < last - sequence
    start = tl.load(cu_ptr + sequence + item, mask=present, other=0)
    length = tl.load(cu_ptr + sequence + 1 + item, mask=present, other=0) - start
    taken = tl.min(tl.where(present & (length <= SLOTS), GROUP, item), 0)
    length = tl.where(item < taken, length, 0)

    origin = tl.load(cu_ptr + sequence)
    slot = tl.arange(0, SLOTS)
    row = (start - origin)[:, None] + slot[None, :]  # [GROUP, SLOTS]
    live = slot[None, :] < length[:, None]
    allowed = live[:, None, :]
    distance = (slot[None, :] - slot[:, None])[None]  # key minus query
    if WINDOW:
        allowed = allowed & (distance <= window) & (distance >= -window)
    nothing = tl.full([GROUP, SLOTS], float("-inf"), tl.float32)
    token = origin.to(tl.int64)
    ROW: tl.constexpr = 3 * H * D

    for _ in tl.range(0, HEADS, num_stages=1):
        at = qkv_ptr + head * D
        q = _load_rows(at, token, row, live, cos_ptr, sin_ptr, ROW, D, WIDTH, ROTARY)
        k = _load_rows(at + H * D, token, row, live, cos_ptr, sin_ptr, ROW, D, WIDTH, ROTARY)
        v = _load_rows(at + 2 * H * D, token, row, live, None, None, ROW, D, WIDTH, False)
        scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION)
        weights, _, _ = _weights(
            scores, allowed, distance, nothing, scale, bias_ptr, head, reach, BIAS, PLAIN
        )
        total = tl.sum(weights, 2)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        result = (result * tl.expand_dims(1.0 / total, 2)).to(v.dtype)
        _store_rows(out_ptr + head * D, token, row, live, result, H * D, D, WIDTH)
        head += 1
    # A sequence that breaks the promise of max_seqlen must not stop the loop over sequences.
    return tl.maximum(taken, 1)


@triton.jit
def _long(
    qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr,
    start, end, q_start, q_end, head, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    WINDOW: tl.constexpr, ROTARY: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows `[q_start, q_end)`, at most BLOCK_Q, of the sequence `[start, end)`."""
    ROW: tl.constexpr = 3 * H * D
    row = tl.arange(0, BLOCK_Q)
    slot = tl.arange(0, BLOCK)
    live = row < q_end - q_start
    first, stop = start, end
    if WINDOW:
        # Key blocks are counted from the start of the sequence, whatever the query block.
        skipped = tl.maximum(q_start - window - start, 0) // BLOCK
        first = start + skipped * BLOCK
        stop = tl.minimum(end, q_end + window)
    q_token = q_start.to(tl.int64)
    for _ in tl.range(0, HEADS, num_stages=1):
        at = qkv_ptr + head * D
        q = _load_rows(at, q_token, row, live, cos_ptr, sin_ptr, ROW, D, WIDTH, ROTARY)
        top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        result = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
        for block in tl.range(first, stop, BLOCK, num_stages=STAGES):
            token = start.to(tl.int64) + (block - start)
            known = slot < end - block
            k = _load_rows(at + H * D, token, slot, known, cos_ptr, sin_ptr, ROW, D, WIDTH, ROTARY)
            v = _load_rows(at + 2 * H * D, token, slot, known, None, None, ROW, D, WIDTH, False)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK] fp32
            distance = slot[None, :] - row[:, None] + (block - q_start)
            allowed = known[None, :]
            if WINDOW:
                allowed = allowed & (distance <= window) & (distance >= -window)
            old = top
            weights, top, finite = _weights(
                scores, allowed, distance, old, scale, bias_ptr, head, reach, BIAS, PLAIN
            )
            if PLAIN:
                shrink = tl.exp2((old - finite) * scale)
            else:
                shrink = tl.exp2(old - finite)
            total = total * shrink + tl.sum(weights, 1)
            result = tl.dot(
                weights.to(v.dtype), v, result * shrink[:, None], input_precision=PRECISION
            )
        result = (result * (1.0 / total)[:, None]).to(q.dtype)
        _store_rows(out_ptr + head * D, q_token, row, live, result, H * D, D, WIDTH)
        head += 1


@triton.jit(do_not_specialize=["tokens", "sequences", "num_tiles", "q_blocks", "reach", "window"])
def _varlen_attention_kernel(
    qkv_ptr, out_ptr, cu_ptr, tiles_ptr, bias_ptr, cos_ptr, sin_ptr,
    tokens, sequences, num_tiles, q_blocks, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, LONG: tl.constexpr, TILES: tl.constexpr, BIAS: tl.constexpr,
    WINDOW: tl.constexpr, ROTARY: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile, HEADS heads.

    Without a table of tiles, tile i holds the GROUP sequences from `i * GROUP` on, or with LONG the
    query block `i % q_blocks` of sequence `i // q_blocks`.

    SLOTS is the longest kind of group there is, LONG says that there are longer sequences.

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
            sequence = tile * GROUP
            last = tl.minimum(sequence + GROUP, sequences)

    while sequence < last:
        start = tl.load(cu_ptr + sequence)
        end = tl.load(cu_ptr + sequence + 1)
        length = end - start
        if LONG & (length > SLOTS):
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
        elif (SLOTS > 16) & (length > 16):
            sequence += _group(
                qkv_ptr, out_ptr, cu_ptr, bias_ptr, cos_ptr, sin_ptr,
                sequence, last, head, scale, reach, window, H, D, HEADS, WIDTH,
                GROUP, SLOTS, BIAS, WINDOW, ROTARY, PLAIN, PRECISION,
            )  # fmt: skip
        else:
            sequence += _group(
                qkv_ptr, out_ptr, cu_ptr, bias_ptr, cos_ptr, sin_ptr,
                sequence, last, head, scale, reach, window, H, D, HEADS, WIDTH,
                GROUP, 16, BIAS, WINDOW, ROTARY, PLAIN, PRECISION,
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
    slots = next((n for n in SHORT if max_seqlen <= n), SHORT[-1])
    is_long = max_seqlen > slots
    config = tuning.attention(width, qkv.element_size() * 8, max_seqlen)
    sequences = cu_seqlens.shape[0] - 1
    # Short sequences are tiled GROUP by GROUP: a table could only add a load.
    tiles = tiles if is_long else None
    q_blocks = triton.cdiv(max_seqlen, config.block_q)
    if tiles is not None:
        num_tiles = tiles.shape[0]
    else:
        num_tiles = sequences * q_blocks if is_long else triton.cdiv(sequences, config.num_warps)
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
        GROUP=config.num_warps,
        SLOTS=slots,
        BLOCK_Q=config.block_q,
        BLOCK=BLOCK,
        STAGES=config.num_stages,
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
