"""Whether every tensor of a model has the shape that its description asks for.

The engine views and multiplies by the description; a model itself often goes by its tensors, and
runs with fewer heads or another table.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.models.architecture import Architecture
from sbert_fast.models.base import (
    Attention,
    EncoderWeights,
    FeedForward,
    Linear,
    Norm,
)

# A tensor, or None where there is none; and the shape it must have.
_Shapes = Iterator[tuple[Tensor | None, tuple[int, ...]]]


def check_shapes(model: nn.Module, architecture: Architecture, weights: EncoderWeights) -> None:
    """Refuse tensors of another shape than that described.

    Raises:
        UnsupportedModelError: naming the tensor.
    """
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names[id(tensor)] = name
    for value, expected in _shapes(architecture, weights):
        if value is not None and tuple(value.shape) != expected:
            raise UnsupportedModelError(
                f"{names.get(id(value), 'a tensor')} must be of shape {list(expected)}, got "
                f"{list(value.shape)}"
            )


def _shapes(architecture: Architecture, weights: EncoderWeights) -> _Shapes:
    embeddings, width = weights.embeddings, architecture.hidden_size
    size = width if embeddings.projection is None else architecture.embedding_size
    yield embeddings.word, (architecture.vocab_size, size)
    yield embeddings.position, (architecture.position_offset + architecture.max_tokens, size)
    yield embeddings.token_type, (architecture.type_vocab_size, size)
    yield embeddings.scale, ()
    yield from _norm(embeddings.norm, size)
    if embeddings.projection is not None:
        yield from _linear(embeddings.projection, width, size)
    yield from _norm(embeddings.projected_norm, width)
    for layer in weights.layers:
        yield from _norm(layer.attention_norm, width)
        yield from _attention(layer.attention, width)
        yield from _norm(layer.feed_forward_norm, width)
        yield from _norm(layer.attention_exit, width)
        yield from _norm(layer.feed_forward_exit, width)
        yield from _feed_forward(layer.feed_forward, width)
    yield from _norm(weights.final_norm, width)


def _linear(layer: Linear, outputs: int, inputs: int) -> _Shapes:
    yield layer.weight, (outputs, inputs)
    yield layer.bias, (outputs,)


def _norm(norm: Norm | None, width: int) -> _Shapes:
    if norm is not None:
        yield norm.weight, (width,)
        yield norm.bias, (width,)


def _attention(attention: Attention, width: int) -> _Shapes:
    dim = attention.head_dim
    columns = [attention.heads * dim, attention.kv_heads * dim, attention.kv_heads * dim]
    if len(attention.qkv) == 1:
        columns = [sum(columns)]
    for part, outputs in zip(attention.qkv, columns, strict=True):
        yield from _linear(part, outputs, width)
    yield from _linear(attention.output, width, attention.heads * dim)
    yield from _norm(attention.query_norm, dim)
    yield from _norm(attention.key_norm, dim)
    if attention.rotary is not None:
        yield attention.rotary.frequencies, (dim // 2,)
    if attention.relative_bias is not None:
        rows = max(attention.relative_bias.buckets) + 1
        yield attention.relative_bias.table, (rows, attention.heads)
    if (distances := attention.disentangled) is not None:
        # There may be more rows than distances lead to.
        rows = max(max(distances.buckets) + 1, distances.table.shape[0])
        yield distances.table, (rows, width)
        yield from _norm(distances.norm, width)
        for projected in (distances.keys, distances.queries):
            if projected is not None:
                yield from _linear(projected, attention.heads * dim, width)


def _feed_forward(feed_forward: FeedForward, width: int) -> _Shapes:
    # Layers may differ in this size.
    inner = feed_forward.down.weight.shape[-1]
    columns = [inner] * (2 if feed_forward.gated else 1)
    if len(feed_forward.up) == 1:
        columns = [sum(columns)]
    for part, outputs in zip(feed_forward.up, columns, strict=True):
        yield from _linear(part, outputs, width)
    yield from _linear(feed_forward.down, width, inner)
