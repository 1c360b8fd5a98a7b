"""BERT, and the families whose modules are laid out like BERT's.

Source: `transformers.models.{bert,roberta,xlm_roberta,camembert,electra}`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sbert_fast.models.activations import activation
from sbert_fast.models.base import (
    Architecture,
    Attention,
    Embeddings,
    EncoderWeights,
    FeedForward,
    Layer,
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
        ),
        tuple(_layer(layer, heads, dim, function) for layer in layers),
    )


def _layer(module: Any, heads: int, dim: int, function: Activation) -> Layer:
    attention, output = module.attention, module.output
    qkv = attention.self.query, attention.self.key, attention.self.value
    return Layer(
        attention=Attention(
            tuple(map(linear, qkv)), linear(attention.output.dense), heads, heads, dim, dim**-0.5
        ),
        attention_norm=norm(attention.output.LayerNorm),
        feed_forward=FeedForward(
            (linear(module.intermediate.dense),), linear(output.dense), function
        ),
        feed_forward_norm=norm(output.LayerNorm),
    )


def _describe(model: Any, first_position: int, uncounted_id: int | None) -> Architecture:
    config = model.config
    positions = model.embeddings.position_embeddings.weight.shape[0]
    types = getattr(model.embeddings, "token_type_embeddings", None)
    return Architecture(
        family=config.model_type,
        embedding_size=model.embeddings.word_embeddings.weight.shape[1],
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_dim=head_dim(config.hidden_size, config.num_attention_heads),
        num_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        vocab_size=model.embeddings.word_embeddings.weight.shape[0],
        position_offset=first_position,
        uncounted_id=uncounted_id,
        max_tokens=positions - first_position,
        type_vocab_size=0 if types is None else types.weight.shape[0],
    )


def architecture(model: Any) -> Architecture:
    """BERT and ELECTRA: positions start at 0."""
    return _describe(model, 0, None)


def offset_architecture(model: Any) -> Architecture:
    """RoBERTa, XLM-R, CamemBERT, MPNet: positions start after the padding id, uncounted."""
    padding = model.embeddings.padding_idx
    return _describe(model, padding + 1, padding)
