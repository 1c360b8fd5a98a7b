"""Embeddings that are not finite are refused, by the texts that have them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sbert_fast.errors import NonFiniteEmbeddingError


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
        raise_non_finite(bad, dtype)


def _floats(value: object) -> Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _finite(embedding: object) -> Tensor | None:
    """Whether the embeddings of one text are finite, bool `[]`: a tensor, or the dict of
    `output_value=None`. None if they are not floats."""
    if not isinstance(embedding, dict):
        floats = _floats(embedding)
        return None if floats is None else torch.isfinite(floats).all()
    sentence, tokens, mask = (
        embedding.get(name) for name in ("sentence_embedding", "token_embeddings", "attention_mask")
    )
    # Padding is not part of the text: nobody promises anything about its states.
    if isinstance(tokens, Tensor) and isinstance(mask, Tensor) and mask.shape == tokens.shape[:1]:
        tokens = tokens[mask.to(tokens.device) != 0]
    flags = [flag for part in (sentence, tokens) if (flag := _finite(part)) is not None]
    return torch.stack(flags).all() if flags else None


def raise_non_finite(indices: Sequence[int], dtype: torch.dtype | None) -> None:
    """Refuse the embeddings of the texts `indices`, computed in `dtype`."""
    indices = sorted(indices)
    shown = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
    computed = "" if dtype is None else f" computed in {dtype}"
    raise NonFiniteEmbeddingError(
        f"{len(indices)} embeddings hold NaN or infinity, for inputs[{shown}]{computed}; "
        "check the weights, or compute in float32 with dtype='float32'",
        indices,
    )
