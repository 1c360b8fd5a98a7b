"""ALBERT: narrow embeddings, and layers that share their parameters.

Source: `transformers.models.albert`.
"""

from __future__ import annotations

from typing import Any

from sbert_fast.models.activations import activation
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
    table, encoder, config = model.embeddings, model.encoder, model.config
    groups = [group.albert_layers for group in encoder.albert_layer_groups]
    heads = config.num_attention_heads
    dim = head_dim(config.hidden_size, heads)
    function = activation(config.hidden_act, [x.activation for group in groups for x in group])
    # One description, and so one set of prepared weights, for all layers that share their own.
    layers = [tuple(_layer(x, heads, dim, function) for x in group) for group in groups]
    count = config.num_hidden_layers
    order = [layers[int(i / (count / config.num_hidden_groups))] for i in range(count)]
    return EncoderWeights(
        Embeddings(
            table.word_embeddings.weight,
            table.position_embeddings.weight,
            table.token_type_embeddings.weight,
            norm(table.LayerNorm),
            linear(encoder.embedding_hidden_mapping_in),
            dropout=table.dropout,
        ),
        tuple(layer for group in order for layer in group),
        uncalled=tuple(layer.dropout for group in groups for layer in group),
    )


def _layer(module: Any, heads: int, dim: int, function: Activation) -> Layer:
    attention = module.attention
    qkv = attention.query, attention.key, attention.value
    return Layer(
        attention=Attention(
            tuple(map(linear, qkv)),
            linear(attention.dense, attention.output_dropout),
            *(heads, heads, dim, dim**-0.5),
            dropout=WeightDropout(attention.attention_dropout, attention),
        ),
        attention_norm=norm(attention.LayerNorm),
        feed_forward=FeedForward((linear(module.ffn),), linear(module.ffn_output), function),
        feed_forward_norm=norm(module.full_layer_layer_norm),
    )
