"""Dropout of attention weights: which of them stay, as `sbert_fast/ops/dropout.py` tells.

`drops`, everywhere: the address of the seed, the threshold of its words, and the factor of what
stays; None three times where nothing is dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def staying(drops, origin, row, head, first, KEYS: tl.constexpr):
    """Which weights stay, `[*row.shape, KEYS]`, of the queries in the packed rows `origin + row`
    and the keys from position `first` of their sequence on, a multiple of four; something that
    `drop` does not read where nothing is dropped."""
    seed_ptr, threshold, _ = drops
    if seed_ptr is not None:
        query = tl.expand_dims((origin + row).to(tl.int32), -1)
        nothing = query * 0 + tl.arange(0, KEYS // 4) * 0
        group = nothing + (first // 4 + tl.arange(0, KEYS // 4))
        a, b, c, d = tl.philox(tl.load(seed_ptr), group, nothing + query, nothing + head, nothing)
        words = tl.join(tl.join(a, c), tl.join(b, d))
        if len(row.shape) == 1:
            words = tl.reshape(words, [row.shape[0], KEYS])
        else:
            words = tl.reshape(words, [row.shape[0], row.shape[1], KEYS])
        return words >= threshold.to(tl.uint32)
    else:
        return row


@triton.jit
def drop(x, stay, drops):
    """`x` where it stays, scaled, and zeros elsewhere."""
    if drops[0] is not None:
        x = tl.where(stay, x * drops[2], 0.0)
    return x
