"""The layers of a forward pass against plain torch: also those that no family of today has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_fast import ops
from sbert_fast.layers import Stack
from sbert_fast.models.base import (
    Attention,
    Disentangled,
    Embeddings,
    EncoderWeights,
    FeedForward,
    Layer,
    Linear,
    Norm,
    RelativeBias,
    Rotary,
)
from sbert_fast.ops.reference import Activation
from sbert_fast.packing import PackedBatch, pack
from sbert_fast.preparation import prepare_stack, required_ops
from sbert_fast.target import Target
from sbert_fast.testing import assert_close_to_oracle

CPU = torch.device("cpu")
WIDTH, HEADS, DIM, INNER, LAYERS = 32, 4, 8, 48, 3
LENGTHS = [1, 2, 7, 20, 13]
REACH = 3


@dataclass(frozen=True)
class Kind:
    """What the layers of a model have."""

    norm_first: bool = False
    enters_normed: bool = True
    rms: bool = False
    biased: bool = True
    kv_heads: int = HEADS
    joined: bool = False
    causal: bool = False
    relative: bool = False
    distances: str = ""
    rotary: bool = False
    window: int | None = None
    norms_heads: bool = False
    norms_halves: bool = False
    shift: float = 0.0
    gated: bool = False
    first: bool = True
    activation: Activation = Activation.GELU


PLAIN = Kind()
GATED = replace(PLAIN, gated=True, activation=Activation.SILU)
ALL = replace(GATED, rms=True, biased=False, kv_heads=2, causal=True, relative=True, rotary=True)
KINDS = {
    "plain": PLAIN,
    "GELU in tanh form": replace(PLAIN, activation=Activation.GELU_TANH),
    "no biases": replace(PLAIN, biased=False),
    "q, k and v in one": replace(PLAIN, joined=True),
    "RMSNorm": replace(PLAIN, rms=True),
    "two heads of keys": replace(PLAIN, kv_heads=2),
    "one head of keys, joined": replace(PLAIN, kv_heads=1, joined=True),
    "causal": replace(PLAIN, causal=True),
    "relative bias": replace(PLAIN, relative=True),
    "rows of distances for queries": replace(PLAIN, distances="c2p"),
    "rows of distances for keys": replace(PLAIN, distances="p2c", kv_heads=2),
    "rows of distances for both": replace(PLAIN, distances="c2p p2c"),
    "rotary": replace(PLAIN, rotary=True),
    "window": replace(PLAIN, window=2),
    "norms of heads": replace(PLAIN, norms_heads=True),
    "norms of halves": replace(PLAIN, norms_halves=True),
    "norms with shifted weights": replace(PLAIN, rms=True, shift=1.0, norms_halves=True),
    "SwiGLU": GATED,
    "SwiGLU, gate first": replace(GATED, first=False),
    "GEGLU, joined": replace(GATED, joined=True, activation=Activation.GELU),
    "all": replace(ALL, distances="c2p p2c"),
    "all in a window, joined": replace(
        ALL, window=4, joined=True, biased=True, norms_heads=True, norms_halves=True
    ),
}


def _linear(outputs: int, inputs: int, bias: bool) -> Linear:
    module = nn.Linear(inputs, outputs, bias=bias)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape) / inputs**0.5
    return Linear(module.weight, module.bias, module)


def _norm(kind: Kind) -> Norm:
    bias = torch.randn(WIDTH) if kind.biased and not kind.rms else None
    return Norm(torch.rand(WIDTH) + 0.5, bias, 1e-5, kind.rms, kind.shift)


def _head_norm(kind: Kind) -> Norm | None:
    return Norm(torch.rand(DIM) + 0.5, None, 1e-5, rms=True) if kind.norms_heads else None


def _disentangled(kind: Kind) -> Disentangled | None:
    if not kind.distances:
        return None
    parts = [_linear(HEADS * DIM, WIDTH, kind.biased) for _ in range(2)]
    keys, queries = (
        part if name in kind.distances else None
        for part, name in zip(parts, ("c2p", "p2c"), strict=True)
    )
    norm = _norm(replace(kind, rms=False, shift=0.0)) if keys else None
    buckets = tuple(torch.randint(5, (2 * REACH + 1,)).tolist())
    return Disentangled(torch.randn(6, WIDTH), norm, keys, queries, buckets)


def _exit(kind: Kind) -> Norm | None:
    return _norm(kind) if kind.norms_halves and kind.norm_first else None


def _layer(kind: Kind, rotary: Rotary) -> Layer:
    keys = kind.kv_heads * DIM
    columns = [HEADS * DIM, keys, keys]
    halves = [INNER, INNER] if kind.gated else [INNER]
    if kind.joined:
        columns, halves = [sum(columns)], [sum(halves)]
    buckets = tuple(torch.randperm(2 * REACH + 1).tolist())
    return Layer(
        attention=Attention(
            qkv=tuple(_linear(n, WIDTH, kind.biased) for n in columns),
            output=_linear(WIDTH, HEADS * DIM, kind.biased),
            heads=HEADS,
            kv_heads=kind.kv_heads,
            head_dim=DIM,
            scale=0.3,
            relative_bias=RelativeBias(torch.randn(2 * REACH + 1, HEADS), buckets)
            if kind.relative
            else None,
            rotary=rotary if kind.rotary else None,
            window=kind.window,
            causal=kind.causal,
            query_norm=_head_norm(kind),
            key_norm=_head_norm(kind),
            disentangled=_disentangled(kind),
        ),
        attention_norm=_norm(kind),
        feed_forward=FeedForward(
            up=tuple(_linear(n, WIDTH, kind.biased) for n in halves),
            down=_linear(WIDTH, INNER, kind.biased),
            activation=kind.activation,
            gated=kind.gated,
            first=kind.first,
        ),
        feed_forward_norm=_norm(kind),
        norm_first=kind.norm_first,
        attention_exit=_exit(kind),
        feed_forward_exit=_exit(kind),
    )


def make_weights(*kinds: Kind) -> EncoderWeights:
    """Random fp32 weights of layers of these kinds, all with norms in the same order."""
    rotary = [Rotary(torch.rand(DIM // 2)) for _ in range(2)]
    layers = [_layer(kind, rotary[depth % 2]) for depth, kind in enumerate(kinds)]
    if not kinds[0].enters_normed:
        layers[0] = replace(layers[0], attention_norm=None)
    final = _norm(kinds[-1]) if kinds[0].norm_first else None
    return EncoderWeights(Embeddings(torch.randn(8, WIDTH), None, None, None), tuple(layers), final)


def _apply(parts: Sequence[Linear], x: Tensor) -> Tensor:
    dtype = x.dtype
    return torch.cat(
        [
            F.linear(x, p.weight.to(dtype), None if p.bias is None else p.bias.to(dtype))
            for p in parts
        ],
        dim=1,
    )


def _apply_norm(norm: Norm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    weight = norm.weight.to(x.dtype) + norm.shift
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    if norm.rms:
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def _turn(x: Tensor, rotary: Rotary) -> Tensor:
    """`x` `[L, H, D]`, its halves turned."""
    angles = torch.arange(x.shape[0])[:, None, None] * rotary.frequencies.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat(
        (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1
    )


def _of_distances(part: Disentangled, head: int, away: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """What distances add to the products of the queries and keys `[L, D]` of a head."""
    reach, rows = len(part.buckets) // 2, _apply_norm(part.norm, part.table.to(q.dtype))
    at = torch.tensor(part.buckets)[away.clamp(-reach, reach) + reach]
    terms = [(p, x) for p, x in ((part.keys, q[:, None]), (part.queries, k[None])) if p is not None]
    tables = [(_apply((p,), rows).view(-1, HEADS, DIM)[at, head], x) for p, x in terms]
    return torch.stack([(table * x).sum(-1) for table, x in tables]).sum(0)


def _attend(attention: Attention, x: Tensor) -> Tensor:
    """Attention over a sequence `[L, E]`, one head after the other."""
    length, dim, shared = x.shape[0], attention.head_dim, attention.heads // attention.kv_heads
    q, k, v = (
        _apply(attention.qkv, x)
        .view(length, -1, dim)
        .split([attention.heads, attention.kv_heads, attention.kv_heads], dim=1)
    )
    q, k = _apply_norm(attention.query_norm, q), _apply_norm(attention.key_norm, k)
    if attention.rotary is not None:
        q, k = (_turn(part, attention.rotary) for part in (q, k))
    away = torch.arange(length) - torch.arange(length)[:, None]
    hidden = torch.zeros(length, length, dtype=torch.bool)
    if attention.window is not None:
        hidden |= away.abs() > attention.window
    if attention.causal:
        hidden |= away > 0
    heads = []
    for head in range(attention.heads):
        logits = q[:, head] @ k[:, head // shared].T
        if (part := attention.disentangled) is not None:
            logits = logits + _of_distances(part, head, away, q[:, head], k[:, head // shared])
        logits = logits * attention.scale
        if (relative := attention.relative_bias) is not None:
            reach = len(relative.buckets) // 2
            rows = torch.tensor(relative.buckets)[away.clamp(-reach, reach) + reach]
            logits = logits + relative.table[rows, head].to(x.dtype)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=1)
        heads.append(weights @ v[:, head // shared])
    return _apply((attention.output,), torch.cat(heads, dim=1))


def _feed_forward(layer: FeedForward, x: Tensor) -> Tensor:
    function = {
        Activation.GELU: F.gelu,
        Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
        Activation.SILU: F.silu,
    }[layer.activation]
    y = _apply(layer.up, x)
    if layer.gated:
        a, b = y.chunk(2, dim=1) if layer.first else reversed(y.chunk(2, dim=1))
        return _apply((layer.down,), function(a) * b)
    return _apply((layer.down,), function(y))


def plain_states(weights: EncoderWeights, x: Tensor) -> list[Tensor]:
    """The states of a sequence `[L, E]` before and after every layer, as its dtype rounds them."""
    states = [x]
    for layer in weights.layers:
        if layer.norm_first:
            half = _attend(layer.attention, _apply_norm(layer.attention_norm, x))
            x = x + _apply_norm(layer.attention_exit, half)
            half = _feed_forward(layer.feed_forward, _apply_norm(layer.feed_forward_norm, x))
            x = x + _apply_norm(layer.feed_forward_exit, half)
        else:
            x = _apply_norm(layer.attention_norm, x + _attend(layer.attention, x))
            x = _apply_norm(layer.feed_forward_norm, x + _feed_forward(layer.feed_forward, x))
        states.append(x)
    states[-1] = _apply_norm(weights.final_norm, x)
    return states


def make_batch() -> PackedBatch:
    starts = np.concatenate(([0], np.cumsum(LENGTHS)))
    return pack(np.zeros(sum(LENGTHS), dtype=np.int32), starts, np.arange(len(LENGTHS)))


def assert_as_plain(weights: EncoderWeights, target: Target) -> None:
    batch = make_batch()
    x = torch.randn(batch.input_ids.shape[0], WIDTH)
    with torch.no_grad():
        stack = prepare_stack(weights, target)
        ours = list(stack.states(x, batch))
        texts = x[: batch.num_tokens].split(LENGTHS)
        exact, peer = (
            [plain_states(weights, text.to(dtype)) for text in texts]
            for dtype in (torch.float64, torch.float32)
        )
        finished = _finish(stack, x, batch)
    assert len(ours) == len(weights.layers) + 1
    for depth, state in enumerate([*ours, finished]):
        depth = min(depth, len(weights.layers))
        both = (torch.cat([states[depth] for states in each]) for each in (exact, peer))
        assert_close_to_oracle(state[: batch.num_tokens], *both, torch.float32)


def _finish(stack: Stack, x: Tensor, batch: PackedBatch) -> Tensor:
    last = stack.unfinished(x, batch)
    norm = last.norm
    return ops.add_norm(
        last.y, last.bias, last.residual, norm.weight, norm.bias, norm.eps, rms=norm.rms
    )


every_order = pytest.mark.parametrize(
    "order",
    [{}, {"norm_first": True}, {"norm_first": True, "enters_normed": False}],
    ids=["post-norm", "pre-norm", "pre-norm, entered as it is"],
)
every_target = pytest.mark.parametrize(
    "how", [{}, {"impl": "reference"}, {"live": True}], ids=["auto", "reference", "live"]
)


@every_target
@every_order
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_layers_give_what_plain_torch_gives(
    kind: Kind, order: dict[str, Any], how: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    kinds = [replace(kind, **order)] * LAYERS
    assert_as_plain(make_weights(*kinds), Target(torch.float32, CPU, **how))


@every_target
@every_order
def test_layers_of_several_kinds(order: dict[str, Any], how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    kinds = [replace(kind, **order) for kind in KINDS.values()]
    assert_as_plain(make_weights(*kinds), Target(torch.float32, CPU, **how))


@every_order
def test_layers_run_no_other_ops_than_they_require(order: dict[str, Any]) -> None:
    weights = make_weights(*(replace(kind, **order) for kind in KINDS.values()))
    batch, required = make_batch(), {op for op, _ in required_ops(weights)}
    stack = prepare_stack(weights, Target(torch.float32, CPU, "reference", live=True))
    ops.reset_launches()
    with torch.no_grad():
        list(stack.states(torch.randn(batch.input_ids.shape[0], WIDTH), batch))
    assert {op for op, _ in ops.launches()} == required
