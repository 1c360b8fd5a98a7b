"""Laid out like Llama, RMSNorm first: EuroBERT; Qwen3, which is causal; and Gemma 3, which also
norms what each half adds, and scales its embeddings.

Source: `transformers.models.{eurobert,qwen3,gemma3}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.models.activations import activation
from sbert_fast.models.architecture import Architecture, describe
from sbert_fast.models.base import (
    Attention,
    Embeddings,
    EncoderWeights,
    FeedForward,
    Layer,
    Norm,
    Rotary,
    WeightDropout,
    linear,
    rms_norm,
    rotary,
)
from sbert_fast.ops.reference import Activation


def weights(model: Any) -> EncoderWeights:
    config: Any = model.config
    kinds: list[str] = getattr(config, "layer_types", None) or []
    layers = model.layers[: config.num_hidden_layers]
    name = config.hidden_activation if _is_gemma(model) else config.hidden_act
    function = activation(name, [layer.mlp.act_fn for layer in layers], gated=True)
    several = isinstance(model.rotary_emb.rope_type, Mapping)
    positions = {kind: rotary(model.rotary_emb, kind if several else None) for kind in kinds}
    whole = None if several else rotary(model.rotary_emb)
    return EncoderWeights(
        Embeddings(
            model.embed_tokens.weight,
            None,
            None,
            None,
            scale=model.embed_tokens.embed_scale if _is_gemma(model) else None,
        ),
        tuple(
            _layer(layer, config, whole or positions[kinds[depth]], function)
            for depth, layer in enumerate(layers)
        ),
        _norm(model.norm),
    )


def _is_gemma(model: Any) -> bool:
    return hasattr(model.embed_tokens, "embed_scale")


def _norm(module: Any) -> Norm:
    if hasattr(module, "variance_epsilon"):
        return rms_norm(module)
    return Norm(module.weight, None, module.eps, rms=True, shift=1.0)


def _layer(module: Any, config: Any, positions: Rotary, function: Activation) -> Layer:
    mlp, norms = module.mlp, [_norm(module.input_layernorm), _norm(module.post_attention_layernorm)]
    exits: list[Norm | None] = [None, None]
    if hasattr(module, "pre_feedforward_layernorm"):
        exits = [norms[1], _norm(module.post_feedforward_layernorm)]
        norms[1] = _norm(module.pre_feedforward_layernorm)
    return Layer(
        attention=_attention(module.self_attn, config, positions),
        attention_norm=norms[0],
        feed_forward=FeedForward(
            (linear(mlp.gate_proj), linear(mlp.up_proj)),
            linear(mlp.down_proj),
            function,
            gated=True,
        ),
        feed_forward_norm=norms[1],
        norm_first=True,
        attention_exit=exits[0],
        feed_forward_exit=exits[1],
    )


def _attention(module: Any, config: Any, positions: Rotary) -> Attention:
    qkv = module.q_proj, module.k_proj, module.v_proj
    causal, window = module.is_causal, getattr(module, "sliding_window", None)
    if causal and getattr(config, "is_causal", True) is not True:
        raise UnsupportedModelError(f"config.is_causal is {config.is_causal!r}")
    if getattr(module, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"attn_logit_softcapping is {module.attn_logit_softcapping!r}")
    has_norms = hasattr(module, "q_norm")
    return Attention(
        qkv=tuple(map(linear, qkv)),
        output=linear(module.o_proj),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=module.head_dim,
        scale=getattr(config, "query_pre_attn_scalar", module.head_dim) ** -0.5,
        rotary=positions,
        # There it counts the token itself.
        window=None if window is None else window - 1,
        causal=causal,
        query_norm=_norm(module.q_norm) if has_norms else None,
        key_norm=_norm(module.k_norm) if has_norms else None,
        dropout=WeightDropout(module, module, "attention_dropout"),
    )


def architecture(model: Any, weights: EncoderWeights) -> Architecture:
    caches = "past_key_values" in inspect.signature(type(model).forward).parameters
    return describe(model, weights, is_decoder=caches)
