"""Attention over packed sequences: `softmax(scale * q k^T + bias) v`, a sequence at a time.

Long because: its two kernels share how rows are loaded and stored, the softmax, and the launch.

qkv `[T, 3, H, D]` -> out `[T, H, D]`, both contiguous. Which kernel computes a sequence, and in
which steps, depends on its own length, the head dim, the dtype and the options, never on its batch,
so a sequence keeps its bits wherever it lies:

* the short kernel takes sequences of at most 32 tokens (16 with D > 64, or with rotary tables and
  D > 32 in half precision): of a few neighbours at once, those of at most 16 tokens, then the
  others. Each has one matrix of scores, on a warp of its own. It reads no table of tiles;
* the long kernel takes a tile, or a query block of a sequence, skips what is short, and lets the
  keys of a sequence pass in blocks of 64 (32 in fp32), counted from the start of the sequence, with
  the streaming softmax.

No matrix holds two sequences: a block-diagonal tile would let a NaN of one reach the others as
`0 * NaN`, and would spend most of its softmax on zeros. The sums of a row have the same terms in
the same order whatever lies beside its sequence; slots beyond the end only add zeros after the last
term.

Launch parameters are the static table of `tuning.py`. tests/test_triton_attention.py compiles every
row of it for sm_80, 90, 100 and 120, and fails if one spills.

Numerics: products of the inputs' dtype, everything else fp32; softmax weights are rounded to the
inputs' dtype before they meet v. fp32 inputs are multiplied as fp32, or as tf32 where torch's
`backends.cuda.matmul` says so. Exponentials are base 2, their factor folded into the scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels import tuning

SHORTEST = 16
_MAX_OFFSET = 2**31 - 1
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
    BIAS: tl.constexpr, PLAIN: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """Unnormalised softmax weights of one block of keys, and the new maximum of each row: as it is,
    and the one that was subtracted, finite where rows may be GUARDED against having no key.

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
    # Keys that are not there are rows of zeros, so a sum cannot be NaN where a choice would not be.
    scores = scores + tl.where(allowed, 0.0, float("-inf"))
    top = tl.maximum(top, tl.max(scores, AXIS))
    finite = top
    if GUARDED:
        finite = tl.where(top == float("-inf"), 0.0, top)
    if PLAIN:
        weights = tl.exp2(tl.fma(scores, scale, tl.expand_dims(-finite * scale, AXIS)))
    else:
        weights = tl.exp2(scores - tl.expand_dims(finite, AXIS))
    return weights, top, finite


