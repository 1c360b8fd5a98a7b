"""Whether tensors still hold what they held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ContentHash:
    """A hash over what tensors hold at the time of each call.

    Args:
        tensors: dense tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)

    def __call__(self) -> int:
        return hash(
            tuple(
                (t.data_ptr(), t.dtype, t.shape, t.stride(), torch.hash_tensor(t.detach()).item())
                for t in self._tensors
            )
        )
