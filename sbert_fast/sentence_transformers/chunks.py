"""Late chunking: embeddings of parts of a document, each read in the light of the whole.

Source: Günther et al., arXiv:2409.04701.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sbert_fast.errors import InputError
from sbert_fast.values import shown

# Of one document: the tokens `[first, last)` of each part, and how many tokens are kept of it.
Ranges = tuple[list[tuple[int, int]], int]


def token_ranges(
    first: Any,  # noqa: ANN401
    prompt: str,
    documents: list[str],
    spans: Any,  # noqa: ANN401
) -> list[Ranges]:
    """The tokens that have a character of each span.

    Args:
        first: the module that has the tokenizer, and tells how many tokens are kept.
        prompt: in front of every document.
        documents: texts.
        spans: of each document a list of `(start, end)`, in characters.

    Raises:
        TypeError, ValueError: a span is not a pair, not within its document, holds no token, or
            some that are not kept; names it.
        InputError: the tokenizer does not tell where its tokens are.
    """
    tokenizer: Any = first.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"encode_chunks needs a tokenizer that gives offsets, got {type(tokenizer).__name__}"
        )
    if not isinstance(spans, Sequence) or len(spans) != len(documents):
        found = len(spans) if isinstance(spans, Sequence) else type(spans).__name__
        raise ValueError(
            f"spans must hold the spans of each of {len(documents)} documents, got {found}"
        )
    cuts = {"truncation": True, "max_length": first.max_seq_length}
    ranges: list[Ranges] = []
    for i, (document, parts) in enumerate(zip(documents, spans, strict=True)):
        whole, kept = (_offsets(tokenizer, prompt + document, how) for how in ({}, cuts))
        own: list[tuple[int, int]] = []
        for j, span in enumerate(parts):
            name = f"spans[{i}][{j}]"
            _check_span(name, span, document)
            bounds = span[0] + len(prompt), span[1] + len(prompt)
            inside, all_inside = _inside(kept, *bounds), _inside(whole, *bounds)
            if len(inside) < len(all_inside):
                raise ValueError(
                    f"{name} has {len(all_inside)} tokens, of which {len(inside)} are among the "
                    f"{len(kept)} that are kept of the document's {len(whole)}"
                )
            if not len(inside):
                raise ValueError(f"{name} holds no token, got {shown(span)}")
            own.append((int(inside[0]), int(inside[-1]) + 1))
        ranges.append((own, len(kept)))
    return ranges


def _offsets(tokenizer: Any, text: str, how: dict[str, Any]) -> NDArray[np.int64]:  # noqa: ANN401
    """The characters of each token, `[L, 2]`; none of special tokens."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False, **how)
    return np.array(encoded["offset_mapping"]).reshape(-1, 2)


def _check_span(name: str, span: Any, document: str) -> None:  # noqa: ANN401
    if not (
        isinstance(span, (tuple, list))
        and len(span) == 2
        and all(isinstance(at, (int, np.integer)) for at in span)
    ):
        raise TypeError(f"{name} must be (start, end), got {shown(span)}")
    if not 0 <= span[0] < span[1] <= len(document):
        raise ValueError(
            f"{name} must lie within the {len(document)} characters of its document, got "
            f"{shown(span)}"
        )


def _inside(offsets: NDArray[np.int64], start: int, end: int) -> NDArray[np.int64]:
    """The tokens that have a character in `[start, end)`."""
    first, last = offsets[:, 0], offsets[:, 1]
    return np.flatnonzero((first < end) & (last > start) & (first < last))


def embed_ranges(
    model: SentenceTransformer,
    modules: list[nn.Module],
    states: list[Tensor],
    ranges: list[Ranges],
    *,
    normalize: bool,
    dimension: int | None,
) -> list[Tensor]:
    """Embeddings fp32 `[P, dimension]` of the parts of each document, by the model's own pooling.

    Args:
        model: what the states are of.
        modules: those behind the one that has computed the states.
        states: `[L, E]` of each document.
        ranges: see :func:`token_ranges`.
        normalize: L2-normalise at the end.
        dimension: components to keep; None is all.
    """
    results = []
    for index, (own, (found, length)) in enumerate(zip(states, ranges, strict=True)):
        if len(own) != length:
            raise InputError(
                f"documents[{index}] has {length} tokens, but its model gives {len(own)} states"
            )
        if not found:
            results.append(torch.empty(0, dimension or model.get_embedding_dimension()))
            continue
        own = own.to(model.dtype)
        order = sorted({*found}, key=_length, reverse=True)
        rows: dict[tuple[int, int], Tensor] = {}
        while order:
            # Padded to the longest of them, they take no more memory than the whole.
            count = max(1, length // _length(order[0]))
            some, order = order[:count], order[count:]
            rows |= zip(some, _pool(modules, own, some), strict=True)
        pooled = torch.stack([rows[each] for each in found])[:, :dimension].float()
        results.append(F.normalize(pooled, dim=1) if normalize else pooled)
    return results


def _length(tokens: tuple[int, int]) -> int:
    return tokens[1] - tokens[0]


def _pool(modules: list[nn.Module], states: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """Embeddings `[P, E]` of ranges of `states` `[L, E]`."""
    parts = [states[first:last] for first, last in ranges]
    kept = [torch.ones(len(part), dtype=torch.long, device=part.device) for part in parts]
    features: dict[str, Any] = {
        "token_embeddings": pad_sequence(parts, batch_first=True),
        "attention_mask": pad_sequence(kept, batch_first=True),
    }
    for module in modules:
        features = module(features)
    pooled: Tensor = features["sentence_embedding"]
    return pooled
