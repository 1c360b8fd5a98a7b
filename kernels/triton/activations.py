"""Activation functions of fp32 tiles, and the tiles of rows whose elements have nothing in common.

The exact GELU is `max(x, 0) - a·Q(a)` with `a = |x|` and `Q(a) = erfc(a/√2)/2 = 2^p(a)`: the
logarithm of Q is so smooth that a polynomial p follows it over the whole line. That is half the
instructions of `erf`, which would keep these kernels from the memory's speed in half precision, and
it keeps the relative accuracy that `1 + erf` loses for negative x.

Numerics: p is a weighted minimax fit on [0, 7] with p(0) = -1, of degree 10 for fp32 results and 8
for halves: `|gelu - exact|` is below 4e-8, beyond 7 p falls towards minus infinity as Q does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sbert_fast.kernels.rows import WARPS

# Codes of the activations, those of the schemas.
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
SILU = tl.constexpr(3)


@triton.jit
def _magnitude(x, limit):
    """`|x|`, at most `limit`: infinity times 0 is NaN."""
    return tl.minimum(tl.abs(x), limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tail(a, FP32: tl.constexpr):
    """Q of magnitudes."""
    if FP32:
        p = a * -3.8568117588511086e-08 + 1.0638153753461665e-06
        p = p * a + -1.2700521438091528e-05
        p = p * a + 8.39991116663441e-05
        p = p * a + -0.0002975728129968047
        p = p * a + 2.2333966626320034e-05
        p = p * a + 0.006935106124728918
        p = p * a + -0.052442047744989395
        p = p * a + -0.45921823382377625
        p = p * a + -1.1511046886444092
    else:
        p = a * -1.3203846265241737e-06 + 2.0876668713754043e-05
        p = p * a + -9.617587056709453e-05
        p = p * a + -0.0003608611586969346
        p = p * a + 0.007367414887994528
        p = p * a + -0.05271776765584946
        p = p * a + -0.45912966132164
        p = p * a + -1.1511152982711792
    return tl.exp2(p * a + -1.0)


@triton.jit
def erf_gelu(x, FP32: tl.constexpr):
    a = _magnitude(x, 20.0)
    return tl.maximum(x, 0.0) - a * _tail(a, FP32)


@triton.jit
def tanh_gelu(x):
    # x (1 + tanh u) / 2 is x / (1 + e^-2u); the floor keeps -infinity from being divided by itself.
    x = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
    # 2 √(2/π) log2(e), and the same times 0.044715.
    return x / (1.0 + tl.exp2(-x * (2.302208198 + 0.1029432397 * x * x)))


@triton.jit
def silu(x):
    # As above, a floor against infinities, far below where the result is zero.
    x = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
    return x / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, FP32: tl.constexpr):
    """The activation of a code; FP32: for results in fp32."""
    if ACTIVATION == GELU:
        y = erf_gelu(x, FP32)
    elif ACTIVATION == GELU_TANH:
        y = tanh_gelu(x)
    elif ACTIVATION == SILU:
        y = silu(x)
    else:
        y = x
    return y


@triton.jit
def slope(x, ACTIVATION: tl.constexpr, FP32: tl.constexpr):
    """The derivative of :func:`activate`."""
    if ACTIVATION == GELU:
        a = _magnitude(x, 20.0)
        tail = _tail(a, FP32)
        # log2(e) / 2, and 1 / √2π.
        density = tl.exp2(a * a * -0.7213475204444817) * 0.3989422804014327
        d = tl.where(x < 0, tail - a * density, 1.0 - tail + a * density)
    elif ACTIVATION == GELU_TANH or ACTIVATION == SILU:
        # x sigmoid(z); beyond the limit, its derivative is 0 or 1, and powers of two are finite.
        a = _magnitude(x, 10.0 if ACTIVATION == GELU_TANH else 80.0)
        z = a * 1.4426950408889634
        d_z = 1.0
        if ACTIVATION == GELU_TANH:
            z = a * (2.302208198 + 0.1029432397 * a * a)
            d_z = 1.595769122 + 0.2140644488 * a * a
        power = tl.exp2(-z)
        sigmoid = 1.0 / (1.0 + power)  # of |z|
        tail = power * sigmoid
        rise = a * d_z * tail * sigmoid
        d = tl.where(x < 0, tail - rise, sigmoid + rise)
    else:
        d = tl.full(x.shape, 1.0, tl.float32)
    return d


def tiles(F: int, dtype: torch.dtype, slots: int) -> dict[str, int]:
    """Constants of a kernel whose programs take `slots` tiles of rows of F columns: the width of a
    tile that pads least, and its rows."""
    threads, vector = WARPS * 32, 16 // dtype.itemsize
    chunks = [threads * vector >> shift for shift in range(4)]
    chunk = min(chunks, key=lambda width: -(-F // width) * width)
    rows = threads * vector // chunk
    return {"CHUNK": chunk, "ROWS": rows, "SLOTS": slots, "num_warps": WARPS}


def grid(T: int, F: int, constants: dict[str, int]) -> tuple[int]:
    """The programs that such a kernel takes for T rows of F columns."""
    rows = triton.cdiv(T, constants["ROWS"] * constants["SLOTS"])
    return (rows * triton.cdiv(F, constants["CHUNK"]),)
