"""DistilBERT: no token types, module names of its own, LayerNorm eps 1e-12.

Source: `transformers.models.distilbert`.
"""

from __future__ import annotations

from typing import Any

from sbert_fast.models.base import (
    Architecture,
    Embeddings,
    EncoderWeights,
    Layer,
    is_tanh_gelu,
    linear,
    norm,
)


def weights(model: Any) -> EncoderWeights:
    table = model.embeddings
    return EncoderWeights(
        Embeddings(
            table.word_embeddings.weight,
            table.position_embeddings.weight,
            None,
            norm(table.LayerNorm),
        ),
        tuple(_layer(layer) for layer in model.transformer.layer),
    )


def _layer(module: Any) -> Layer:
    attention, ffn = module.attention, module.ffn
    return Layer(
        query=linear(attention.q_lin),
        key=linear(attention.k_lin),
        value=linear(attention.v_lin),
        attention_output=linear(attention.out_lin),
        attention_norm=norm(module.sa_layer_norm),
        up=linear(ffn.lin1),
        down=linear(ffn.lin2),
        output_norm=norm(module.output_layer_norm),
    )


def architecture(model: Any) -> Architecture:
    config = model.config
    return Architecture(
        family=config.model_type,
        embedding_size=model.embeddings.word_embeddings.embedding_dim,
        hidden_size=config.dim,
        num_heads=config.n_heads,
        num_layers=config.n_layers,
        intermediate_size=config.hidden_dim,
        vocab_size=model.embeddings.word_embeddings.num_embeddings,
        tanh_gelu=is_tanh_gelu(
            config.activation, (layer.ffn.activation for layer in model.transformer.layer)
        ),
        position_offset=0,
        uncounted_id=None,
        max_tokens=model.embeddings.position_embeddings.num_embeddings,
        type_vocab_size=0,
    )
