"""DistilBERT: no token types, module names of its own, LayerNorm eps 1e-12.

Source: `transformers.models.distilbert`.
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
    table, config, layers = model.embeddings, model.config, model.transformer.layer
    dim = head_dim(config.dim, config.n_heads)
    function = activation(config.activation, [layer.ffn.activation for layer in layers])
    return EncoderWeights(
        Embeddings(
            table.word_embeddings.weight,
            table.position_embeddings.weight,
            None,
            norm(table.LayerNorm),
            dropout=table.dropout,
        ),
        tuple(_layer(layer, config.n_heads, dim, function) for layer in layers),
    )


def _layer(module: Any, heads: int, dim: int, function: Activation) -> Layer:
    attention, ffn = module.attention, module.ffn
    qkv = attention.q_lin, attention.k_lin, attention.v_lin
    return Layer(
        attention=Attention(
            tuple(map(linear, qkv)),
            linear(attention.out_lin),
            *(heads, heads, dim, dim**-0.5),
            dropout=WeightDropout(attention.dropout, attention),
        ),
        attention_norm=norm(module.sa_layer_norm),
        feed_forward=FeedForward((linear(ffn.lin1),), linear(ffn.lin2, ffn.dropout), function),
        feed_forward_norm=norm(module.output_layer_norm),
    )
