"""Texts to embeddings: slices, batches, the packed forward pass, pooling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbert_fast import budget, packing
from sbert_fast.engine import PackedEncoder, Prepared
from sbert_fast.errors import InputError, TokenIdError
from sbert_fast.heads import Head
from sbert_fast.layers import Unfinished
from sbert_fast.packing import PackedBatch
from sbert_fast.stats import Counters
from sbert_fast.tokenization import TextTokenizer, TokenizedTexts
from sbert_fast.values import shown

# Most characters and most texts of a slice of the input, which is tokenised and planned as a whole:
# memory beyond the output is bounded by a slice, whatever the number of texts. On a CPU a slice is
# about a million tokens of English; on a GPU it is smaller, because the GPU computes one slice
# while the next is tokenised, and should start soon.
_SLICES = {"cpu": (4_000_000, 65_536), "cuda": (1_000_000, 16_384)}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A tokenizer, an engine and a head that belong together; `first` is the module of
    sentence-transformers that has the tokenizer."""

    first: Any
    tokenizer: TextTokenizer
    engine: PackedEncoder
    head: Head
    limit: budget.MemoryLimit = field(default_factory=budget.MemoryLimit)
    prepared: Prepared | None = None

    def prepare(self, prepared: Prepared) -> Pipeline:
        """The pipeline with what the tokenizer and the head are now, and `prepared` weights.

        Raises:
            UnsupportedModelError: the tokenizer or the head is no longer supported.
            InvalidWeightsError: weights hold NaN or infinity; the message names the tensor.
        """
        self.tokenizer.refresh()
        dtype, device = self.engine.admitted.tensors[0].dtype, prepared.target.device
        self.head.prepare(dtype, device, self.engine.impl)
        return replace(self, prepared=prepared)

    def default_batch_tokens(self) -> int:
        """Tokens of a batch, by the model and its device."""
        prepared = self.prepared or self.engine.prepared()
        dtype, device = prepared.target.dtype, prepared.target.device
        return budget.default_tokens(prepared.architecture, dtype, device)


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one call that reach the packed engine.

    Attributes:
        prompt: prepended to every text.
        prompt_tokens: tokens of the prompt; 0 where neither pooling nor the caller asks for it.
        batch_tokens: most tokens of a batch.
        normalize: L2-normalise at the end.
        dimension: components kept of an embedding.
        offset: position of the first text in the caller's input.
        checks: whether embeddings that are not finite are refused.
    """

    prompt: str
    prompt_tokens: int
    batch_tokens: int
    normalize: bool
    dimension: int
    offset: int = 0
    checks: bool = True


class Ready(list[Any]):
    """Inputs that are tokenised already, prompt included; a slice of them is, too.

    Attributes:
        tokenizer: what has tokenised them; None if they may not be tokenised again by another.
        tokens: their tokens.
        offset: position of the first of them in the caller's input.
    """

    def __init__(
        self,
        inputs: Iterable[Any],
        tokenizer: TextTokenizer | None,
        tokens: TokenizedTexts,
        offset: int = 0,
    ) -> None:
        super().__init__(inputs)
        self.tokenizer, self.tokens, self.offset = tokenizer, tokens, offset

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if not isinstance(key, slice):
            return part
        first, last, _ = key.indices(len(self))
        return Ready(part, self.tokenizer, self.tokens.part(first, last), self.offset + first)

    @staticmethod
    def join(parts: Sequence[Ready]) -> list[Any]:
        """Some, one after the other; where tokenizers differ, they are to be tokenised again."""
        texts, tokenizers = chain.from_iterable(parts), [part.tokenizer for part in parts]
        if None not in tokenizers and any(each is not tokenizers[0] for each in tokenizers):
            return list(texts)
        tokens = TokenizedTexts.join([part.tokens for part in parts])
        return Ready(texts, None if None in tokenizers else tokenizers[0], tokens)


class Sink(Protocol):
    """Where the results of a call go, slice by slice and batch by batch."""

    def open(self, first: int, count: int) -> None:
        """A slice begins: `count` texts from `first` on."""

    def run(self, members: NDArray[np.int64], batch: PackedBatch, prepared: Prepared) -> None:
        """Compute a batch, on the host, whose sequences are the texts `members` of the slice."""

    def close(self) -> None:
        """The slice has no more batches."""


def size_of(text: Any) -> int:  # noqa: ANN401
    """Characters of a text, or of the texts of a pair."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def tokens_of(pipeline: Pipeline, texts: Sequence[Any], prompt: str) -> TokenizedTexts:
    """The tokens of texts behind a prompt."""
    if isinstance(texts, Ready) and texts.tokenizer in (None, pipeline.tokenizer):
        return texts.tokens
    return pipeline.tokenizer(pipeline.tokenizer.prepend(prompt, texts) if prompt else texts)


def _slices(texts: Sequence[str], device: str) -> Iterator[tuple[int, int]]:
    most_characters, most_texts = _SLICES[device]
    start = characters = 0
    for index, text in enumerate(texts):
        characters += size_of(text)
        if characters >= most_characters or index + 1 - start >= most_texts:
            yield start, index + 1
            start, characters = index + 1, 0
    if start < len(texts):
        yield start, len(texts)


