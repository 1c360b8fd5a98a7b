"""MPNet: laid out like BERT, no token types, a relative bias that all layers share.

Source: `transformers.models.mpnet`.
"""

from __future__ import annotations

from typing import Any

import torch

from sbert_fast.models.activations import activation
from sbert_fast.models.base import (
    Attention,
    Embeddings,
    EncoderWeights,
    FeedForward,
    Layer,
    RelativeBias,
    WeightDropout,
    head_dim,
    linear,
    norm,
)
from sbert_fast.ops.reference import Activation

# Tokens further apart than this have the bias of those that are this far apart.
_REACH = 128


def weights(model: Any) -> EncoderWeights:
    table, config, encoder = model.embeddings, model.config, model.encoder
    heads, layers = config.num_attention_heads, encoder.layer
    dim = head_dim(config.hidden_size, heads)
    functions = [layer.intermediate.intermediate_act_fn for layer in layers]
    function, bias = activation(config.hidden_act, functions), _relative_bias(encoder)
    return EncoderWeights(
        Embeddings(
            table.word_embeddings.weight,
            table.position_embeddings.weight,
            None,
            norm(table.LayerNorm),
            dropout=table.dropout,
        ),
        tuple(_layer(layer, heads, dim, function, bias) for layer in layers),
    )


def _relative_bias(encoder: Any) -> RelativeBias:
    distances = torch.arange(-_REACH, _REACH + 1)
    buckets = type(encoder).relative_position_bucket(distances)
    return RelativeBias(encoder.relative_attention_bias.weight, tuple(buckets.tolist()))


def _layer(module: Any, heads: int, dim: int, function: Activation, bias: RelativeBias) -> Layer:
    attention, output = module.attention.attn, module.output
    qkv = attention.q, attention.k, attention.v
    return Layer(
        attention=Attention(
            tuple(map(linear, qkv)),
            linear(attention.o, module.attention.dropout),
            *(heads, heads, dim, dim**-0.5, bias),
            dropout=WeightDropout(attention.dropout, attention.dropout),
        ),
        attention_norm=norm(module.attention.LayerNorm),
        feed_forward=FeedForward(
            (linear(module.intermediate.dense),), linear(output.dense, output.dropout), function
        ),
        feed_forward_norm=norm(output.LayerNorm),
    )
