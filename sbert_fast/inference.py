"""Texts to embeddings: windows, batches, the packed forward pass, pooling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbert_fast import budget, packing
from sbert_fast.engine import PackedEncoder, Prepared
from sbert_fast.errors import NonFiniteEmbeddingError, TokenIdError
from sbert_fast.layers import Unfinished
from sbert_fast.packing import PackedBatch
from sbert_fast.pooling import PoolingHead
from sbert_fast.stats import Counters
from sbert_fast.tokenization import TextTokenizer, TokenizedTexts
from sbert_fast.transfer import Arrival, Transfers
from sbert_fast.values import shown

# Characters and number of the texts that are tokenised and planned together: memory beyond the
# output is bounded by a window, whatever the number of texts. On a CPU a window is about a million
# tokens of English; less on a GPU, which computes one while the next is tokenised, and starts soon.
_WINDOWS = {"cpu": (4_000_000, 65_536), "cuda": (1_000_000, 16_384)}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A tokenizer, an engine and a pooling head that belong together."""

    tokenizer: TextTokenizer
    engine: PackedEncoder
    head: PoolingHead
    limit: budget.MemoryLimit = field(default_factory=budget.MemoryLimit)
    prepared: Prepared | None = None

    def prepare(self, prepared: Prepared) -> Pipeline:
        """The pipeline with what the tokenizer and the head are now, and `prepared` weights.

        Raises:
            UnsupportedModelError: the tokenizer or the head is no longer supported.
            InvalidWeightsError: weights hold NaN or infinity; the message names the tensor.
        """
        self.tokenizer.refresh()
        self.head.prepare(self.engine.admitted.tensors[0].dtype, prepared.device, self.engine.impl)
        return replace(self, prepared=prepared)

    def default_batch_tokens(self) -> int:
        """Tokens of a batch, by the model and its device."""
        prepared = self.prepared or self.engine.prepared()
        return budget.default_tokens(prepared.architecture, prepared.dtype, prepared.device)


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one call that reach the packed engine.

    Attributes:
        prompt: prepended to every text.
        prompt_tokens: tokens of the prompt; 0 where neither pooling nor the caller asks for it.
        batch_tokens: most tokens of a batch.
        normalize: L2-normalise at the end.
        dimension: components kept of an embedding.
        first: position of the first text in the caller's input.
        checks: whether embeddings that are not finite are refused.
    """

    prompt: str
    prompt_tokens: int
    batch_tokens: int
    normalize: bool
    dimension: int
    first: int = 0
    checks: bool = True


class Sink(Protocol):
    """Where the results of a call go, window by window and batch by batch."""

    def open(self, first: int, count: int) -> None:
        """A window begins: `count` texts from `first` on."""

    def run(self, rows: NDArray[np.int64], batch: PackedBatch, prepared: Prepared) -> None:
        """Compute a batch, on the host, whose sequences are the texts `rows` of the window."""

    def close(self) -> None:
        """The window has no more batches."""


def _windows(texts: Sequence[str], device: str) -> Iterator[tuple[int, int]]:
    most_characters, most_texts = _WINDOWS[device]
    start = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if characters >= most_characters or index + 1 - start >= most_texts:
            yield start, index + 1
            start, characters = index + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _check_ids(
    tokenizer: TextTokenizer, tokens: TokenizedTexts, first: int, prepared: Prepared
) -> None:
    """Refuse tokens outside the tables, which kernels on a GPU would read all the same."""
    rows = prepared.word.shape[0]
    if tokens.ids.max(initial=0) >= rows:
        indices, where = _owners(tokens, tokens.ids >= rows)
        found = int(tokens.ids[where])
        raise TokenIdError(
            f"inputs[{first + indices[0]}] holds the token {shown(tokenizer.token(found))}, whose "
            f"id {found} is outside the {rows} rows of the model's embedding table: where tokens "
            "were added to the tokenizer, call model.resize_token_embeddings(len(tokenizer)) on "
            "the base model",
            (indices + first).tolist(),
        )
    rows = 0 if prepared.token_type is None else prepared.token_type.shape[0]
    if rows and tokens.types is not None and tokens.types.max(initial=0) >= rows:
        indices, where = _owners(tokens, tokens.types >= rows)
        raise TokenIdError(
            f"inputs[{first + indices[0]}] holds a token of type {tokens.types[where]}, which is "
            f"outside the {rows} rows of the model's table of token types",
            (indices + first).tolist(),
        )


def _owners(tokens: TokenizedTexts, bad: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """The texts of the tokens that are `bad`, and the first of these tokens."""
    where = np.flatnonzero(bad)
    return np.unique(np.searchsorted(tokens.offsets, where, side="right") - 1), int(where[0])


def _pack(pipeline: Pipeline, tokens: TokenizedTexts, rows: NDArray[np.int64]) -> PackedBatch:
    architecture = pipeline.engine.architecture
    return packing.pack(
        tokens.ids,
        tokens.offsets,
        rows,
        token_types=tokens.types,
        position_offset=architecture.position_offset,
        uncounted_id=architecture.uncounted_id,
    )


def _plan(
    lengths: NDArray[np.int32], rows: NDArray[np.int64], tokens: int
) -> list[NDArray[np.int64]]:
    """The texts `rows` cut into batches of at most `tokens` tokens, longest texts first."""
    order, starts = packing.plan_batches(lengths[rows], tokens)
    ends = zip(starts[:-1], starts[1:], strict=True)
    return [rows[order[start:end]] for start, end in ends]


def _run_window(
    pipeline: Pipeline,
    tokens: TokenizedTexts,
    first: int,
    batch_tokens: int,
    counters: Counters,
    sink: Sink,
    progress: Callable[[int], Any],
) -> None:
    """Run the window that begins with text `first` of the caller's input."""
    prepared = pipeline.prepared or pipeline.engine.prepared()
    _check_ids(pipeline.tokenizer, tokens, first, prepared)
    every = np.arange(tokens.lengths.shape[0])
    left = deque(_plan(tokens.lengths, every, pipeline.limit.apply(batch_tokens)))
    while left:
        rows = left.popleft()
        batch = _pack(pipeline, tokens, rows)
        shortage = None
        try:
            sink.run(rows, batch, prepared)
        except torch.OutOfMemoryError as error:
            shortage = str(error)
        if shortage is None:
            counters.add(batches=1)
            progress(len(rows))
            continue
        # Behind the except block: the traceback keeps what the batch had allocated.
        counters.add(memory_shortages=1)
        torch.cuda.empty_cache()
        fitting = None if len(rows) == 1 else pipeline.limit.halve(batch.num_tokens)
        if fitting is None:
            what = f"inputs[{first + rows[0]}] with its {tokens.lengths[rows[0]]} tokens"
            if len(rows) > 1:
                what = f"after all halvings a batch of {batch.num_tokens} tokens, {what} in it,"
            where = f"does not fit the memory of {pipeline.engine.device}"
            raise torch.OutOfMemoryError(f"{what} {where}: {shortage}")
        left = deque(_plan(tokens.lengths, np.concatenate([rows, *left]), fitting))