def check_tokens(
    pipeline: Pipeline, tokens: TokenizedTexts, offset: int, prepared: Prepared
) -> None:
    """Refuse texts without tokens if the head needs some, and tokens outside the tables, which
    kernels on a GPU would read all the same.

    Raises:
        InputError, TokenIdError: as :func:`run`; `offset` is the position of the first text.
    """
    if not (pipeline.head.takes_empty or tokens.lengths.all()):
        index = offset + int(np.argmin(tokens.lengths))
        raise InputError(f"inputs[{index}] must have tokens, got none")
    tokenizer = pipeline.tokenizer
    rows = prepared.word.shape[0]
    if tokens.ids.max(initial=0) >= rows:
        indices, where = _owners(tokens, tokens.ids >= rows)
        found = int(tokens.ids[where])
        raise TokenIdError(
            f"inputs[{offset + indices[0]}] holds the token {shown(tokenizer.token(found))}, whose "
            f"id {found} is outside the {rows} rows of the model's embedding table: where tokens "
            "were added to the tokenizer, call model.resize_token_embeddings(len(tokenizer)) on "
            "the base model",
            (indices + offset).tolist(),
        )
    rows = 0 if prepared.token_type is None else prepared.token_type.shape[0]
    if rows and tokens.types is not None and tokens.types.max(initial=0) >= rows:
        indices, where = _owners(tokens, tokens.types >= rows)
        raise TokenIdError(
            f"inputs[{offset + indices[0]}] holds a token of type {tokens.types[where]}, which is "
            f"outside the {rows} rows of the model's table of token types",
            (indices + offset).tolist(),
        )


def _owners(tokens: TokenizedTexts, bad: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """The texts of the tokens that are `bad`, and the first of these tokens."""
    where = np.flatnonzero(bad)
    return np.unique(np.searchsorted(tokens.offsets, where, side="right") - 1), int(where[0])


def _pack(pipeline: Pipeline, tokens: TokenizedTexts, members: NDArray[np.int64]) -> PackedBatch:
    architecture = pipeline.engine.architecture
    return packing.pack(
        tokens.ids,
        tokens.offsets,
        members,
        token_types=tokens.types,
        position_offset=architecture.position_offset,
        uncounted_id=architecture.uncounted_id,
    )


def _plan(
    lengths: NDArray[np.int32], members: NDArray[np.int64], tokens: int
) -> list[NDArray[np.int64]]:
    """The texts `members` cut into batches of at most `tokens` tokens, longest texts first."""
    order, starts = packing.plan_batches(lengths[members], tokens)
    ends = zip(starts[:-1], starts[1:], strict=True)
    return [members[order[start:end]] for start, end in ends]


def _run_slice(
    pipeline: Pipeline,
    tokens: TokenizedTexts,
    offset: int,
    batch_tokens: int,
    counters: Counters,
    sink: Sink,
    progress: Callable[[int], Any],
) -> None:
    """Run the slice that begins with text `offset` of the caller's input."""
    prepared = pipeline.prepared or pipeline.engine.prepared()
    check_tokens(pipeline, tokens, offset, prepared)
    every = np.arange(tokens.lengths.shape[0])
    left = deque(_plan(tokens.lengths, every, pipeline.limit.apply(batch_tokens)))
    while left:
        members = left.popleft()
        batch = _pack(pipeline, tokens, members)
        shortage = None
        try:
            sink.run(members, batch, prepared)
        except torch.OutOfMemoryError as error:
            shortage = str(error)
        if shortage is None:
            counters.add(batches=1)
            progress(len(members))
            continue
        # Behind the except block: the traceback keeps what the batch had allocated.
        counters.add(memory_shortages=1)
        torch.cuda.empty_cache()
        fitting = None if len(members) == 1 else pipeline.limit.halve(batch.num_tokens)
        if fitting is None:
            what = f"inputs[{offset + members[0]}] with its {tokens.lengths[members[0]]} tokens"
            if len(members) > 1:
                what = f"after all halvings a batch of {batch.num_tokens} tokens, {what} in it,"
            where = f"does not fit the memory of {pipeline.engine.device}"
            raise torch.OutOfMemoryError(f"{what} {where}: {shortage}")
        left = deque(_plan(tokens.lengths, np.concatenate([members, *left]), fitting))


def run(
    texts: Sequence[str],
    pipeline: Pipeline,
    request: Request,
    counters: Counters,
    sink: Sink,
    progress: Callable[[int], Any],
) -> None:
    """Drive texts through the engine, slice by slice.

    Args:
        texts: checked texts.
        pipeline: what runs them.
        request: how.
        counters: updated after every batch and slice.
        sink: takes the batches.
        progress: called with the number of texts just finished, or on their way.

    Raises:
        TokenIdError: a token has no row in the embedding table; names the text and the token.
        InputError: a text has no tokens, and the head needs one; names the text.
    """
    for first, last in _slices(texts, pipeline.engine.device.type):
        tokens = tokens_of(pipeline, texts[first:last], request.prompt)
        sink.open(first, last - first)
        offset, most = request.offset + first, request.batch_tokens
        _run_slice(pipeline, tokens, offset, most, counters, sink, progress)
        sink.close()
        counters.add(
            texts=last - first, tokens=int(tokens.ids.shape[0]), truncated=tokens.truncated
        )


def pooling_options(pipeline: Pipeline, request: Request) -> dict[str, Any]:
    """How a call pools: the options of the head."""
    return {
        "normalize": request.normalize,
        "skip": 0 if pipeline.head.include_prompt else request.prompt_tokens,
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
    options = pooling_options(pipeline, request)
    x: Tensor | Unfinished
    if kernels.norm_pool is not None and head.fuses(out.shape[1]):
        x = engine.unfinished(batch, prepared)
    elif (rows_of := head.reads(options["skip"])) is not None and batch.lengths.min() > 0:
        x, batch = engine.single_states(batch, prepared, rows_of(batch)), batch.single_tokens()
    else:
        x = engine(batch, prepared)
    head(x, batch, kernels, out, rows, **options)
