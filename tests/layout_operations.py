"""How weights lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from model_operations import Act, operation
from walks import NotNow, Subject

# Layouts


@operation
def parameter_replaced(s: Subject) -> None:
    linear = s.module(nn.Linear)
    linear.weight = nn.Parameter(linear.weight.detach() * s.rng.choice([0.6, 1.5]))


def _laid_out(change: Callable[[torch.Tensor], torch.Tensor], *types: type[nn.Module]) -> Act:
    def act(s: Subject) -> None:
        weight = s.module(*types).weight
        weight.data = change(weight.data)

    return act


for _name, _layout in {
    "transposed": lambda w: w.t().contiguous().t(),
    "strided": lambda w: w.repeat_interleave(2, dim=-1)[..., ::2],
    "off the grid": lambda w: torch.cat([w.flatten()[:1], w.flatten()])[1:].view(w.shape),
}.items():
    operation(_laid_out(_layout, nn.Linear), name=f"linear {_name}", changes=False)
    operation(_laid_out(_layout, nn.Embedding), name=f"table {_name}", changes=False)
operation(
    _laid_out(lambda w: w.repeat_interleave(2)[::2], nn.LayerNorm),
    name="norm strided",
    changes=False,
)


@operation(changes=False)
def from_fortran_array(s: Subject) -> None:
    weight = s.base.get_input_embeddings().weight
    if weight.dtype == torch.bfloat16:
        raise NotNow
    weight.data = torch.from_numpy(np.asfortranarray(weight.detach().numpy()))


@operation
def expanded_bias(s: Subject) -> None:
    linear = s.layer().intermediate.dense if hasattr(s.layer(), "intermediate") else None
    if linear is None or linear.bias is None:
        raise NotNow
    linear.bias.data = linear.bias.data[:1].expand(len(linear.bias))