def run(
    texts: Sequence[str],
    pipeline: Pipeline,
    request: Request,
    counters: Counters,
    sink: Sink,
    progress: Callable[[int], Any],
) -> None:
    """Drive texts through the engine, window by window.

    Args:
        texts: checked texts.
        pipeline: what runs them.
        request: how.
        counters: updated after every batch and window.
        sink: takes the batches.
        progress: called with the number of texts just finished, or on their way.

    Raises:
        TokenIdError: a token has no row in the embedding table; names the text and the token.
    """
    for first, last in _windows(texts, pipeline.engine.device.type):
        window = texts[first:last]
        if request.prompt:
            window = [request.prompt + text for text in window]
        tokens = pipeline.tokenizer(window)
        sink.open(first, last - first)
        position, most = request.first + first, request.batch_tokens
        _run_window(pipeline, tokens, position, most, counters, sink, progress)
        sink.close()
        counters.add(texts=len(window), tokens=int(tokens.ids.shape[0]), truncated=tokens.truncated)


def _how(pipeline: Pipeline, request: Request) -> dict[str, Any]:
    """How a call pools: the options of the head."""
    return {
        "normalize": request.normalize,
        "skip": 0 if pipeline.head.spec.include_prompt else request.prompt_tokens,
    }


def embed_batch(
    pipeline: Pipeline,
    request: Request,
    batch: PackedBatch,
    prepared: Prepared,
    out: Tensor,
    rows: Tensor,
) -> None:
    """Write the embeddings of a batch to `out[rows]`.

    Args:
        pipeline: its engine and its pooling head.
        request: how to pool.
        batch: on the device of `out`.
        prepared: weights of the engine.
        out: fp32 `[N, dimension]`.
        rows: the row of each sequence.
    """
    engine, head, kernels = pipeline.engine, pipeline.head, prepared.pooling
    x: Tensor | Unfinished
    if kernels.norm_pool is not None and head.fuses(out.shape[1]):
        x = engine.unfinished(batch, prepared)
    else:
        x = engine(batch, prepared)
    head(x, batch, kernels, out, rows, **_how(pipeline, request))


