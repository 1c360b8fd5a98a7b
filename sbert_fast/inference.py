"""Texts to embeddings: windows, batches, the packed forward pass, pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbert_fast import packing
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import NonFiniteEmbeddingError
from sbert_fast.packing import PackedBatch
from sbert_fast.pooling import PoolingHead
from sbert_fast.stats import Counters
from sbert_fast.tokenization import TextTokenizer, TokenizedTexts

# Texts tokenised and planned together: about a million tokens of English. Memory beyond the
# output is bounded by a window, whatever the number of texts.
_WINDOW_CHARACTERS = 4_000_000
_WINDOW_TEXTS = 65_536
# Bytes of the widest activation of a batch, and most tokens of one: with half of that 3 % of the
# speed are lost, with twice that nothing is gained but memory.
_CPU_ACTIVATION_BYTES = 12 << 20
_CPU_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A tokenizer, an engine and a pooling head that belong together."""

    tokenizer: TextTokenizer
    engine: PackedEncoder
    head: PoolingHead

    def default_batch_tokens(self) -> int:
        """Tokens of a batch on a CPU, by the width of the model."""
        architecture = self.engine.architecture
        width = max(architecture.intermediate_size, 3 * architecture.hidden_size)
        tokens = _CPU_ACTIVATION_BYTES // (width * self.engine.compute_dtype.itemsize)
        return int(min(_CPU_BATCH_TOKENS, max(256, tokens // 64 * 64)))


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one call that reach the packed engine.

    Attributes:
        prompt: prepended to every text.
        prompt_tokens: tokens of the prompt; 0 where neither pooling nor the caller asks for it.
        batch_tokens: most tokens of a batch.
        normalize: L2-normalise at the end.
        dimension: components kept of an embedding.
    """

    prompt: str
    prompt_tokens: int
    batch_tokens: int
    normalize: bool
    dimension: int


def _windows(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    start = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if characters >= _WINDOW_CHARACTERS or index + 1 - start >= _WINDOW_TEXTS:
            yield start, index + 1
            start, characters = index + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _batches(
    pipeline: Pipeline, tokens: TokenizedTexts, budget: int
) -> Iterator[tuple[NDArray[np.int64], PackedBatch]]:
    """Packed batches of a window with the rows, in the window, of their sequences."""
    architecture = pipeline.engine.architecture
    order, starts = packing.plan_batches(tokens.lengths, budget)
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        rows = order[start:end]
        yield (
            rows,
            packing.pack(
                tokens.ids,
                tokens.offsets,
                rows,
                token_types=tokens.types,
                position_offset=architecture.position_offset,
                uncounted_id=architecture.uncounted_id,
            ),
        )


def run(
    texts: Sequence[str],
    pipeline: Pipeline,
    request: Request,
    counters: Counters,
    consume: Callable[[int, NDArray[np.int64], PackedBatch, Tensor], None],
    progress: Callable[[int], Any],
) -> None:
    """Drive texts through the engine, window by window.

    Args:
        texts: checked texts.
        pipeline: what runs them.
        request: how.
        counters: updated after every window.
        consume: called with the index of the window's first text, the rows in the window of a
            batch's sequences, the batch, and its hidden states `[T, E]`.
        progress: called with the number of texts just finished.
    """
    for first, last in _windows(texts):
        window = texts[first:last]
        if request.prompt:
            window = [request.prompt + text for text in window]
        tokens = pipeline.tokenizer(window)
        prepared = pipeline.engine.prepared()
        count = 0
        for rows, batch in _batches(pipeline, tokens, request.batch_tokens):
            consume(first, rows, batch, pipeline.engine(batch, prepared))
            progress(len(rows))
            count += 1
        counters.add(
            texts=len(window),
            tokens=int(tokens.ids.shape[0]),
            batches=count,
            truncated=tokens.truncated,
        )


def pool_batch(
    pipeline: Pipeline, request: Request, batch: PackedBatch, x: Tensor, out: Tensor, rows: Tensor
) -> None:
    """Write the embeddings of a batch to `out[rows]` and check that they are finite."""
    pipeline.head(
        x,
        batch,
        out,
        rows,
        normalize=request.normalize,
        skip=0 if pipeline.head.spec.include_prompt else request.prompt_tokens,
        impl=pipeline.engine.impl,
    )
    finite = torch.isfinite(out[rows.long()]).all(dim=1)
    if not finite.all():
        _raise_non_finite(rows[~finite].tolist(), pipeline.engine.compute_dtype)


def sentence_embeddings(
    texts: Sequence[str],
    pipeline: Pipeline,
    request: Request,
    counters: Counters,
    progress: Callable[[int], Any],
) -> Tensor:
    """One embedding a text.

    Returns:
        fp32 `[N, dimension]` in the order of `texts`.

    Raises:
        NonFiniteEmbeddingError: names the texts whose embedding is not finite.
    """
    out = torch.empty((len(texts), request.dimension), dtype=torch.float32)

    def pool(first: int, rows: NDArray[np.int64], batch: PackedBatch, x: Tensor) -> None:
        where = torch.from_numpy((rows + first).astype(np.int32))
        pool_batch(pipeline, request, batch, x, out, where)

    run(texts, pipeline, request, counters, pool, progress)
    return out


def token_embeddings(
    texts: Sequence[str],
    pipeline: Pipeline,
    request: Request,
    counters: Counters,
    progress: Callable[[int], Any],
) -> list[Tensor]:
    """The hidden states of every token.

    Returns:
        For each text, fp32 `[L, E]`.

    Raises:
        NonFiniteEmbeddingError: names the texts whose hidden states are not finite.
    """
    states: list[Tensor] = [torch.empty(0)] * len(texts)

    def split(first: int, rows: NDArray[np.int64], batch: PackedBatch, x: Tensor) -> None:
        if not torch.isfinite(x[: batch.num_tokens]).all():
            bad = [
                first + int(row)
                for row, part in zip(rows, batch.split_rows(x), strict=True)
                if not torch.isfinite(part).all()
            ]
            _raise_non_finite(bad, pipeline.engine.compute_dtype)
        for row, part in zip(rows, batch.split_rows(x), strict=True):
            # A copy, so that a text's rows do not keep the whole batch alive.
            states[first + row] = part.to(torch.float32, copy=True)

    run(texts, pipeline, request, counters, split, progress)
    return states


def _raise_non_finite(indices: Sequence[int], dtype: torch.dtype) -> None:
    indices = sorted(indices)
    shown = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
    raise NonFiniteEmbeddingError(
        f"{len(indices)} embeddings hold NaN or infinity, for inputs[{shown}] computed in {dtype}; "
        "check the weights, or compute in float32 with dtype='float32'",
        indices,
    )


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
        `[L, E]`, `sentence_embedding` fp32 `[dimension]`.
    """
    embeddings = torch.empty((len(texts), request.dimension), dtype=torch.float32)
    result: list[dict[str, Any]] = [{} for _ in texts]

    def collect(first: int, rows: NDArray[np.int64], batch: PackedBatch, x: Tensor) -> None:
        where = torch.from_numpy((rows + first).astype(np.int32))
        pool_batch(pipeline, request, batch, x, embeddings, where)
        types = batch.token_type_ids
        types = torch.zeros_like(batch.input_ids) if types is None else types
        columns = (x, batch.input_ids, types)
        parts = zip(where.tolist(), *map(batch.split_rows, columns), strict=True)
        for index, states, ids, kinds in parts:
            entry: dict[str, Any] = {"input_ids": ids.long()}
            if pipeline.tokenizer.returns_types:
                entry["token_type_ids"] = kinds.long()
            entry |= {"attention_mask": torch.ones_like(entry["input_ids"]), "modality": "text"}
            if request.prompt:
                entry["prompt_length"] = request.prompt_tokens
            entry["token_embeddings"] = states.to(torch.float32, copy=True)
            entry["sentence_embedding"] = embeddings[index]
            result[index] = entry

    run(texts, pipeline, request, counters, collect, progress)
    return result
