"""The layers of the packed engine: prepared from what an adapter has read, and run.

A layer is attention and a feed-forward. Each is added to the residual, and a norm follows. With
post-norm that norm is the layer's own, and its result is the new residual; with pre-norm it belongs
to what comes next, and the new residual is the sum itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbert_fast import ops
from sbert_fast.linears import PreparedLinear, PreparedNorm, Target, prepare_linear
from sbert_fast.models import base
from sbert_fast.ops.reference import Activation
from sbert_fast.packing import PackedBatch
from sbert_fast.rotary import RotaryTable

# Cosines and sines fp32 `[T, D / 2]` of every kind of rotary positions of a model.
Turns = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The last hidden states before the last norm: `norm(y + bias + residual)`.

    Attributes:
        y, residual: `[T, E]`.
        bias: fp32 `[E]`, or None.
    """

    y: Tensor
    bias: Tensor | None
    residual: Tensor
    norm: PreparedNorm


@dataclass(frozen=True, slots=True)
class PoolKernels:
    """What pools hidden states; and, where that is one kernel, what normalises and pools them."""

    pool: ops.Kernel
    norm_pool: ops.Kernel | None


@dataclass(frozen=True, slots=True)
class PreparedAttention:
    """Attention, its projections, and the kernel for it.

    Attributes:
        shape: of a token in `qkv`.
        bias: fp32 `[H, 2R + 1]`, or None.
        window: in tokens; -1 is none.
        rotary: which of the rotary positions of the model, or None.
    """

    qkv: PreparedLinear
    output: PreparedLinear
    kernel: ops.Kernel
    shape: tuple[int, ...]
    scale: float
    bias: Tensor | None
    window: int
    rotary: int | None

    def __call__(self, x: Tensor, batch: PackedBatch, turns: Turns) -> Tensor:
        """What the heads attend to, `[T, H * D]`."""
        cos, sin = (None, None) if self.rotary is None else turns[self.rotary]
        attended: Tensor = self.kernel(
            self.qkv(x).view(x.shape[0], *self.shape),
            batch.cu_seqlens,
            batch.max_seqlen,
            self.scale,
            self.bias,
            self.window,
            cos,
            sin,
            batch.tiles,
        )
        return attended.view(x.shape[0], -1)


@dataclass(frozen=True, slots=True)
class PreparedFeedForward:
    """`gate` is None where `up` activates its output itself."""

    up: PreparedLinear
    down: PreparedLinear
    gate: ops.Kernel | None
    activation: Activation
    first: bool

    def __call__(self, x: Tensor) -> Tensor:
        """What `down` is to project, `[T, F]`."""
        if self.gate is None:
            return self.up(x)
        activated: Tensor = self.gate(*self.up.without_bias(x), self.activation.value, self.first)
        return activated


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """A layer, and the norms behind its halves: `between` them, and `after` both."""

    attention: PreparedAttention
    between: PreparedNorm
    feed_forward: PreparedFeedForward
    after: PreparedNorm
    norm_first: bool


@dataclass(frozen=True, slots=True)
class Stack:
    """All layers of a model.

    Attributes:
        first_norm: before the first layer, or None.
        norm: the kernel for it.
        rotary: one for every kind of rotary positions.
    """

    layers: tuple[PreparedLayer, ...]
    first_norm: PreparedNorm | None
    norm: ops.Kernel
    rotary: tuple[RotaryTable, ...]

    def states(self, x: Tensor, batch: PackedBatch, kept: Tensor | None = None) -> Iterator[Tensor]:
        """The embeddings `x` `[T, E]`, and what every layer makes of them, the last one normed.

        Of the last layer, only the rows `kept` (int64) are computed; None is all of them.
        """
        yield x
        residual, turns, last = x, self._turns(batch), self.layers[-1]
        x = self._enter(x)
        for layer in self.layers:
            rows = kept if layer is last else None
            residual, x = _attend(layer, residual, x, batch, turns, rows)
            keeps_sum = layer.norm_first and layer is not last
            down, inner = layer.feed_forward.down, layer.feed_forward(x)
            residual, x = _join(down, inner, residual, layer.after, keeps_sum)
            yield residual

    def unfinished(self, x: Tensor, batch: PackedBatch) -> Unfinished:
        """The last of the states, before its norm."""
        residual, turns, last = x, self._turns(batch), self.layers[-1]
        x = self._enter(x)
        for layer in self.layers:
            residual, x = _attend(layer, residual, x, batch, turns)
            feed_forward, inner = layer.feed_forward, layer.feed_forward(x)
            if layer is not last:
                how = layer.after, layer.norm_first
                residual, x = _join(feed_forward.down, inner, residual, *how)
        return Unfinished(*feed_forward.down.without_bias(inner), residual, last.after)

    def _enter(self, x: Tensor) -> Tensor:
        """What the first layer reads of the embeddings."""
        norm = self.first_norm
        if norm is None:
            return x
        normed: Tensor = self.norm(x, None, None, norm.weight, norm.bias, norm.eps)
        return normed

    def _turns(self, batch: PackedBatch) -> Turns:
        rows = batch.position_ids
        tables = (table.first(batch.num_positions) for table in self.rotary)
        return tuple((cos[rows], sin[rows]) for cos, sin in tables)


def _attend(
    layer: PreparedLayer,
    residual: Tensor,
    x: Tensor,
    batch: PackedBatch,
    turns: Turns,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of a layer: the residual, and what the second half reads; of the rows `kept`
    alone if they are given."""
    attended = layer.attention(x, batch, turns)
    if kept is not None:
        attended, residual = attended[kept], residual[kept]
    return _join(layer.attention.output, attended, residual, layer.between, layer.norm_first)


def _join(
    linear: PreparedLinear, x: Tensor, residual: Tensor, norm: PreparedNorm, keeps_sum: bool
) -> tuple[Tensor, Tensor]:
    """The new residual, and the norm of the output of `linear` plus the old one."""
    if keeps_sum:
        normed, total = linear.add_norm_sum(x, residual, norm)
        return total, normed
    normed = linear.add_norm(x, residual, norm)
    return normed, normed


def attention_options(attention: base.Attention) -> dict[str, Any]:
    """What attention asks of its kernel, as :func:`ops.bind` takes it."""
    grouped = attention.kv_heads if attention.kv_heads != attention.heads else 0
    return {
        "head_dim": attention.head_dim,
        "options": {"causal": attention.causal, "kv_heads": grouped},
        "needs": () if attention.rotary is None else ("rotary",),
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
        yield "add_norm_sum" if keeps_sum else "add_norm", _norm_options(layer, after)


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
    )


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
        kernel=target.bind("varlen_attention", **attention_options(attention)),
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
