"""`gelu(x + bias)`, exact or tanh, in one pass.

The exact form is `max(x, 0) - a·Q(a)` with `a = |x|` and `Q(a) = erfc(a/√2)/2 = 2^p(a)`: the
logarithm of Q is so smooth that a polynomial p follows it over the whole line. That is half the
instructions of `erf`, which would keep this kernel from the memory's speed in half precision, and
it keeps the relative accuracy that `1 + erf` loses for negative x.

Numerics: evaluated in fp32, one rounding. p is a weighted minimax fit on [0, 7] with p(0) = -1, of
degree 10 for fp32 results and 8 for halves: `|gelu - exact|` is below 4e-8, beyond 7 p falls
towards minus infinity as Q does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels.rows import WARPS


@triton.jit
def _erf_gelu(x, FP32: tl.constexpr):
    a = tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL)  # infinity times 0 is NaN
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
    p = p * a + -1.0
    return tl.maximum(x, 0.0) - a * tl.exp2(p)


@triton.jit
def _tanh_gelu(x):
    # x (1 + tanh u) / 2 is x / (1 + e^-2u); the floor keeps -infinity from being divided by itself.
    x = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
    # 2 √(2/π) log2(e), and the same times 0.044715.
    return x / (1.0 + tl.exp2(-x * (2.302208198 + 0.1029432397 * x * x)))


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_kernel(
    x_ptr,  # [T, F]
    bias_ptr,  # [F] fp32 or None
    out_ptr,  # [T, F]
    T,
    F: tl.constexpr,
    TANH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    blocks: tl.constexpr = (F + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    cols = (program % blocks) * CHUNK + tl.arange(0, CHUNK)
    first = (program // blocks).to(tl.int64) * (ROWS * SLOTS) + tl.arange(0, ROWS)
    cols_in = (first == first)[:, None] & (cols < F)[None, :]
    slots = ()
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        mask = (rows < T)[:, None]
        if F % CHUNK != 0:
            mask = mask & cols_in
        x = tl.load(x_ptr + (rows * F)[:, None] + cols[None, :], mask=mask, other=0.0)
        slots = slots + (x.to(tl.float32),)
    if bias_ptr is not None:
        # The full shape gives the bias the layout of x.
        at = bias_ptr + tl.zeros((ROWS, 1), tl.int32) + cols[None, :]
        bias = tl.load(at, mask=cols_in, other=0.0) if F % CHUNK != 0 else tl.load(at)
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        mask = (rows < T)[:, None]
        if F % CHUNK != 0:
            mask = mask & cols_in
        x = slots[slot]
        if bias_ptr is not None:
            x += bias
        y = _tanh_gelu(x) if TANH else _erf_gelu(x, out_ptr.dtype.element_ty == tl.float32)
        tile = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (rows * F)[:, None] + cols[None, :], tile, mask=mask)


def config(F: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernel for rows of F columns."""
    threads, vector = WARPS * 32, 16 // dtype.itemsize
    chunks = [threads * vector >> shift for shift in range(4)]
    chunk = min(chunks, key=lambda width: -(-F // width) * width)
    rows = threads * vector // chunk
    return {"CHUNK": chunk, "ROWS": rows, "SLOTS": 4, "num_warps": WARPS}


def bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """`gelu(x + bias)`; see :func:`sbert_fast.ops.bias_gelu`.

    Args:
        x: `[T, F]` fp16, bf16 or fp32, contiguous.
        bias: fp32 `[F]` or None.
        tanh: the tanh approximation instead of erf.

    Returns:
        `[T, F]` in the dtype of `x`.
    """
    T, F = x.shape
    constants = config(F, x.dtype)
    out = torch.empty_like(x)
    if T:
        rows = triton.cdiv(T, constants["ROWS"] * constants["SLOTS"])
        grid = (rows * triton.cdiv(F, constants["CHUNK"]),)
        _bias_gelu_kernel[grid](x, bias, out, T, F=F, TANH=tanh, **constants)
    return out
