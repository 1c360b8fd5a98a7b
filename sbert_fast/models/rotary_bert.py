"""Laid out like BERT, with rotary positions in place of a table: NomicBERT, GTE, jina-v3.

Source: `transformers.models.{nomic_bert,gte,jina_embeddings_v3}`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sbert_fast.models.activations import activation
from sbert_fast.models.base import (
    Attention,
    Embeddings,
    EncoderWeights,
    FeedForward,
    Layer,
    Rotary,
    WeightDropout,
    linear,
    norm,
    rotary,
)
from sbert_fast.ops.reference import Activation


def weights(model: Any) -> EncoderWeights:
    table, types = model.embeddings, model.embeddings.token_type_embeddings
    positions = rotary(model.rotary_emb)
    layers = model.layers[: model.config.num_hidden_layers]
    modules = [_activation(layer.mlp) for layer in layers]
    function = activation(model.config.hidden_act, modules, gated=_is_gated(model))
    return EncoderWeights(
        Embeddings(
            table.word_embeddings.weight,
            None,
            None if types is None else types.weight,
            norm(table.LayerNorm),
            dropout=table.dropout,
        ),
        tuple(_layer(layer, model.config, positions, function) for layer in layers),
    )


def _is_gated(model: Any) -> bool:
    return hasattr(model.layers[0].mlp, "gate_proj")


def _activation(mlp: Any) -> nn.Module:
    module: nn.Module = mlp.act_fn if hasattr(mlp, "gate_proj") else mlp.activation_fn
    return module


def _layer(module: Any, config: Any, positions: Rotary, function: Activation) -> Layer:
    attention, heads = module.self_attn, config.num_attention_heads
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    return Layer(
        attention=Attention(
            qkv=tuple(map(linear, qkv)),
            output=linear(attention.o_proj, module.post_attention_dropout),
            heads=heads,
            kv_heads=heads,
            head_dim=attention.head_dim,
            scale=attention.head_dim**-0.5,
            rotary=positions,
            dropout=WeightDropout(attention, attention, "attention_dropout"),
        ),
        attention_norm=norm(module.post_attention_layernorm),
        feed_forward=_feed_forward(module, function),
        feed_forward_norm=norm(module.post_mlp_layernorm),
    )


def _feed_forward(module: Any, function: Activation) -> FeedForward:
    mlp, last = module.mlp, module.post_mlp_dropout
    if hasattr(mlp, "gate_proj"):
        # GTE's has one of its own.
        up = linear(mlp.gate_proj, getattr(mlp, "dropout", None)), linear(mlp.up_proj)
        return FeedForward(up, linear(mlp.down_proj, last), function, gated=True)
    return FeedForward((linear(mlp.fc1),), linear(mlp.fc2, last), function)
