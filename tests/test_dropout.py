"""Dropout of attention weights: which stay, what kernels check, and that none changes no bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sbert_fast import kernels, ops
from sbert_fast.ops import dropout
from sbert_fast.testing import pack_lengths

SEED = torch.tensor([0x123456789ABCDEF])
RATE = 0.3
every_impl = pytest.mark.parametrize("impl", ["reference", "cpu"])


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], seed: int, expected: tuple[int, ...]) -> None:
    """Those of Random123."""
    words = dropout.philox(tuple(torch.tensor([word]) for word in counter), torch.tensor([seed]))
    assert tuple(int(word) for word in words) == expected


def weights_of(
    impl: str, lengths: list[int], heads: int = 4, dim: int = 64, **options: Any
) -> list[Tensor]:
    """The weights `[H, L, L]` of every sequence, of queries that are zero: values are unit vectors,
    so that token i attends to weight j in its dim j."""
    tokens = sum(lengths)
    qkv = torch.zeros(tokens, 3, heads, dim)
    positions = torch.cat([torch.arange(length) for length in lengths])
    qkv[torch.arange(tokens), 2, :, positions] = 1
    out = ops.varlen_attention(qkv, pack_lengths(lengths), max(lengths), impl=impl, **options)
    parts = out.split(lengths)
    return [part.transpose(0, 1)[:, :, :n] for part, n in zip(parts, lengths, strict=True)]


every_option = pytest.mark.parametrize("options", [{}, {"window": 9}, {"causal": True}], ids=str)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rate", [RATE, 0.7])
@every_option
def test_the_mask_is_that_of_the_reference(options: dict[str, Any], rate: float) -> None:
    assert_mask_of_reference("cpu", options, rate)


@pytest.mark.skipif(not kernels.interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("rate", [RATE, 0.7])
@every_option
def test_the_mask_in_triton(options: dict[str, Any], rate: float) -> None:
    assert_mask_of_reference("triton", options, rate)


def assert_mask_of_reference(impl: str, options: dict[str, Any], rate: float) -> None:
    lengths, first = [1, 37, 64, 6, 17], 0
    dropped = weights_of(impl, lengths, dropout=rate, seed=SEED, **options)
    whole = weights_of("reference", lengths, **options)
    for length, ours, plain in zip(lengths, dropped, whole, strict=True):
        rows = torch.arange(first, first + length)[None]
        stay = dropout.kept(rate, SEED, rows, 4, length)[0]
        torch.testing.assert_close(ours, plain * stay / (1 - rate))
        first += length


def test_the_mask_has_no_pattern() -> None:
    """Shares and correlations within four standard deviations, of a fixed seed."""
    stay = dropout.kept(RATE, SEED, torch.arange(256)[None], 8, 256)[0].double()
    spread = math.sqrt(RATE * (1 - RATE))
    for dims in [(0, 1, 2), (1, 2), (0, 2), (0, 1)]:
        mean = stay.mean(dims)
        count = stay.numel() / mean.numel()
        # Of several shares, the largest deviation: a little more than of one.
        most = 4 + math.log10(mean.numel())
        assert ((mean - (1 - RATE)).abs() <= most * spread / math.sqrt(count)).all()
    centred = (stay - (1 - RATE)) / spread
    others = [centred.roll(1, dim) for dim in range(3)] + [centred.transpose(1, 2)]
    other_seed = dropout.kept(RATE, SEED + 1, torch.arange(256)[None], 8, 256)[0].double()
    for other in (*others, (other_seed - (1 - RATE)) / spread):
        assert (centred * other).mean().abs() <= 4 / math.sqrt(stay.numel())


@every_impl
def test_the_seed_is_that_of_torch(impl: str) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(weights_of(impl, [64], dropout=RATE)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@every_impl
def test_no_dropout_changes_no_bit(impl: str) -> None:
    torch.manual_seed(0)
    cu = pack_lengths([50, 7])
    qkv = torch.randn(57, 3, 2, 32, requires_grad=True)
    before, results = torch.get_rng_state(), []
    for options in ({}, {"dropout": 0.0, "seed": SEED}, {"dropout": 0}):
        out = ops.varlen_attention(qkv, cu, 50, impl=impl, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))
    assert torch.equal(torch.get_rng_state(), before)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dropout": 1.0}, ValueError, "dropout must be less than 1, got 1"),
    ({"dropout": -0.1}, ValueError, "dropout must be a finite number of at least 0, got -0.1"),
    ({"dropout": True}, TypeError, "dropout must be a number"),
    ({"dropout": 0.1, "seed": 7}, TypeError, "seed must be a torch.Tensor, got int"),
    ({"dropout": 0.1, "seed": torch.zeros(1)}, TypeError, "seed must be int64"),
    ({"dropout": 0.1, "seed": torch.zeros(2).long()}, ValueError, r"seed must have shape \[1\]"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=str)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weights_of("reference", [3], **options)


@pytest.mark.parametrize(
    ("rate", "seed", "message"),
    [
        (1.0, SEED, r"dropout must be in \[0, 1\), got 1"),
        (0.1, None, "seed must be given with dropout, got None"),
        (0.1, SEED.int(), "seed must be contiguous int64"),
    ],
)
def test_the_kernels_check_again(rate: float, seed: Tensor | None, message: str) -> None:
    qkv, cu = torch.zeros(8, 3, 2, 16), pack_lengths([8])
    forward = torch.ops.sbert_fast.varlen_attention.cpu
    backward = torch.ops.sbert_fast.varlen_attention_backward.cpu
    how: Any = {"dropout": rate, "seed": seed}
    with pytest.raises(RuntimeError, match=f"^varlen_attention: {message}"):
        forward(qkv, cu, 8, 1.0, None, -1, None, None, None, **how)
    with pytest.raises(RuntimeError, match=f"^varlen_attention_backward: {message}"):
        backward(qkv[:, 0].contiguous(), qkv, cu, 8, 1.0, None, -1, **how)