@triton.jit
def _group(
    qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr,
    origin, start, length, head, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    WINDOW: tl.constexpr, ROTARY: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sequences `origin + start` `[GROUP]` of `length` `[GROUP]`, at most SLOTS, tokens."""
    slot = tl.arange(0, SLOTS)
    row = start[:, None] + slot[None, :]  # [GROUP, SLOTS]
    live = slot[None, :] < length[:, None]
    allowed = live[:, None, :]
    distance = (slot[None, :] - slot[:, None])[None, :, :]  # key minus query
    if WINDOW:
        allowed = allowed & (distance <= window) & (distance >= -window)
    nothing = tl.full([GROUP, SLOTS], float("-inf"), tl.float32)
    ROW: tl.constexpr = 3 * H * D

    for _ in tl.range(0, HEADS, num_stages=STAGES):
        at = qkv_ptr + head * D
        q = _load_rows(at, origin, row, live, cos_ptr, sin_ptr, ROW, D, WIDTH, ROTARY)
        k = _load_rows(at + H * D, origin, row, live, cos_ptr, sin_ptr, ROW, D, WIDTH, ROTARY)
        v = _load_rows(at + 2 * H * D, origin, row, live, None, None, ROW, D, WIDTH, False)
        scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION)
        weights, _, _ = _weights(
            scores, allowed, distance, nothing, scale, bias_ptr, head, reach, BIAS, PLAIN, False
        )
        total = tl.sum(weights, 2)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        result = (result * tl.expand_dims(1.0 / total, 2)).to(v.dtype)
        _store_rows(out_ptr + head * D, origin, row, live, result, H * D, D, WIDTH)
        head += 1


@triton.jit
def _clear_dead_tail(out_ptr, end, tokens, WIDTH: tl.constexpr):
    """Zeros in the rows `[end, tokens)` of `[T, WIDTH]`, shared out among all programs: they are a
    few rows as a rule, and may be all of them."""
    CHUNK: tl.constexpr = 256
    stop = tokens.to(tl.int64) * WIDTH
    first = end.to(tl.int64) * WIDTH + tl.program_id(0).to(tl.int64) * CHUNK
    while first < stop:
        at = first + tl.arange(0, CHUNK)
        tl.store(out_ptr + at, tl.zeros([CHUNK], out_ptr.dtype.element_ty), mask=at < stop)
        first += tl.num_programs(0).to(tl.int64) * CHUNK


@triton.jit(do_not_specialize=["tokens", "sequences", "reach", "window"])
def _short_kernel(
    qkv_ptr, out_ptr, cu_ptr, bias_ptr, cos_ptr, sin_ptr,
    tokens, sequences, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, SHORTEST: tl.constexpr, SHORT: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, ROTARY: tl.constexpr, PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Those of GROUP sequences that are short, HEADS heads; and the dead tail.

    `tokens` T, `sequences` B; `scale` carries log2(e); `reach` is the R of the bias `[H, 2R + 1]`.
    """
    _clear_dead_tail(out_ptr, tl.load(cu_ptr + sequences), tokens, H * D)
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
            qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr,
            origin, start, shortest, head, scale, reach, window, H, D, HEADS, WIDTH, GROUP,
            SHORTEST, STAGES, BIAS, WINDOW, ROTARY, PLAIN, PRECISION,
        )  # fmt: skip
    if SHORT > SHORTEST:
        short = tl.where((length > SHORTEST) & (length <= SHORT), length, 0)
        if tl.max(short, 0) > 0:
            _group(
                qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr,
                origin, start, short, head, scale, reach, window, H, D, HEADS, WIDTH, GROUP,
                SHORT, STAGES, BIAS, WINDOW, ROTARY, PLAIN, PRECISION,
            )  # fmt: skip


@triton.jit
def _long(
    qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr,
    start, end, q_start, q_end, head, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
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
            scores, allowed, distance, old, scale, bias_ptr, head, reach, BIAS, PLAIN, WINDOW
        )
        if PLAIN:
            shrink = tl.exp2((old - finite) * scale)
        else:
            shrink = tl.exp2(old - finite)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None]
        result = tl.dot(weights.to(v.dtype), v, result, input_precision=PRECISION)
    result = (result * (1.0 / total)[:, None]).to(q.dtype)
    _store_rows(out_ptr + head * D, q_token, row, live, result, H * D, D, WIDTH)


