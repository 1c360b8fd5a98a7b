"""Partial hashes of memory at raw addresses: one program for up to 128 rows of one tensor.

Every element is mixed with its place in the program; sums of integers know no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 128, 8
_KEY0 = tl.constexpr(-0x61C8864680B583EB)
_KEY1 = tl.constexpr(-0x40A7B892E31B1A47)


@triton.jit
def _content_kernel(
    table_ptr,  # [P, 9]
    out_ptr,  # [P]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    table_ptr += program * 9
    base = tl.load(table_ptr)
    num_rows = tl.load(table_ptr + 1)
    row_stride = tl.load(table_ptr + 2)
    slot = tl.load(table_ptr + 3)
    num_slots = tl.load(table_ptr + 4)
    slot_stride = tl.load(table_ptr + 5)
    num_columns = tl.load(table_ptr + 6)
    column_stride = tl.load(table_ptr + 7)
    itemsize = tl.load(table_ptr + 8)

    rows = tl.arange(0, ROWS).to(tl.int64)
    columns = tl.arange(0, COLUMNS).to(tl.int64)
    starts = base + rows * row_stride + (slot + rows) % num_slots * slot_stride
    at = starts[:, None] + (columns * column_stride)[None, :]  # [ROWS, COLUMNS] addresses
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    bits = tl.zeros((ROWS, COLUMNS), tl.int64)
    if itemsize == 8:
        bits = tl.load(at.to(tl.pointer_type(tl.int64)), mask=mask, other=0)
    elif itemsize == 4:
        bits = tl.load(at.to(tl.pointer_type(tl.int32)), mask=mask, other=0).to(tl.int64)
    elif itemsize == 2:
        bits = tl.load(at.to(tl.pointer_type(tl.int16)), mask=mask, other=0).to(tl.int64)
    else:
        bits = tl.load(at.to(tl.pointer_type(tl.int8)), mask=mask, other=0).to(tl.int64)
    place = rows[:, None] * COLUMNS + columns[None, :] + 1
    mixed = (bits ^ (place * _KEY0)) * _KEY1
    mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * _KEY0
    tl.store(out_ptr + program, tl.sum(tl.sum(mixed, axis=1), axis=0))


def content_hash(table: Tensor) -> Tensor:
    """Hash what lies at the addresses of a table.

    Args:
        table: int64 `[P, 9]` on the device of the memory, a row for each program: the address of
            its first row; rows, up to 128; bytes from row to row; the slot of the first row (row r
            is read at slot `(first + r) % slots`); slots; bytes from slot to slot; columns that
            are read, up to 8; bytes from column to column; bytes of an element, 1, 2, 4 or 8.

    Returns:
        int64 `[P]`, the hash of each program's rows.
    """
    out = torch.empty(table.shape[0], dtype=torch.int64, device=table.device)
    if table.shape[0]:
        _content_kernel[(table.shape[0],)](table, out, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
    return out
