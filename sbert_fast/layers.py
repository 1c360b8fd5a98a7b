"""The layers of the packed engine, which run what :mod:`sbert_fast.preparation` makes.

A layer is attention and a feed-forward. Each is added to the residual, and a norm follows. With
post-norm that norm is the layer's own, and its result is the new residual; with pre-norm it belongs
to what comes next, and the new residual is the sum itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sbert_fast import ops
from sbert_fast.attention import PreparedAttention, Turns
from sbert_fast.linears import PreparedLinear
from sbert_fast.norms import PreparedNorm
from sbert_fast.packing import PackedBatch
from sbert_fast.rotary import RotaryTable


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
class PreparedFeedForward:
    """`up` activates its output itself, and gates it; `down` projects what comes of that."""

    up: PreparedLinear
    down: PreparedLinear


@dataclass(frozen=True, slots=True)
class NormedLinear:
    """A linear layer, and the norm of its output."""

    linear: PreparedLinear
    norm: PreparedNorm

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear.normed(x, self.norm)


@dataclass(frozen=True, slots=True)
class Exit:
    """The norm of what half a layer adds to the residual, and the kernel that joins the two."""

    norm: PreparedNorm
    join: ops.Kernel


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """A layer, and the norms behind its halves: `between` them, and `after` both."""

    attention: PreparedAttention
    between: PreparedNorm
    feed_forward: PreparedFeedForward
    after: PreparedNorm
    norm_first: bool
    attention_exit: Exit | None
    feed_forward_exit: Exit | None


@dataclass(frozen=True, slots=True)
class Stack:
    """All layers of a model.

    Attributes:
        first_norm: before the first layer, or None.
        norm: the kernel for it, or None.
        rotary: one for every kind of rotary positions.
        checkpointed: numbers of the layers that a backward pass computes again, from 0.
    """

    layers: tuple[PreparedLayer, ...]
    first_norm: PreparedNorm | None
    norm: ops.Kernel | None
    rotary: tuple[RotaryTable, ...]
    checkpointed: frozenset[int] = frozenset()

    def states(self, x: Tensor, batch: PackedBatch, kept: Tensor | None = None) -> Iterator[Tensor]:
        """The embeddings `x` `[T, E]`, and what every layer makes of them, the last one normed.

        Of the last layer, only the rows `kept` (int64) are computed; None is all of them.
        """
        yield x
        residual, turns = x, self._turns(batch)
        x = self._enter(x)
        for number, layer in enumerate(self.layers):
            is_last = number == len(self.layers) - 1
            keeps_sum = layer.norm_first and not is_last
            run = partial(_run, layer, batch, turns, keeps_sum, kept if is_last else None)
            if number in self.checkpointed:
                residual, x = checkpoint(run, residual, x, use_reentrant=False)
            else:
                residual, x = run(residual, x)
            yield residual

    def unfinished(self, x: Tensor, batch: PackedBatch) -> Unfinished:
        """The last of the states, before its norm."""
        residual, turns, last = x, self._turns(batch), self.layers[-1]
        x = self._enter(x)
        for number, layer in enumerate(self.layers, 1):
            residual, x = _attend(layer, residual, x, batch, turns)
            down, inner = layer.feed_forward.down, layer.feed_forward.up(x)
            if number < len(self.layers):
                how = layer.after, layer.norm_first, layer.feed_forward_exit
                residual, x = _join(down, inner, residual, *how)
        if last.feed_forward_exit is not None:
            y = down.normed(inner, last.feed_forward_exit.norm)
            return Unfinished(y, None, residual, last.after)
        return Unfinished(*down.without_bias(inner), residual, last.after)

    def _enter(self, x: Tensor) -> Tensor:
        """What the first layer reads of the embeddings."""
        norm = self.first_norm
        if norm is None or self.norm is None:
            return x
        normed: Tensor = self.norm(x, None, None, norm.weight, norm.bias, norm.eps)
        return normed

    def _turns(self, batch: PackedBatch) -> Turns:
        rows = batch.position_ids
        tables = (table.first(batch.num_positions) for table in self.rotary)
        return tuple((cos[rows], sin[rows]) for cos, sin in tables)


def _run(
    layer: PreparedLayer,
    batch: PackedBatch,
    turns: Turns,
    keeps_sum: bool,
    kept: Tensor | None,
    residual: Tensor,
    x: Tensor,
) -> tuple[Tensor, Tensor]:
    """A layer: the residual, and what the next one reads; of the rows `kept` alone if they are
    given."""
    residual, x = _attend(layer, residual, x, batch, turns, kept)
    down, inner = layer.feed_forward.down, layer.feed_forward.up(x)
    return _join(down, inner, residual, layer.after, keeps_sum, layer.feed_forward_exit)


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
    how = layer.between, layer.norm_first, layer.attention_exit
    return _join(layer.attention.output, attended, residual, *how)


def _join(
    linear: PreparedLinear,
    x: Tensor,
    residual: Tensor,
    norm: PreparedNorm,
    keeps_sum: bool,
    leaves: Exit | None,
) -> tuple[Tensor, Tensor]:
    """The new residual, and the norm of the output of `linear` plus the old one."""
    if leaves is not None:
        y = linear.normed(x, leaves.norm)
        normed, total = leaves.join(y, None, residual, norm.weight, norm.bias, norm.eps)
        return total if keeps_sum else normed, normed
    if keeps_sum:
        normed, total = linear.add_norm_sum(x, residual, norm)
        return total, normed
    normed = linear.add_norm(x, residual, norm)
    return normed, normed