@triton.jit(do_not_specialize=["q_blocks", "reach", "window"])
def _long_kernel(
    qkv_ptr, out_ptr, cu_ptr, tiles_ptr, bias_ptr, cos_ptr, sin_ptr,
    q_blocks, scale, reach, window,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SHORT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, TILES: tl.constexpr,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, ROTARY: tl.constexpr, PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of the sequences of one tile that are longer than SHORT.

    Without a table of tiles, tile i is the query block `i % q_blocks` of sequence `i // q_blocks`.
    """
    LOOK_AHEAD: tl.constexpr = 16
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
                qkv_ptr, out_ptr, bias_ptr, cos_ptr, sin_ptr,
                start, end, q_start, tl.minimum(stop, q_start + BLOCK_Q), head, scale, reach,
                window, H, D, WIDTH, BLOCK_Q, BLOCK, STAGES, BIAS, WINDOW, ROTARY, PLAIN,
                PRECISION,
            )  # fmt: skip
            q_start = tl.minimum(stop, q_start + BLOCK_Q)
            sequence += (q_start == stop).to(tl.int32)


class Launch(NamedTuple):
    """A kernel, the number of its programs, its arguments by position and by name."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


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
    """Launch the kernels; what they compute is told in :func:`sbert_fast.ops.varlen_attention`.

    Args:
        qkv: fp16, bf16 or fp32 `[T, 3, H, D]`, contiguous, 8 <= D <= 128.
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
    out = qkv.new_empty(qkv.shape[0], qkv.shape[2], qkv.shape[3])
    if out.numel() > 0:
        tables = (bias, rotary_cos, rotary_sin)
        capability = torch.cuda.get_device_capability(qkv.device) if qkv.is_cuda else (0, 0)
        for kernel, programs, arguments, options in plan(
            qkv, out, cu_seqlens, max_seqlen, scale, window, tables, tiles, capability
        ):
            kernel[(programs,)](*arguments, **options)
    return out


def plan(
    qkv: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
    tiles: Tensor | None,
    capability: tuple[int, int],
) -> Iterator[Launch]:
    """What to launch, the dead tail cleared by the first; tensors of any device, `meta` too.

    Args:
        out: `[T, H, D]`, at least one element.
        tables: bias, rotary cos, rotary sin.
        capability: compute capability of the device.
    """
    tokens, _, heads, dim = qkv.shape
    sequences = cu_seqlens.shape[0] - 1
    bias, rotary, _ = tables
    width = max(MIN_WIDTH, triton.next_power_of_2(dim))
    plain = bias is None and rotary is None and window < 0
    config = tuning.attention(
        width,
        qkv.element_size() * 8,
        max_seqlen,
        plain=plain,
        rotary=rotary is not None,
        capability=capability,
    )
    numbers = (scale * math.log2(math.e), 0 if bias is None else bias.shape[1] // 2, window)
    options = {
        "H": heads,
        "D": dim,
        "WIDTH": width,
        "BIAS": bias is not None,
        "WINDOW": window >= 0,
        "ROTARY": rotary is not None,
        "PLAIN": bias is None and scale > 0,
        "PRECISION": _precision(qkv.dtype),
    }

    if config.group * max_seqlen * 3 * heads * dim > _MAX_OFFSET:
        # A group lies behind its longest sequence. Alone, a short one has no offset.
        config = replace(config, group=1, group_warps=config.group_warps // config.group)
    groups = max(1, triton.cdiv(sequences, config.group))
    together = tuning.heads_together(config.heads, heads, groups)
    yield Launch(
        _short_kernel,
        groups * (heads // together),
        (qkv, out, cu_seqlens, *tables, tokens, sequences, *numbers),
        options | _short_options(config, together, max_seqlen),
    )
    q_blocks = triton.cdiv(max_seqlen, config.block_q)
    num_tiles = sequences * q_blocks if tiles is None else tiles.shape[0]
    if max_seqlen > config.short and num_tiles > 0:
        yield Launch(
            _long_kernel,
            num_tiles * heads,
            (qkv, out, cu_seqlens, tiles, *tables, q_blocks, *numbers),
            options | {"TILES": tiles is not None} | _long_options(config, dim, width),
        )


def _short_options(config: tuning.Attention, together: int, max_seqlen: int) -> dict[str, Any]:
    return {
        "HEADS": together,
        "GROUP": config.group,
        "SHORTEST": SHORTEST,
        "SHORT": SHORTEST if max_seqlen <= SHORTEST else config.short,
        "STAGES": config.head_stages,
        "num_warps": config.group_warps,
    }


def _long_options(config: tuning.Attention, dim: int, width: int) -> dict[str, Any]:
    return {
        "SHORT": config.short,
        "BLOCK_Q": config.block_q,
        "BLOCK": config.block,
        "STAGES": config.stages,
        "num_warps": config.warps,
        # Wide rows of no power of two are addressed column by column, which takes more registers.
        "maxnreg": config.registers if dim == width or width < 64 else None,
    }


def _precision(dtype: torch.dtype) -> str:
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"
