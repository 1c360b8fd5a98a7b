"""Norms of the packed engine: their parameters as the ops take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sbert_fast.models.base import Norm


@dataclass(frozen=True, slots=True)
class PreparedNorm:
    """The parameters of a norm in fp32; the bias of one that has none is zeros.

    They keep their gradients where these are recorded when it is made.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    rms: bool = False

    @classmethod
    def of(cls, norm: Norm) -> PreparedNorm:
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        weight, bias = (attached(part).float().contiguous() for part in (norm.weight, bias))
        weight = weight + norm.shift if norm.shift else weight
        return cls(aligned(weight), aligned(bias), norm.eps, norm.rms)


def attached(values: Tensor) -> Tensor:
    """`values`, detached unless gradients are recorded."""
    return values if torch.is_grad_enabled() else values.detach()


def aligned(values: Tensor) -> Tensor:
    """`values`, copied where they begin between the 16 bytes that a kernel loads at once.

    A file that is mapped into memory has its tensors anywhere.
    """
    return values if values.data_ptr() % 16 == 0 else values.clone()
