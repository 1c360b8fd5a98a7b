"""A few short texts on a CPU: one batch, without slices, plans or copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbert_fast.finite import raise_non_finite
from sbert_fast.inference import Pipeline, Request, check_tokens, embed_batch, size_of, tokens_of
from sbert_fast.packing import pack_all
from sbert_fast.stats import Counters

# Beyond these, what is saved is small beside the time of the forward pass.
_MOST_TEXTS, _MOST_CHARACTERS = 8, 4000


def embed_few(
    texts: Sequence[Any], pipeline: Pipeline, request: Request, counters: Counters
) -> Tensor | None:
    """One embedding a text, as :func:`sbert_fast.results.sentence_embeddings` makes them.

    Returns:
        fp32 `[N, dimension]` on the CPU; None where these are not few texts on the C++ ops,
        more than a batch holds, or more than fits.

    Raises:
        NonFiniteEmbeddingError, TokenIdError, InputError: as there.
    """
    prepared = pipeline.prepared
    if (
        prepared is None
        or prepared.embed.implementation != "cpu"
        or not 0 < len(texts) <= _MOST_TEXTS
        or sum(map(size_of, texts)) > _MOST_CHARACTERS
    ):
        return None
    tokens = tokens_of(pipeline, texts, request.prompt)
    count, total = len(texts), tokens.ids.shape[0]
    if count > 1 and total > request.batch_tokens:
        return None
    check_tokens(pipeline, tokens, request.offset, prepared)
    batch = pack_all(
        tokens.ids,
        tokens.offsets,
        tokens.lengths,
        token_types=tokens.types,
        position_offset=prepared.architecture.position_offset,
        uncounted_id=prepared.architecture.uncounted_id,
        row_alignment=prepared.row_alignment,
    )
    # Whatever the default device is.
    out = torch.empty((count, request.dimension), dtype=torch.float32, device="cpu")
    rows = torch.arange(count, dtype=torch.int32, device="cpu")
    try:
        embed_batch(pipeline, request, batch, prepared, out, rows)
    except torch.OutOfMemoryError:
        return None
    counters.add(texts=count, tokens=total, batches=1, truncated=tokens.truncated)
    if request.checks and not (finite := np.isfinite(out.numpy())).all():
        bad = np.flatnonzero(~finite.all(axis=1)) + request.offset
        raise_non_finite(bad.tolist(), pipeline.engine.compute_dtype)
    return out
