"""What a call returns: embeddings, hidden states, or both, gathered from the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbert_fast.engine import Prepared
from sbert_fast.finite import raise_non_finite
from sbert_fast.inference import Pipeline, Request, embed_batch, pooling_options, run
from sbert_fast.packing import PackedBatch
from sbert_fast.stats import Counters
from sbert_fast.transfer import Arrival, Transfers


class _Embeddings:
    """Sink of sentence embeddings: fp32 `[N, dimension]`, on the host or the engine's device."""

    def __init__(self, pipeline: Pipeline, request: Request, out: Tensor) -> None:
        self._pipeline, self._request, self._out = pipeline, request, out
        self._transfers = Transfers(pipeline.engine.device)
        self._first, self._slice = 0, out
        self._arriving: tuple[int, Arrival] | None = None

    def open(self, first: int, count: int) -> None:
        self._first = first
        self._slice = self._out[first : first + count]
        device = self._pipeline.engine.device
        if self._out.device.type != device.type:
            self._slice = torch.empty(self._slice.shape, dtype=torch.float32, device=device)

    def run(self, members: NDArray[np.int64], batch: PackedBatch, prepared: Prepared) -> None:
        with self._transfers.current_device():
            staged, where = self._transfers.stage(batch, members)
            embed_batch(self._pipeline, self._request, staged, prepared, self._slice, where)

    def close(self) -> None:
        with self._transfers.current_device():
            arrival = self._transfers.collect(self._slice, self._out.device)
        # The slice before this one: the device had work to do in the meantime.
        self.finish()
        self._arriving = self._first, arrival

    def finish(self) -> None:
        """Wait for the last slice that was closed."""
        if self._arriving is None:
            return
        (first, arrival), self._arriving = self._arriving, None
        rows, finite = arrival.wait()
        if self._request.checks and not finite.all():
            bad = torch.nonzero(~finite).flatten() + first + self._request.offset
            raise_non_finite(bad.tolist(), self._pipeline.engine.compute_dtype)
        into = self._out[first : first + rows.shape[0]]
        if into.data_ptr() != rows.data_ptr():
            into.copy_(rows)


def sentence_embeddings(
    texts: Sequence[str],
    pipeline: Pipeline,
    request: Request,
    counters: Counters,
    progress: Callable[[int], Any],
    *,
    on_host: bool = True,
) -> Tensor:
    """One embedding a text.

    Returns:
        fp32 `[N, dimension]` in the order of `texts`, on the host or the engine's device.

    Raises:
        NonFiniteEmbeddingError: names the texts whose embedding is not finite.
    """
    device = torch.device("cpu") if on_host else pipeline.engine.device
    out = torch.empty((len(texts), request.dimension), dtype=torch.float32, device=device)
    sink = _Embeddings(pipeline, request, out)
    run(texts, pipeline, request, counters, sink, progress)
    sink.finish()
    return out


class _States:
    """Sink of hidden states: batch by batch, `take(texts, batch, x, embeddings)`.

    Args:
        take: gets the batch on the host, states and embeddings on the engine's device.
        pool: whether `take` gets embeddings, fp32 `[B, dimension]`, too.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        request: Request,
        take: Callable[[NDArray[np.int64], PackedBatch, Tensor, Tensor | None], None],
        *,
        pool: bool,
    ) -> None:
        self._pipeline, self._request, self._take, self._pool = pipeline, request, take, pool
        self._transfers = Transfers(pipeline.engine.device)
        self._first = 0

    def open(self, first: int, count: int) -> None:
        self._first = first

    def close(self) -> None:
        pass

    def run(self, members: NDArray[np.int64], batch: PackedBatch, prepared: Prepared) -> None:
        engine, embeddings = self._pipeline.engine, None
        with self._transfers.current_device():
            staged, where = self._transfers.stage(batch, np.arange(len(members)))
            x = engine(staged, prepared)
            if self._pool:
                shape = len(members), self._request.dimension
                embeddings = torch.empty(shape, dtype=torch.float32, device=x.device)
                how = pooling_options(self._pipeline, self._request)
                self._pipeline.head(x, staged, prepared.pooling, embeddings, where, **how)
            x = x[: batch.num_tokens]
        parts: list[Tensor] = [x] if embeddings is None else [x, embeddings]
        if self._request.checks and not all(torch.isfinite(part).all() for part in parts):
            finite = torch.stack([torch.isfinite(part).all() for part in batch.split_rows(x)])
            if embeddings is not None:
                finite &= torch.isfinite(embeddings).all(dim=1)
            bad = members[~finite.cpu().numpy()] + self._first + self._request.offset
            raise_non_finite(bad.tolist(), engine.compute_dtype)
        self._take(members + self._first, batch, x, embeddings)


def token_embeddings(
    texts: Sequence[str],
    pipeline: Pipeline,
    request: Request,
    counters: Counters,
    progress: Callable[[int], Any],
) -> list[Tensor]:
    """The hidden states of every token.

    Returns:
        For each text, fp32 `[L, E]`, on the engine's device.

    Raises:
        NonFiniteEmbeddingError: names the texts whose hidden states are not finite.
    """
    states: list[Tensor] = [torch.empty(0)] * len(texts)

    def split(indices: NDArray[np.int64], batch: PackedBatch, x: Tensor, _: Tensor | None) -> None:
        for index, part in zip(indices, batch.split_rows(x), strict=True):
            # A copy, so that a text's rows do not keep the whole batch alive.
            states[index] = part.to(torch.float32, copy=True)

    sink = _States(pipeline, request, split, pool=False)
    run(texts, pipeline, request, counters, sink, progress)
    return states


def features(
    texts: Sequence[str],
    pipeline: Pipeline,
    request: Request,
    counters: Counters,
    progress: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """What sentence-transformers returns for `output_value=None`: one dict a text, unpadded.

    Returns:
        `input_ids`, `token_type_ids` (where the tokenizer gives them) and `attention_mask` int64
        `[L]`, `modality`, `prompt_length` (where there is a prompt), `token_embeddings` fp32
        `[L, E]`, `sentence_embedding` fp32 `[dimension]`, all on the engine's device.
    """
    result: list[dict[str, Any]] = [{} for _ in texts]

    def collect(
        indices: NDArray[np.int64], batch: PackedBatch, x: Tensor, embeddings: Tensor | None
    ) -> None:
        assert embeddings is not None
        types = batch.token_type_ids
        types = torch.zeros_like(batch.input_ids) if types is None else types
        columns = (x, batch.input_ids.to(x.device), types.to(x.device))
        parts = zip(indices, embeddings, *map(batch.split_rows, columns), strict=True)
        for index, embedding, states, ids, kinds in parts:
            entry: dict[str, Any] = {"input_ids": ids.long()}
            if pipeline.tokenizer.returns_types:
                entry["token_type_ids"] = kinds.long()
            entry |= {"attention_mask": torch.ones_like(entry["input_ids"]), "modality": "text"}
            if request.prompt:
                entry["prompt_length"] = request.prompt_tokens
            entry["token_embeddings"] = states.to(torch.float32, copy=True)
            entry["sentence_embedding"] = embedding.clone()
            result[index] = entry

    sink = _States(pipeline, request, collect, pool=True)
    run(texts, pipeline, request, counters, sink, progress)
    return result
