"""Panels: the layout in which the C++ linear layers read their weights.

fp32: panels of 48 columns (output features) side by side, one step along the inputs after another,
`[panels, K, 48]`. bf16: strips of 16 columns, three to a panel, two inputs at a time,
`[3 * panels, K / 2, 16, 2]`. The layout is the same on every instruction set; the last panel is
filled up with zeros.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

COLUMNS = 48
STRIP_COLUMNS = 16


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
