"""What comes behind the last layer: one row of results of the states of each sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sbert_fast.layers import PoolKernels
from sbert_fast.packing import PackedBatch

# The token of each sequence, int64 `[B]`, by its place in `[T]`.
Rows = Callable[[PackedBatch], Tensor]


class Head:
    """Makes one row of results of the hidden states of each sequence.

    Attributes:
        dimension: components of a result, before truncation.
        include_prompt: False leaves out the tokens of the prompt.
        padding_sides: where sentence-transformers may pad, and the results are the same.
        takes_empty: whether a sequence without tokens has a result.
    """

    dimension: int
    include_prompt = True
    padding_sides: tuple[str, ...] = ("right",)
    takes_empty = False

    @property
    def is_training(self) -> bool:
        """Whether it computes something else in training mode, and is in it."""
        return False

    def prepare(self, dtype: torch.dtype, device: torch.device, impl: str) -> None:
        """Take over the modules as they are now: call this before calling the head.

        Args:
            dtype: of the encoder's weights: a head in another fails in sentence-transformers.
            device: where the weights are.
            impl: implementation of the ops.

        Raises:
            UnsupportedModelError: a module is no longer supported, or has another dtype.
            InvalidWeightsError: weights hold NaN or infinity; the message names the tensor.
        """
        raise NotImplementedError

    def fuses(self, dimension: int) -> bool:
        """Whether results of `dimension` components are made of states before their last norm."""
        return False

    def reads(self, skip: int) -> Rows | None:
        """What finds the token of each sequence that is read, if no other is."""
        return None

    def __call__(
        self,
        x: Any,  # noqa: ANN401
        batch: PackedBatch,
        kernels: PoolKernels,
        out: Tensor,
        rows: Tensor,
        *,
        normalize: bool,
        skip: int,
    ) -> None:
        """Write one result for each sequence.

        Args:
            x: hidden states `[T, E]` of `batch`; or, if `kernels` and :meth:`fuses` allow it, the
                states before their last norm.
            batch: the packed batch.
            kernels: the kernels of the engine that made `x`.
            out: fp32 `[N, dimension]`, or fewer columns if embeddings are truncated.
            rows: int32 `[B]`: sequence i goes to `out[rows[i]]`.
            normalize: L2-normalise at the end, after truncation.
            skip: tokens of the prompt to leave out.
        """
        out[rows.long()] = self.scores(x, batch, kernels).float()

    def scores(self, x: Tensor, batch: PackedBatch, kernels: PoolKernels) -> Tensor:
        """Results `[B, dimension]` of a head that takes no options; arguments as of a call."""
        raise NotImplementedError
