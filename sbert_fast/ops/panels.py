"""Panels: the layout in which the C++ linear layers read their weights.

fp32: panels of 48 columns (output features) side by side, one step along the inputs after another,
`[panels, K, 48]`. bf16: strips of 16 columns, three to a panel, two inputs at a time,
`[3 * panels, K / 2, 16, 2]`. int8: strips likewise, four inputs at a time, behind two steps of
another meaning, both fp32: the scale of each column, and the sum of its weights. fp32 weights that
are split into sums of two bf16: strips of bf16 likewise, but for each 32 inputs the lesser parts,
then the greater ones, `[3 * panels, K, 16, 2]`. The layout is the same on every instruction set;
the last panel is filled up with zeros.

Gated layers have two panels for 48 columns of the result: strips of the columns that are activated,
each before the strip of those that they are multiplied by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 48
STRIP_COLUMNS = 16
INT8_GROUP = 4  # inputs
SPLIT_GROUP = 32  # inputs
LARGEST = 127
STEPS = 253


def pack(weight: Tensor) -> Tensor:
    """The panels of `weight` `[N, K]`, fp32 or bf16; K is even in bf16."""
    features, inputs = weight.shape
    weight = F.pad(weight, (0, 0, 0, -features % COLUMNS))
    if weight.element_size() == 2:
        pairs = weight.view(-1, STRIP_COLUMNS, inputs // 2, 2)
        return pairs.transpose(1, 2).contiguous()
    return weight.view(-1, COLUMNS, inputs).transpose(1, 2).contiguous()


def unpack(panels: Tensor, features: int) -> Tensor:
    """The weight `[N, K]` that :func:`pack` was given, N = `features`."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * panels.shape[2], -1)[:features]


def gated_columns(features: int) -> int:
    """The columns of the panels of a gated layer of `features` results."""
    return 2 * (features + -features % COLUMNS)


def interleave(rows: Tensor, first: bool) -> Tensor:
    """The rows of a gated layer in the order of its panels, zeros where the last ones have none.

    Args:
        rows: of a weight or a bias, `[2F, ...]`, one half after the other.
        first: whether the first half is the one that is activated.

    Returns:
        `[gated_columns(F), ...]`.
    """
    halves = rows.chunk(2) if first else rows.chunk(2)[::-1]
    missing = rows.new_zeros(-len(halves[0]) % COLUMNS, *rows.shape[1:])
    strips = [torch.cat((half, missing)).unflatten(0, (-1, STRIP_COLUMNS)) for half in halves]
    return torch.stack(strips, dim=1).flatten(0, 2)


def separated(columns: Tensor, features: int) -> Tensor:
    """The halves of `columns` `[T, gated_columns(F)]` side by side, `[T, 2F]`, F = `features`."""
    strips = columns.unflatten(1, (columns.shape[1] // (2 * STRIP_COLUMNS), 2, STRIP_COLUMNS))
    return strips.transpose(1, 2).flatten(2)[:, :, :features].flatten(1)


def pack_int8(weight: Tensor) -> Tensor:
    """The int8 panels of `weight` fp32 `[N, K]`, each row rounded to 127 steps of its own each way.

    K is a multiple of 4.
    """
    features, inputs = weight.shape
    weight = F.pad(weight, (0, 0, 0, -features % COLUMNS))
    scale = weight.abs().amax(1) / LARGEST
    steps = weight / scale.where(scale > 0, 1.0)[:, None]
    rounded = steps.round().clamp(-LARGEST, LARGEST).to(torch.int8)
    header = torch.stack((scale, rounded.sum(1, dtype=torch.float32)), dim=1)
    header = header.view(-1, STRIP_COLUMNS, 2).transpose(1, 2).contiguous().view(torch.int8)
    groups = rounded.view(-1, STRIP_COLUMNS, inputs // INT8_GROUP, INT8_GROUP).transpose(1, 2)
    return torch.cat((header.view(-1, 2, STRIP_COLUMNS, INT8_GROUP), groups), dim=1)


def unpack_int8(panels: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """The weights int8 `[N, K]` that :func:`pack_int8` has rounded, and their scales fp32 `[N]`."""
    scales = panels[:, 0].contiguous().view(torch.float32).view(-1)[:features]
    return unpack(panels[:, 2:], features), scales


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """The greater and the lesser part of `values` fp32: bf16 both, their sum right to 2^-17."""
    greater = values.bfloat16()
    return greater, (values - greater.float()).bfloat16()


def pack_split(weight: Tensor) -> Tensor:
    """The split panels of `weight` fp32 `[N, K]`; K is a multiple of 32."""
    greater, lesser = (pack(part).unflatten(1, (-1, SPLIT_GROUP // 2)) for part in split(weight))
    return torch.stack((lesser, greater), dim=2).flatten(1, 3)


def unpack_split(panels: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """The greater and the lesser part bf16 `[N, K]` of what :func:`pack_split` was given."""
    parts = panels.unflatten(1, (-1, 2, SPLIT_GROUP // 2))
    lesser, greater = (unpack(parts[:, :, part].flatten(1, 2), features) for part in (0, 1))
    return greater, lesser


def is_split(panels: Tensor, inputs: int) -> bool:
    """Whether `panels` of so many inputs are split."""
    return panels.dim() == 4 and panels.shape[1] == inputs


def multiply(x: Tensor, panels: Tensor, features: int) -> Tensor:
    """`x` `[T, K]`, fp32 or fp64, times panels of any kind: `[T, N]` in its dtype."""
    if panels.dtype == torch.int8:
        return multiply_int8(x, panels, features)
    if is_split(panels, x.shape[1]):
        greater, lesser = unpack_split(panels, features)
        return F.linear(x, greater.to(x.dtype) + lesser.to(x.dtype))
    return F.linear(x, unpack(panels, features).to(x.dtype))


def multiply_int8(x: Tensor, panels: Tensor, features: int) -> Tensor:
    """`x` `[T, K]`, fp32 or fp64, times int8 panels: `[T, N]` in its dtype.

    Each row of x is rounded to 253 steps from the smallest to the largest of its values and zero;
    sums of products are exact.
    """
    weight, scale = (part.double() for part in unpack_int8(panels, features))
    smallest, largest = (f(x, dim=1, keepdim=True).float() for f in (torch.amin, torch.amax))
    smallest, width = smallest.clamp(max=0), largest.clamp(min=0) - smallest.clamp(max=0)
    inverse = torch.where(width > 1e-30, STEPS / width, 0.0).double()
    zero = (-smallest.double() * inverse).round() + 1
    sums = F.linear((x.double() * inverse + zero).round(), weight).float().double()
    sums = (sums - weight.sum(1) * zero).float().to(x.dtype)
    row_scale = width / STEPS + (x.float() * 0).sum(1, keepdim=True)
    return sums * (scale.to(x.dtype) * row_scale.to(x.dtype))
