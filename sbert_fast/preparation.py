"""The layers of the packed engine prepared: from what an adapter has read to what runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sbert_fast import ops
from sbert_fast.attention import attention_options, prepare_attention
from sbert_fast.layers import Exit, NormedLinear, PreparedFeedForward, PreparedLayer, Stack
from sbert_fast.linears import prepare_linear
from sbert_fast.models import base
from sbert_fast.norms import PreparedNorm, aligned
from sbert_fast.rotary import RotaryTable
from sbert_fast.target import Target


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
    projection, projected = weights.embeddings.projection, weights.embeddings.projected_norm
    if projection is not None and projected is not None:
        width, options = projection.weight.shape[0], {"rms": projected.rms}
        yield "add_norm", {"width": width, "options": options}
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


def prepare_table(values: Tensor, target: Target, embed: ops.Kernel) -> Tensor:
    """Prepare a table of embeddings for the kernel `embed`."""
    # On a CPU fp32 tables serve every dtype as they are: no copy, no rounding before the sum.
    in_place = target.device.type == "cpu" and values.dtype == torch.float32
    values = values.detach() if in_place else values.detach().to(target.dtype)
    vectors = target.device.type == "cuda" or embed.implementation == "cuda"
    return aligned(values.contiguous()) if vectors else values.contiguous()


def prepare_projection(
    embeddings: base.Embeddings, target: Target
) -> Callable[[Tensor], Tensor] | None:
    """Prepare what widens the embeddings, where something does."""
    if embeddings.projection is None:
        return None
    linear, norm = prepare_linear((embeddings.projection,), target), embeddings.projected_norm
    return linear if norm is None else NormedLinear(linear, PreparedNorm.of(norm))


def prepare_stack(weights: base.EncoderWeights, target: Target) -> Stack:
    """Prepare the layers of a model for `target`."""
    kinds = {id(r.frequencies): r.frequencies for r in _rotary(weights)}
    first = weights.layers[0]
    first_norm = first.attention_norm if first.norm_first else None
    options = {"rms": first_norm is not None and first_norm.rms}
    # Layers that are one are prepared once.
    prepared: dict[tuple[int, int], PreparedLayer] = {}
    order = [(id(x), id(after) if x.norm_first else 0) for x, after in _followed(weights)]
    for key, (layer, after) in zip(order, _followed(weights), strict=True):
        if key not in prepared:
            prepared[key] = _prepare_layer(layer, after, list(kinds), target)
    return Stack(
        layers=tuple(prepared[key] for key in order),
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
        attention=prepare_attention(layer.attention, kinds, target),
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


def _prepare_feed_forward(feed_forward: base.FeedForward, target: Target) -> PreparedFeedForward:
    first = feed_forward.first if feed_forward.gated else None
    return PreparedFeedForward(
        up=prepare_linear(feed_forward.up, target, feed_forward.activation, first),
        down=prepare_linear((feed_forward.down,), target),
    )
