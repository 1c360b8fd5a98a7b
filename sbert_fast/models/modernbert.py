"""ModernBERT: norms first and without bias, a gate, rotary positions, windows in most layers.

Source: `transformers.models.modernbert`; Warner et al., arXiv:2412.13663.
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
    head_dim,
    linear,
    norm,
    rotary,
)
from sbert_fast.ops.reference import Activation

_WINDOWED = "sliding_attention"


def weights(model: Any) -> EncoderWeights:
    table, config = model.embeddings, model.config
    function = activation(config.hidden_activation, [x.mlp.act for x in model.layers], gated=True)
    positions = {kind: rotary(model.rotary_emb, kind) for kind in set(config.layer_types)}
    return EncoderWeights(
        Embeddings(
            table.tok_embeddings.weight,
            None,
            None,
            norm(table.norm, bias=False),
            dropout=table.drop,
        ),
        tuple(_layer(layer, config, positions, function) for layer in model.layers),
        norm(model.final_norm, bias=False),
    )


def _layer(module: Any, config: Any, positions: dict[str, Rotary], function: Activation) -> Layer:
    heads, kind = config.num_attention_heads, module.attention_type
    dim = head_dim(config.hidden_size, heads)
    identity = type(module.attn_norm) is nn.Identity
    attention, mlp = module.attn, module.mlp
    # Without dropout it is an identity.
    dropout = attention.out_drop if isinstance(attention.out_drop, nn.Dropout) else None
    return Layer(
        attention=Attention(
            qkv=(linear(attention.Wqkv),),
            output=linear(attention.Wo, dropout),
            heads=heads,
            kv_heads=heads,
            head_dim=dim,
            scale=dim**-0.5,
            rotary=positions[kind],
            window=config.sliding_window if kind == _WINDOWED else None,
            dropout=WeightDropout(attention, attention, "attention_dropout"),
        ),
        attention_norm=None if identity else norm(module.attn_norm, bias=False),
        feed_forward=FeedForward((linear(mlp.Wi, mlp.drop),), linear(mlp.Wo), function, gated=True),
        feed_forward_norm=norm(module.mlp_norm, bias=False),
        norm_first=True,
    )
