"""What the attention kernels are made of: rows of heads that are loaded and stored, and the softmax
weights of a block of keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_heads(
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
def load_halves(
    ptr, origin, row, live, cos_ptr, sin_ptr, norm_ptr, eps,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Such rows in two halves, `[*row.shape, WIDTH]` each: normed if there is a norm, then turned.

    In halves, rows and rotary tables take half the registers, and are read once.
    """
    HALF: tl.constexpr = (D + 1) // 2
    AXIS: tl.constexpr = len(row.shape)
    column = tl.arange(0, WIDTH)
    in_a = column < HALF
    in_b = column < D - HALF
    live = tl.expand_dims(live, -1)
    rows = ptr + origin * STRIDE + tl.expand_dims(row * STRIDE, -1)
    a = tl.load(rows + column, mask=live & in_a, other=0.0).to(tl.float32)
    b = tl.load(rows + HALF + column, mask=live & in_b, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        squares = tl.expand_dims(tl.sum(a * a + b * b, AXIS), -1)
        # Rows that are not there stay zeros, also if eps is zero.
        factor = tl.where(live, tl.rsqrt(squares * (1.0 / D) + eps), 0.0)
        a = a * factor * tl.load(norm_ptr + column, mask=in_a, other=0.0)
        b = b * factor * tl.load(norm_ptr + HALF + column, mask=in_b, other=0.0)
    if ROTARY:
        angle = tl.expand_dims(row * HALF, -1) + column
        cos = tl.load(cos_ptr + origin * HALF + angle, mask=live & in_a, other=0.0)
        sin = tl.load(sin_ptr + origin * HALF + angle, mask=live & in_a, other=0.0)
        turned = a * cos - b * sin
        b = b * cos + a * sin
        a = turned
    return a.to(ptr.dtype.element_ty), b.to(ptr.dtype.element_ty)


@triton.jit
def load_qk(
    ptr, origin, row, live, cos_ptr, sin_ptr, norm_ptr, eps,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
    ROTARY: tl.constexpr,
):  # fmt: skip
    """Rows of q or k: both halves if they have a width, SIDE; otherwise the whole rows, twice."""
    if SIDE:
        x, y = load_halves(
            ptr, origin, row, live, cos_ptr, sin_ptr, norm_ptr, eps, STRIDE, D, SIDE, ROTARY
        )
    else:
        x = load_heads(ptr, origin, row, live, cos_ptr, sin_ptr, STRIDE, D, WIDTH, ROTARY)
        y = x
    return x, y


@triton.jit
def restrict(allowed, distance, window, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """Those of the keys `allowed` that are near enough, and not ahead of the query."""
    if WINDOW:
        allowed = allowed & (distance <= window) & (distance >= -window)
    if CAUSAL:
        allowed = allowed & (distance <= 0)
    return allowed


@triton.jit
def store_heads(
    ptr, origin, row, live, x, STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):
    column = tl.arange(0, WIDTH)
    mask = tl.expand_dims(live, -1)
    if D < WIDTH:
        mask = mask & (column < D)
    tl.store(ptr + origin * STRIDE + tl.expand_dims(row * STRIDE, -1) + column, x, mask=mask)


@triton.jit
def turn_back(
    a, b, x_ptr, origin, row, live, cos_ptr, sin_ptr, norm_ptr, eps, d_norm_ptr,
    STRIDE: tl.constexpr, D: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of rows of x, of those `a`, `b` `[ROWS, SIDE]` of what `load_halves` makes of
    them. What they give to the gradient of their norm goes to `d_norm_ptr` `[programs, D]`."""
    HALF: tl.constexpr = (D + 1) // 2
    column = tl.arange(0, SIDE)
    in_a = column < HALF
    in_b = column < D - HALF
    keep = tl.expand_dims(live, -1)
    if cos_ptr is not None:
        angle = origin * HALF + tl.expand_dims(row * HALF, -1) + column
        cos = tl.load(cos_ptr + angle, mask=keep & in_a, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=keep & in_a, other=0.0)
        turned = a * cos + b * sin
        b = b * cos - a * sin
        a = turned
    if norm_ptr is not None:
        rows = x_ptr + origin * STRIDE + tl.expand_dims(row * STRIDE, -1) + column
        x = tl.load(rows, mask=keep & in_a, other=0.0).to(tl.float32)
        y = tl.load(rows + HALF, mask=keep & in_b, other=0.0).to(tl.float32)
        squares = tl.expand_dims(tl.sum(x * x + y * y, 1), 1)
        # Rows that are not there stay zeros, also if eps is zero.
        factor = tl.where(keep, tl.rsqrt(squares * (1.0 / D) + eps), 0.0)
        x *= factor
        y *= factor
        d_norm_ptr += tl.program_id(0).to(tl.int64) * D
        tl.store(d_norm_ptr + column, tl.sum(a * x, 0), mask=in_a)
        tl.store(d_norm_ptr + HALF + column, tl.sum(b * y, 0), mask=in_b)
        a *= tl.load(norm_ptr + column, mask=in_a, other=0.0)
        b *= tl.load(norm_ptr + HALF + column, mask=in_b, other=0.0)
        slope = tl.expand_dims(tl.sum(a * x + b * y, 1), 1) * (1.0 / D)
        a = (a - x * slope) * factor
        b = (b - y * slope) * factor
    return a, b


@triton.jit
def store_gradient(
    ptr, x_ptr, origin, row, live, a, b, cos_ptr, sin_ptr, norm_ptr, eps, d_norm_ptr,
    ROW: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of rows of q or k, of those of what `load_qk` makes of them."""
    HALF: tl.constexpr = (D + 1) // 2
    if SIDE:
        a, b = turn_back(
            a, b, x_ptr, origin, row, live, cos_ptr, sin_ptr, norm_ptr, eps, d_norm_ptr, ROW, D,
            SIDE,
        )  # fmt: skip
        store_heads(ptr, origin, row, live, a, ROW, HALF, SIDE)
        store_heads(ptr + HALF, origin, row, live, b, ROW, D - HALF, SIDE)
    else:
        store_heads(ptr, origin, row, live, a, ROW, D, WIDTH)


@triton.jit
def clear_dead_tail(out_ptr, end, tokens, WIDTH: tl.constexpr):
    """Zeros in the rows `[end, tokens)` of `[T, WIDTH]`, shared out among all programs: they are a
    few rows as a rule, and may be all of them."""
    CHUNK: tl.constexpr = 256
    stop = tokens.to(tl.int64) * WIDTH
    first = end.to(tl.int64) * WIDTH + tl.program_id(0).to(tl.int64) * CHUNK
    while first < stop:
        at = first + tl.arange(0, CHUNK)
        tl.store(out_ptr + at, tl.zeros([CHUNK], out_ptr.dtype.element_ty), mask=at < stop)
        first += tl.num_programs(0).to(tl.int64) * CHUNK


@triton.jit
def logits(
    scores, allowed, distance, scale, bias_ptr, head, reach, BIAS: tl.constexpr, PLAIN: tl.constexpr
):
    """What softmax is taken of, in units of log2; scores before scaling where they are PLAIN. Minus
    infinity where not `allowed`."""
    if BIAS:
        at = tl.minimum(tl.maximum(distance, -reach), reach) + reach
        bias = tl.load(bias_ptr + head * (2 * reach + 1) + at)
        scores = tl.fma(scores, scale, bias * 1.4426950408889634)
    elif not PLAIN:
        scores = scores * scale
    # Keys that are not there are rows of zeros, so a sum cannot be NaN where a choice would not be.
    return scores + tl.where(allowed, 0.0, float("-inf"))


@triton.jit
def exponentials(scores, top, scale, PLAIN: tl.constexpr):
    """Unnormalised weights of `logits`, `top` being subtracted from them."""
    if PLAIN:
        return tl.exp2(tl.fma(scores, scale, -top * scale))
    else:
        return tl.exp2(scores - top)


@triton.jit
def softmax_weights(
    scores, allowed, distance, top, scale, bias_ptr, head, reach,
    BIAS: tl.constexpr, PLAIN: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """Unnormalised softmax weights of one block of keys, and the new maximum of each row: as it is,
    and the one that was subtracted, finite where rows may be GUARDED against having no key.

    Where nothing but a positive scale acts on the products (PLAIN), the maximum is taken before
    scaling: one operation less on every score.
    """
    AXIS: tl.constexpr = len(scores.shape) - 1
    scores = logits(scores, allowed, distance, scale, bias_ptr, head, reach, BIAS, PLAIN)
    top = tl.maximum(top, tl.max(scores, AXIS))
    finite = top
    if GUARDED:
        finite = tl.where(top == float("-inf"), 0.0, top)
    return exponentials(scores, tl.expand_dims(finite, AXIS), scale, PLAIN), top, finite
