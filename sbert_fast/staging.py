"""Texts that are already token ids, staged on an engine's device: what a pass alone costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbert_fast import packing
from sbert_fast.inference import Pipeline, Request, embed_batch
from sbert_fast.transfer import Transfers


@dataclass
class Staged:
    """Batches on a device.

    Attributes:
        run: computes all batches: embeddings `[N, E]` on the device, in batch order.
        order: int64 `[N]`, which text each row belongs to.
        batch_tokens: tokens computed in each batch, padding included.
    """

    run: Callable[[], Tensor]
    order: NDArray[np.int64]
    batch_tokens: list[int]


def stage(
    pipeline: Pipeline, ids: NDArray[np.int64], lengths: NDArray[np.int64], *, normalize: bool
) -> Staged:
    """Plan, pack and copy batches, so that a run is only the packed forward and the pooling.

    Args:
        pipeline: see :attr:`FastEncoder.packed_pipeline`.
        ids: `[T]`, the tokens of all texts, one text after the other, special tokens included.
        lengths: `[N]`, the tokens of each text.
        normalize: whether embeddings are L2-normalised at the end.
    """
    engine, dimension = pipeline.engine, pipeline.head.dimension
    most = pipeline.default_batch_tokens()
    request = Request("", 0, batch_tokens=most, normalize=normalize, dimension=dimension)
    order, starts = packing.plan_batches(lengths.astype(np.int32), most)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    transfers, batches = Transfers(engine.device), []
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        batch = packing.pack(
            ids.astype(np.int32),
            offsets,
            order[start:end],
            position_offset=engine.architecture.position_offset,
            uncounted_id=engine.architecture.uncounted_id,
        )
        batches.append(transfers.stage(batch, np.arange(start, end)))
    out = torch.empty((len(lengths), dimension), dtype=torch.float32, device=engine.device)

    @torch.inference_mode()
    def run() -> Tensor:
        prepared = engine.prepared()
        for batch, rows in batches:
            embed_batch(pipeline, request, batch, prepared, out, rows)
        return out

    return Staged(run, order, [int(batch.input_ids.shape[0]) for batch, _ in batches])
