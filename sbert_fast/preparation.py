"""The layers of the packed engine prepared: from what an adapter has read to what runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sbert_fast import ops
from sbert_fast.layers import Exit, PreparedAttention, PreparedFeedForward, PreparedLayer, Stack
from sbert_fast.linears import PreparedNorm, Target, prepare_linear
from sbert_fast.models import base
from sbert_fast.ops.reference import Activation
from sbert_fast.rotary import RotaryTable


def attention_options(attention: base.Attention) -> dict[str, Any]:
    """What attention asks of its kernel, as :func:`ops.bind` takes it."""
    grouped = attention.kv_heads if attention.kv_heads != attention.heads else 0
    tensors = {"rotary": attention.rotary, "query_norm": attention.query_norm}
    return {
        "head_dim": attention.head_dim,
        "options": {"causal": attention.causal, "kv_heads": grouped},
        "needs": tuple(name for name, tensor in tensors.items() if tensor is not None),
    }


def _attention_kernel(attention: base.Attention, target: Target) -> ops.Kernel:
    kernel = target.bind("varlen_attention", **attention_options(attention))
    if attention.query_norm is None or attention.key_norm is None:
        return kernel
    query, key = map(PreparedNorm.of, (attention.query_norm, attention.key_norm))
    norms = {"query_norm": query.weight, "key_norm": key.weight, "norm_eps": query.eps}
    return replace(kernel, options={**kernel.options, **norms})


def embedding_op(embeddings: base.Embeddings) -> tuple[str, dict[str, Any]]:
    """The op of the embeddings, and what they ask of it, as :func:`ops.bind` takes it."""
    tables = {"position_table": embeddings.position, "weight": embeddings.norm}
    return "embed_norm", {
        "width": embeddings.word.shape[1],
        "options": {"rms": embeddings.norm is not None and embeddings.norm.rms},
        "needs": tuple(f"without {name}" for name, table in tables.items() if table is None),
    }


def required_ops(weights: base.EncoderWeights) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ops of all layers, and what they ask of them, as :func:`ops.bind` takes it.

    Linear layers that activate or norm their output themselves run fewer.
    """
    first, last = weights.layers[0], weights.layers[-1]
    if first.norm_first and first.attention_norm is not None:
        yield "add_norm", _norm_options(first, first.attention_norm)
    for layer, following in _followed(weights):
        between, after = _own_norms(layer, following)
        feed_forward, keeps_sum = layer.feed_forward, layer.norm_first and layer is not last
        width = feed_forward.down.weight.shape[1]
        yield "varlen_attention", attention_options(layer.attention)
        yield "add_norm_sum" if layer.norm_first else "add_norm", _norm_options(layer, between)
        yield "gated_activation" if feed_forward.gated else "bias_gelu", {"width": width}
        leaves = layer.feed_forward_exit is not None
        yield "add_norm_sum" if keeps_sum or leaves else "add_norm", _norm_options(layer, after)
        for norm in (layer.attention_exit, layer.feed_forward_exit):
            if norm is not None:
                yield "add_norm", _norm_options(layer, norm)


def _norm_options(layer: base.Layer, norm: base.Norm) -> dict[str, Any]:
    return {"width": layer.attention.output.weight.shape[0], "options": {"rms": norm.rms}}


def _followed(weights: base.EncoderWeights) -> Iterator[tuple[base.Layer, base.Norm | None]]:
    """Every layer, and the first norm of what comes next."""
    following = [layer.attention_norm for layer in weights.layers[1:]] + [weights.final_norm]
    return zip(weights.layers, following, strict=True)


def _own_norms(layer: base.Layer, following: base.Norm | None) -> tuple[base.Norm, base.Norm]:
    """The norms between the halves of a layer and after both; `following` is the next norm."""
    own = layer.attention_norm, layer.feed_forward_norm
    between, after = (layer.feed_forward_norm, following) if layer.norm_first else own
    assert between is not None and after is not None
    return between, after


def prepare_stack(weights: base.EncoderWeights, target: Target) -> Stack:
    """Prepare the layers of a model for `target`."""
    kinds = {id(r.frequencies): r.frequencies for r in _rotary(weights)}
    first = weights.layers[0]
    first_norm = first.attention_norm if first.norm_first else None
    options = {"rms": first_norm is not None and first_norm.rms}
    return Stack(
        layers=tuple(
            _prepare_layer(layer, after, list(kinds), target) for layer, after in _followed(weights)
        ),
        first_norm=None if first_norm is None else PreparedNorm.of(first_norm),
        norm=target.bind("add_norm", width=first.attention.output.weight.shape[0], options=options),
        rotary=tuple(map(RotaryTable, kinds.values())),
    )


def _rotary(weights: base.EncoderWeights) -> list[base.Rotary]:
    return [r for layer in weights.layers if (r := layer.attention.rotary) is not None]


def _prepare_layer(
    layer: base.Layer, following: base.Norm | None, kinds: list[int], target: Target
) -> PreparedLayer:
    between, after = map(PreparedNorm.of, _own_norms(layer, following))
    return PreparedLayer(
        attention=_prepare_attention(layer.attention, kinds, target),
        between=between,
        feed_forward=_prepare_feed_forward(layer.feed_forward, target),
        after=after,
        norm_first=layer.norm_first,
        attention_exit=_prepare_exit(layer, layer.attention_exit, between, target),
        feed_forward_exit=_prepare_exit(layer, layer.feed_forward_exit, after, target),
    )


def _prepare_exit(
    layer: base.Layer, norm: base.Norm | None, following: PreparedNorm, target: Target
) -> Exit | None:
    if norm is None:
        return None
    how = _norm_options(layer, norm) | {"options": {"rms": following.rms}}
    return Exit(PreparedNorm.of(norm), target.bind("add_norm_sum", **how))


def _prepare_attention(
    attention: base.Attention, kinds: list[int], target: Target
) -> PreparedAttention:
    heads, grouped, dim = attention.heads, attention.kv_heads, attention.head_dim
    relative, rotary = attention.relative_bias, attention.rotary
    bias = None
    if relative is not None:
        rows = torch.tensor(relative.buckets, device=relative.table.device)
        bias = relative.table.detach().float()[rows].T.contiguous()
    return PreparedAttention(
        qkv=prepare_linear(attention.qkv, target),
        output=prepare_linear((attention.output,), target),
        kernel=_attention_kernel(attention, target),
        shape=(3, heads, dim) if grouped == heads else (heads + 2 * grouped, dim),
        scale=attention.scale,
        bias=bias,
        window=-1 if attention.window is None else attention.window,
        rotary=None if rotary is None else kinds.index(id(rotary.frequencies)),
    )


def _prepare_feed_forward(feed_forward: base.FeedForward, target: Target) -> PreparedFeedForward:
    gated, gate = feed_forward.gated, None
    if gated:
        gate = target.bind("gated_activation", width=feed_forward.down.weight.shape[1])
    fused = Activation.NONE if gated else feed_forward.activation
    return PreparedFeedForward(
        up=prepare_linear(feed_forward.up, target, fused),
        down=prepare_linear((feed_forward.down,), target),
        gate=gate,
        activation=feed_forward.activation,
        first=feed_forward.first,
    )
