"""Sizes and conventions of a model, read from its config and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.models.base import EncoderWeights


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes and conventions of a model.

    Attributes:
        family: name of the family, as in `config.model_type`.
        hidden_size, num_heads, head_dim, num_layers, intermediate_size, vocab_size: as usual.
        embedding_size: columns of the embedding tables, which a projection may widen.
        position_offset: position of the first token.
        uncounted_id: token id that does not advance positions, or None.
        max_tokens: tokens there are positions for.
        type_vocab_size: token types, 0 where the family has none.
        gated: the feed-forward has a gate, and twice `intermediate_size` columns before it.
        is_decoder: its forward returns a cache if asked to, and takes positions that begin anew for
            texts in a row.
    """

    family: str
    embedding_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    num_layers: int
    intermediate_size: int
    vocab_size: int
    position_offset: int
    uncounted_id: int | None
    max_tokens: int
    type_vocab_size: int
    gated: bool = False
    is_decoder: bool = False

    @property
    def up_size(self) -> int:
        """Columns of what the feed-forward activates."""
        return self.intermediate_size * (2 if self.gated else 1)


def describe(
    model: Any,  # noqa: ANN401
    weights: EncoderWeights,
    *,
    position_offset: int = 0,
    uncounted_id: int | None = None,
    is_decoder: bool = False,
) -> Architecture:
    """The architecture of a base model whose `weights` an adapter has read."""
    if not weights.layers:
        raise UnsupportedModelError("the number of layers must be at least 1, got 0")
    config, embeddings, layer = model.config, weights.embeddings, weights.layers[0]
    table, types = embeddings.position, embeddings.token_type
    positions = config.max_position_embeddings if table is None else table.shape[0]
    return Architecture(
        family=config.model_type,
        hidden_size=config.hidden_size,
        num_heads=layer.attention.heads,
        head_dim=layer.attention.head_dim,
        num_layers=len(weights.layers),
        intermediate_size=layer.feed_forward.down.weight.shape[-1],
        vocab_size=embeddings.word.shape[0],
        embedding_size=embeddings.word.shape[1],
        position_offset=position_offset,
        uncounted_id=uncounted_id,
        max_tokens=positions - position_offset,
        type_vocab_size=0 if types is None else types.shape[0],
        gated=layer.feed_forward.gated,
        is_decoder=is_decoder,
    )
