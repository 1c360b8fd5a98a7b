"""`LayerNorm(word[ids] + position_table[positions] + type_table[types])`, gathered and normalised
in one pass. RMSNorm may take the place of LayerNorm, and the position table, the type table and
the norm may be missing.

Numerics: fp32 sum and statistics, two passes over registers (mean, then centred variance); one
rounding. The order of a row's reduction depends on E and the dtype of the tables only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbert_fast.kernels.rows import (
    WARPS,
    add_tiles,
    load_rows,
    load_vector,
    row_tile,
    scale_tiles,
    standardize,
    store_rows,
)


@triton.jit(do_not_specialize=["T"])
def _embed_norm_kernel(
    ids_ptr,  # [T] int32
    positions_ptr,  # [T] int32 or None
    types_ptr,  # [T] int32, or None: type 0
    word_ptr,  # [V, E]
    position_table_ptr,  # [P, E] or None
    type_table_ptr,  # [N, E] or None
    weight_ptr,  # [E] fp32, or None: no norm
    bias_ptr,  # [E] fp32, or None as well
    out_ptr,  # [T, E]
    T,
    eps,
    E: tl.constexpr,
    RMS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (ROWS * SLOTS) + tl.arange(0, ROWS)
    slots = ()
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        keep = rows < T
        ids = tl.load(ids_ptr + rows, mask=keep, other=0).to(tl.int64)
        if position_table_ptr is not None:
            positions = tl.load(positions_ptr + rows, mask=keep, other=0).to(tl.int64)
        x = load_rows(word_ptr, ids * E, keep, E, CHUNK)
        if position_table_ptr is not None:
            x = add_tiles(x, load_rows(position_table_ptr, positions * E, keep, E, CHUNK))
        if type_table_ptr is not None:
            types = tl.zeros((ROWS,), tl.int64)
            if types_ptr is not None:
                types = tl.load(types_ptr + rows, mask=keep, other=0).to(tl.int64)
            x = add_tiles(x, load_rows(type_table_ptr, types * E, keep, E, CHUNK))
        slots = slots + (x,)
    for slot in tl.static_range(SLOTS):
        rows = first + slot * ROWS
        x = slots[slot]
        if weight_ptr is not None:
            x = standardize(x, eps, E, CHUNK, RMS)
            if slot == 0:
                weight = load_vector(weight_ptr, E, CHUNK, ROWS)
                bias = load_vector(bias_ptr, E, CHUNK, ROWS)
            x = scale_tiles(x, weight, bias)
        store_rows(out_ptr, rows * E, rows < T, x, E, CHUNK)


def config(E: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernel for tables `[*, E]` of `dtype`."""
    tile = row_tile(E, dtype)
    slots = max(1, 32 // tile.per_lane)
    return {"CHUNK": tile.chunk, "ROWS": tile.rows, "SLOTS": slots, "num_warps": WARPS}


def embed_norm(
    ids: Tensor,
    positions: Tensor | None,
    types: Tensor | None,
    word: Tensor,
    position_table: Tensor | None,
    type_table: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    rms: bool = False,
) -> Tensor:
    """Embeddings of packed tokens, summed and normalised; see :func:`sbert_fast.ops.embed_norm`.

    Args:
        ids, positions: int32 `[T]`, inside their tables; positions None without a table.
        types: int32 `[T]`; None with a table means type 0 everywhere.
        word: `[V, E]` fp16, bf16 or fp32, contiguous; E up to 4096.
        position_table, type_table: `[P, E]` and `[N, E]` of the dtype of `word`, each or None.
        weight, bias: fp32 `[E]`; both None: no norm.
        eps: added to the variance.
        out_dtype: fp16, bf16 or fp32.
        rms: RMSNorm instead of LayerNorm.

    Returns:
        `[T, E]` in `out_dtype`.

    Raises:
        ValueError: E is over 4096.
    """
    T, E = ids.shape[0], word.shape[1]
    constants = config(E, word.dtype)
    out = word.new_empty((T, E), dtype=out_dtype)
    if T:
        grid = (triton.cdiv(T, constants["ROWS"] * constants["SLOTS"]),)
        tables = word, position_table, type_table
        _embed_norm_kernel[grid](
            ids, positions, types, *tables, weight, bias, out, T, eps, E=E, RMS=rms, **constants
        )
    return out
