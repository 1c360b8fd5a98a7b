"""What the packed engine needs to know of a model: its sizes, and what each layer is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.ops.reference import Activation

# Kinds of rotary positions whose frequencies no call changes.
_ROTARY = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class Linear:
    """`y = x @ weight.T + bias`, weight `[N, K]`, bias `[N]` or None, of the model's `module`.

    In training, `dropout` follows, behind the activation where there is one; None is none.
    """

    weight: Tensor
    bias: Tensor | None
    module: nn.Module | None = None
    dropout: nn.Dropout | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm over the last dimension, or RMSNorm where `rms` says so.

    Attributes:
        weight, bias, eps: as usual.
        shift: what is added to the weight.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool = False
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """What is added to a logit of head h: `table[buckets[clamp(j - i, -R, R) + R], h]`.

    Attributes:
        table: `[N, H]`.
        buckets: 2R + 1 rows of the table.
    """

    table: Tensor
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions: at position p, pair j of the halves turns by `p * frequencies[j]`.

    Attributes:
        frequencies: `[D / 2]`, in radians a token.
    """

    frequencies: Tensor


@dataclass(frozen=True, slots=True)
class Disentangled:
    """What distances add to the product of query i and key j before it is scaled (DeBERTa):
    `q_i · keys(t) + queries(t) · k_j`, t being the row `buckets[clamp(j - i, -R, R) + R]` of the
    table, normed.

    Attributes:
        table: `[P, E]`.
        norm: of the rows of the table; None is the identity.
        keys, queries: projections of the rows, to all heads; the term of one that is None is left
            out, and one is there.
        buckets: 2R + 1 rows of the table.
    """

    table: Tensor
    norm: Norm | None
    keys: Linear | None
    queries: Linear | None
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightDropout:
    """Dropout of attention weights: at the rate that `holder` has under a `name`, in the mode of
    its `owner`."""

    holder: nn.Module
    owner: nn.Module
    name: str = "p"

    @property
    def rate(self) -> float:
        """The share of weights that is dropped now."""
        return getattr(self.holder, self.name) if self.owner.training else 0.0


@dataclass(frozen=True, slots=True)
class Attention:
    """Self-attention.

    Attributes:
        qkv: query, key and value; or one layer that produces all three, concatenated in this order.
        output: the projection of what the heads have attended to.
        heads, kv_heads, head_dim: as usual; consecutive query heads share a head of keys.
        scale: factor of the logits.
        relative_bias, rotary, disentangled: None where there is none.
        window: how many tokens a token sees on each side; None is all of them.
        causal: a token sees none to the right.
        query_norm, key_norm: RMSNorm of every head, before its rotary positions; both or neither.
        dropout: of the weights, in training; None where there is none.
    """

    qkv: tuple[Linear, ...]
    output: Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    relative_bias: RelativeBias | None = None
    rotary: Rotary | None = None
    window: int | None = None
    causal: bool = False
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    disentangled: Disentangled | None = None
    dropout: WeightDropout | None = None