class _Embeddings:
    """Sink of sentence embeddings: fp32 `[N, dimension]`, on the host or the engine's device."""

    def __init__(self, pipeline: Pipeline, request: Request, out: Tensor) -> None:
        self._pipeline, self._request, self._out = pipeline, request, out
        self._transfers = Transfers(pipeline.engine.device)
        self._first, self._window = 0, out
        self._arriving: tuple[int, Arrival] | None = None

    def open(self, first: int, count: int) -> None:
        self._first = first
        self._window = self._out[first : first + count]
        device = self._pipeline.engine.device
        if self._out.device.type != device.type:
            self._window = torch.empty(self._window.shape, dtype=torch.float32, device=device)

    def run(self, rows: NDArray[np.int64], batch: PackedBatch, prepared: Prepared) -> None:
        with self._transfers.current_device():
            staged, where = self._transfers.stage(batch, rows)
            embed_batch(self._pipeline, self._request, staged, prepared, self._window, where)

    def close(self) -> None:
        with self._transfers.current_device():
            arrival = self._transfers.collect(self._window, self._out.device)
        # The window before this one: the device had work to do in the meantime.
        self.finish()
        self._arriving = self._first, arrival

    def finish(self) -> None:
        """Wait for the last window that was closed."""
        if self._arriving is None:
            return
        (first, arrival), self._arriving = self._arriving, None
        rows, finite = arrival.wait()
        if self._request.checks and not finite.all():
            bad = torch.nonzero(~finite).flatten() + first + self._request.first
            _raise_non_finite(bad.tolist(), self._pipeline.engine.compute_dtype)
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

    def run(self, rows: NDArray[np.int64], batch: PackedBatch, prepared: Prepared) -> None:
        engine, embeddings = self._pipeline.engine, None
        with self._transfers.current_device():
            staged, where = self._transfers.stage(batch, np.arange(len(rows)))
            x = engine(staged, prepared)
            if self._pool:
                shape = len(rows), self._request.dimension
                embeddings = torch.empty(shape, dtype=torch.float32, device=x.device)
                how = _how(self._pipeline, self._request)
                self._pipeline.head(x, staged, prepared.pooling, embeddings, where, **how)
            x = x[: batch.num_tokens]
        parts: list[Tensor] = [x] if embeddings is None else [x, embeddings]
        if self._request.checks and not all(torch.isfinite(part).all() for part in parts):
            finite = torch.stack([torch.isfinite(part).all() for part in batch.split_rows(x)])
            if embeddings is not None:
                finite &= torch.isfinite(embeddings).all(dim=1)
            bad = rows[~finite.cpu().numpy()] + self._first + self._request.first
            _raise_non_finite(bad.tolist(), engine.compute_dtype)
        self._take(rows + self._first, batch, x, embeddings)


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


def check_embeddings(embeddings: object, dtype: torch.dtype | None) -> None:
    """Refuse embeddings that sentence-transformers has computed and that are not finite.

    Args:
        embeddings: array or tensor `[N, dimension]` or `[dimension]`; or a list with a tensor, or a
            dict of tensors, for each text.
        dtype: dtype they were computed in, for the message; None where it is not known.

    Raises:
        NonFiniteEmbeddingError: names the texts.
    """
    if isinstance(embeddings, list):
        # Read together: on a GPU every look at one would wait for it.
        flags = {i: flag for i, x in enumerate(embeddings) if (flag := _finite(x)) is not None}
        told = torch.stack([*flags.values()]).tolist() if flags else []
        bad = [index for index, is_finite in zip(flags, told, strict=True) if not is_finite]
    else:
        embeddings = _floats(embeddings)
        if embeddings is None or not embeddings.numel():
            return
        finite = torch.isfinite(embeddings).reshape(-1, embeddings.shape[-1]).all(dim=1)
        bad = torch.nonzero(~finite).flatten().tolist()
    if bad:
        _raise_non_finite(bad, dtype)


def _floats(value: object) -> Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _finite(embedding: object) -> Tensor | None:
    """Whether the embeddings of one text are finite, bool `[]`: a tensor, or the dict of
    `output_value=None`. None where they are no floats."""
    if not isinstance(embedding, dict):
        floats = _floats(embedding)
        return None if floats is None else torch.isfinite(floats).all()
    sentence, tokens, mask = (
        embedding.get(name) for name in ("sentence_embedding", "token_embeddings", "attention_mask")
    )
    # Padding is no part of the text: nobody promises anything about its states.
    if isinstance(tokens, Tensor) and isinstance(mask, Tensor) and mask.shape == tokens.shape[:1]:
        tokens = tokens[mask.to(tokens.device) != 0]
    flags = [flag for part in (sentence, tokens) if (flag := _finite(part)) is not None]
    return torch.stack(flags).all() if flags else None


def _raise_non_finite(indices: Sequence[int], dtype: torch.dtype | None) -> None:
    indices = sorted(indices)
    shown = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
    computed = "" if dtype is None else f" computed in {dtype}"
    raise NonFiniteEmbeddingError(
        f"{len(indices)} embeddings hold NaN or infinity, for inputs[{shown}]{computed}; "
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
