"""The layout in which the C++ linear layers read their weights."""

from __future__ import annotations

import pytest
import torch

from sbert_fast.ops import panels


@pytest.mark.parametrize(("K", "N"), [(4, 1), (64, 50), (384, 96)])
def test_int8_panels_hold_the_weight(K: int, N: int) -> None:
    weight = torch.randn(N, K)
    weight[N // 2] = 0.0
    rounded, scale = panels.unpack_int8(panels.pack_int8(weight), N)
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    error = (rounded * scale[:, None] - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    assert (rounded.abs().amax(1) == 127 * (scale > 0)).all()


@pytest.mark.parametrize(("K", "N"), [(32, 1), (64, 50), (384, 96)])
def test_split_panels_hold_the_weight(K: int, N: int) -> None:
    weight = torch.randn(N, K)
    packed = panels.pack_split(weight)
    assert packed.shape == (3 * -(-N // panels.COLUMNS), K, 16, 2)
    assert panels.is_split(packed, K)
    assert not panels.is_split(panels.pack(weight.bfloat16()), K)
    greater, lesser = panels.unpack_split(packed, N)
    assert torch.equal(greater, weight.bfloat16())
    assert ((greater.double() + lesser.double() - weight).abs() <= 2**-17 * weight.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K", "N"), [(2, 1), (38, 48), (64, 50), (384, 100)])
def test_panels_hold_the_weight(K: int, N: int, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K).to(dtype)
    packed = panels.pack(weight)
    assert torch.equal(panels.unpack(packed, N), weight)
    assert packed.numel() == -(-N // panels.COLUMNS) * panels.COLUMNS * K


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("features", [1, 39, 48, 96])
def test_panels_of_a_gated_layer_hold_both_halves(features: int, first: bool) -> None:
    weight = torch.randn(2 * features, 6)
    rows = panels.interleave(weight, first)
    assert rows.shape == (panels.gated_columns(features), 6)
    halves = weight.chunk(2) if first else reversed(weight.chunk(2))
    assert torch.equal(panels.separated(rows.T, features).T, torch.cat(tuple(halves)))
    assert rows.count_nonzero() == weight.count_nonzero()


def test_panels_of_no_rows() -> None:
    columns = torch.zeros(0, 2 * panels.COLUMNS)
    assert panels.separated(columns, 20).shape == (0, 40)