@dataclass(frozen=True, slots=True)
class FeedForward:
    """`down(f(up(x)))`, or `down(f(a) * b)`, `a` and `b` being the halves of `up(x)`.

    Attributes:
        up: one layer, or the two halves.
        down: back to the hidden size.
        activation: f.
        gated: whether there are halves.
        first: whether `a` is the first of them.
    """

    up: tuple[Linear, ...]
    down: Linear
    activation: Activation
    gated: bool = False
    first: bool = True


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer.

    Attributes:
        norm_first: whether each half is `x + half(norm(x))` (pre-norm) or `norm(x + half(x))`.
        attention_norm: None is the identity, which only the first layer may have, and only
            where norms come first.
        attention_exit, feed_forward_exit: norms of what each half adds, where norms come first;
            both or neither.
    """

    attention: Attention
    attention_norm: Norm | None
    feed_forward: FeedForward
    feed_forward_norm: Norm
    norm_first: bool = False
    attention_exit: Norm | None = None
    feed_forward_exit: Norm | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Embedding tables `[rows, E]`, their sum normalised; `projection` widens it (ELECTRA), and
    `projected_norm` norms the result (DeBERTa); or `scale`, of one element, multiplies it (Gemma).

    Attributes:
        masked: the model multiplies the result by the mask.
        dropout: behind `norm`, in training; None where there is none.
    """

    word: Tensor
    position: Tensor | None
    token_type: Tensor | None
    norm: Norm | None
    projection: Linear | None = None
    scale: Tensor | None = None
    projected_norm: Norm | None = None
    masked: bool = False
    dropout: nn.Dropout | None = None


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """The live parameters of a model, by role. Nothing here is a copy.

    Attributes:
        final_norm: behind the last layer, where norms come first.
        uncalled: modules of dropout that no forward calls.
    """

    embeddings: Embeddings
    layers: tuple[Layer, ...]
    final_norm: Norm | None = None
    uncalled: tuple[nn.Module, ...] = ()

    def tensors(self) -> Iterator[Tensor]:
        """Every parameter, and the buffers that are read, in a fixed order."""
        return (value for value in _values(self) if isinstance(value, Tensor))

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, in the order in which they run."""
        if self.embeddings.projection is not None:
            yield self.embeddings.projection
        for layer in self.layers:
            attention, feed_forward = layer.attention, layer.feed_forward
            yield from (*attention.qkv, attention.output, *feed_forward.up, feed_forward.down)

    def dropouts(self) -> set[nn.Module]:
        """The modules of dropout that an adapter has read."""
        return {value for value in _values(self) if isinstance(value, nn.Dropout)}

    def rates(self) -> set[str]:
        """The names that rates have which an adapter has read of modules that are no dropout."""
        parts = (layer.attention.dropout for layer in self.layers)
        return {p.name for p in parts if p is not None and not isinstance(p.holder, nn.Dropout)}

    def tabulated(self) -> Iterator[Tensor]:
        """What tables of distances are computed from: these are copies, whatever else is not."""
        parts = (_values(layer.attention.disentangled) for layer in self.layers)
        return (value for part in parts for value in part if isinstance(value, Tensor))

    def identity(self) -> tuple[object, ...]:
        """What prepared weights are derived from, but for the contents of the parameters."""
        return tuple(id(v) if isinstance(v, Tensor) else v for v in _values(self))

    @property
    def measures_distances(self) -> bool:
        """Whether a result depends on how many tokens apart two tokens are in a padded row."""
        parts = (
            (layer.attention.window, layer.attention.relative_bias, layer.attention.disentangled)
            for layer in self.layers
        )
        return any(part is not None for each in parts for part in each)


def _values(node: object) -> Iterator[object]:
    """The tensors and settings of weights, in a fixed order."""
    if isinstance(node, tuple):
        for part in node:
            yield from _values(part)
    elif is_dataclass(node):
        for field in fields(node):
            yield from _values(getattr(node, field.name))
    else:
        yield node


def is_in_pooler(name: str) -> bool:
    """Whether a module or tensor of a base model, called `name`, is the pooler or a part of it,
    which no packed pass stands for."""
    return name.partition(".")[0] in ("pooler", "pooler_activation")


def pool(model: Any, states: Tensor) -> Tensor | None:  # noqa: ANN401
    """What the pooler of a base model makes of its last states `[B, S, E]`; None without one."""
    pooler, activate = getattr(model, "pooler", None), getattr(model, "pooler_activation", None)
    if pooler is None or activate is None:
        return None if pooler is None else pooler(states)
    return activate(pooler(states[:, 0]))  # ALBERT


def linear(module: nn.Module, dropout: nn.Dropout | None = None) -> Linear:
    if type(module) is not nn.Linear:
        raise UnsupportedModelError(
            f"expected torch.nn.Linear, got {type(module).__module__}.{type(module).__qualname__}"
        )
    return Linear(module.weight, module.bias, module, dropout)


def norm(module: nn.Module, *, bias: bool = True) -> Norm:
    """What an nn.LayerNorm holds, with a bias or, where `bias` is false, perhaps without."""
    if type(module) is not nn.LayerNorm or module.weight is None or (bias and module.bias is None):
        expected = "torch.nn.LayerNorm with weight" + (" and bias" if bias else "")
        raise UnsupportedModelError(f"expected {expected}, got {type(module).__qualname__}")
    return Norm(module.weight, module.bias, module.eps)


def rms_norm(module: Any) -> Norm:
    """What an RMSNorm of transformers holds, one that is laid out like T5's."""
    return Norm(module.weight, None, module.variance_epsilon, rms=True)


def rotary(module: Any, kind: str | None = None) -> Rotary:
    """The rotary positions of a model, or those of its layers of one kind."""
    name = module.rope_type if kind is None else module.rope_type[kind]
    prefix = "" if kind is None else f"{kind}_"
    if name not in _ROTARY:
        raise UnsupportedModelError(
            f"rotary positions must be of type {', '.join(_ROTARY)}, got {name!r}"
        )
    if (scaling := getattr(module, f"{prefix}attention_scaling")) != 1.0:
        raise UnsupportedModelError(f"{prefix}attention_scaling must be 1, got {scaling!r}")
    return Rotary(getattr(module, f"{prefix}inv_freq"))


def head_dim(hidden_size: int, heads: int) -> int:
    """The head dim of a model whose heads divide its hidden size."""
    if heads < 1 or hidden_size % heads:
        raise UnsupportedModelError(f"hidden size {hidden_size} is not a multiple of {heads} heads")
    return hidden_size // heads
