"""BERT, and the families whose modules are laid out like BERT's.

Source: `transformers.models.{bert,roberta,xlm_roberta,camembert,electra}`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sbert_fast.models.activations import activation
from sbert_fast.models.architecture import Architecture, describe
from sbert_fast.models.base import (
    Attention,
    Embeddings,
    EncoderWeights,
    FeedForward,
    Layer,
    WeightDropout,
    head_dim,
    linear,
    norm,
)
from sbert_fast.ops.reference import Activation


def weights(model: Any) -> EncoderWeights:
    table = model.embeddings
    types: Tensor | None = table.token_type_embeddings.weight
    projection = getattr(model, "embeddings_project", None)
    config, layers = model.config, model.encoder.layer
    heads, functions = (
        config.num_attention_heads,
        [x.intermediate.intermediate_act_fn for x in layers],
    )
    dim, function = head_dim(config.hidden_size, heads), activation(config.hidden_act, functions)
    return EncoderWeights(
        Embeddings(
            table.word_embeddings.weight,
            table.position_embeddings.weight,
            types,
            norm(table.LayerNorm),
            None if projection is None else linear(projection),
            dropout=table.dropout,
        ),
        tuple(_layer(layer, heads, dim, function) for layer in layers),
    )


def _layer(module: Any, heads: int, dim: int, function: Activation) -> Layer:
    attention, output = module.attention, module.output
    qkv = attention.self.query, attention.self.key, attention.self.value
    return Layer(
        attention=Attention(
            tuple(map(linear, qkv)),
            linear(attention.output.dense, attention.output.dropout),
            *(heads, heads, dim, dim**-0.5),
            dropout=WeightDropout(attention.self.dropout, attention.self),
        ),
        attention_norm=norm(attention.output.LayerNorm),
        feed_forward=FeedForward(
            (linear(module.intermediate.dense),), linear(output.dense, output.dropout), function
        ),
        feed_forward_norm=norm(output.LayerNorm),
    )


def offset_architecture(model: Any, weights: EncoderWeights) -> Architecture:
    """RoBERTa, XLM-R, CamemBERT, MPNet: positions start after the padding id, uncounted."""
    padding = model.embeddings.padding_idx
    return describe(model, weights, position_offset=padding + 1, uncounted_id=padding)
