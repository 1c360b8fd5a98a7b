"""BERT, and the families whose modules are laid out like BERT's.

Source: `transformers.models.{bert,roberta,xlm_roberta,camembert,electra}`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

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
    types: Tensor | None = table.token_type_embeddings.weight
    projection = getattr(model, "embeddings_project", None)
    return EncoderWeights(
        Embeddings(
            table.word_embeddings.weight,
            table.position_embeddings.weight,
            types,
            norm(table.LayerNorm),
            None if projection is None else linear(projection),
        ),
        tuple(_layer(layer) for layer in model.encoder.layer),
    )


def _layer(module: Any) -> Layer:
    attention, output = module.attention, module.output
    return Layer(
        query=linear(attention.self.query),
        key=linear(attention.self.key),
        value=linear(attention.self.value),
        attention_output=linear(attention.output.dense),
        attention_norm=norm(attention.output.LayerNorm),
        up=linear(module.intermediate.dense),
        down=linear(output.dense),
        output_norm=norm(output.LayerNorm),
    )


def _describe(model: Any, first_position: int, uncounted_id: int | None) -> Architecture:
    config = model.config
    positions = model.embeddings.position_embeddings.num_embeddings
    return Architecture(
        family=config.model_type,
        embedding_size=model.embeddings.word_embeddings.embedding_dim,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        vocab_size=model.embeddings.word_embeddings.num_embeddings,
        tanh_gelu=is_tanh_gelu(
            config.hidden_act,
            (layer.intermediate.intermediate_act_fn for layer in model.encoder.layer),
        ),
        position_offset=first_position,
        uncounted_id=uncounted_id,
        max_tokens=positions - first_position,
        type_vocab_size=model.embeddings.token_type_embeddings.num_embeddings,
    )


def architecture(model: Any) -> Architecture:
    """BERT and ELECTRA: positions start at 0."""
    return _describe(model, 0, None)


def offset_architecture(model: Any) -> Architecture:
    """RoBERTa, XLM-R, CamemBERT: positions start after the padding id, which they do not count."""
    padding = model.embeddings.padding_idx
    return _describe(model, padding + 1, padding)
