"""torch.set_float32_matmul_precision: "high" takes sums of products of bfloat16, on tiles."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

import families
from checks import MAX_DISTANCE, assert_same_vectors, bits, cosine_distances
from instruction_sets import NATIVE, WITH_TILES
from sbert_fast import FastEncoder, accelerate, explain, target
from sbert_fast.data import sample_texts
from sbert_fast.ops import extension, panels
from sbert_fast.ops.reference import Activation
from sbert_fast.testing import assert_close_to_oracle, peer_split

OPS = torch.ops.sbert_fast
pytestmark = pytest.mark.skipif(not extension.CPU.available, reason=str(extension.CPU.reason))
on_tiles = pytest.mark.parametrize("isa", WITH_TILES, indirect=True)
TEXTS = families.make_texts(12)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """Every test leaves the setting as it was."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def tiles_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for tiles is chosen, too."""
    monkeypatch.setattr(target, "TILE_ISAS", WITH_TILES)


def linear_of(x: torch.Tensor, weight: torch.Tensor) -> Any:
    how = None, len(weight), Activation.NONE, False
    return OPS.linear.cpu(x, panels.pack_split(weight), *how)


@on_tiles
@pytest.mark.parametrize("K", [32, 384, 1536])
def test_products_are_as_exact_as_torch_documents(isa: str, K: int) -> None:
    """Both factors are right to 2^-17, and the product that is left out is below 2^-16."""
    x, weight = torch.randn(40, K) * 100, torch.randn(100, K)
    exact = x.double() @ weight.T.double()
    error = (linear_of(x, weight) - exact).abs()
    magnitude = x.double().abs() @ weight.T.double().abs()
    assert (error <= (2**-15 + K * 2**-24) * magnitude).all()
    assert error.max() > (x @ weight.T - exact).abs().max()


@pytest.mark.parametrize("isa", NATIVE, indirect=True)
def test_split_panels_need_tiles(isa: str) -> None:
    if isa not in WITH_TILES:
        with pytest.raises(RuntimeError, match=f"split panels need AMX, this CPU runs {isa}"):
            linear_of(torch.randn(3, 64), torch.randn(5, 64))


@on_tiles
def test_split_panels_that_fit_no_tile(isa: str) -> None:
    packed = panels.pack_split(torch.randn(5, 64))
    with pytest.raises(RuntimeError, match="multiple of 32 where panels are split, got 48"):
        OPS.linear.cpu(torch.randn(3, 48), packed, None, 5, Activation.NONE, False)


@on_tiles
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_reaches_no_other(isa: str, value: float) -> None:
    x, weight = torch.randn(40, 64), torch.randn(50, 64)
    expected = linear_of(x, weight)
    x[7, 5] = value
    out = linear_of(x, weight)
    assert not out[7].isfinite().any()
    kept = torch.arange(40) != 7
    assert torch.equal(out[kept], expected[kept])


def kinds(encoder: FastEncoder) -> set[str]:
    engine = encoder.packed_engine
    assert engine is not None
    return {choice.kind.name for choice in engine.linears()}


@on_tiles
@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3"])
def test_families(isa: str, name: str) -> None:
    stock = families.make_sentence_transformer(name)
    exact = FastEncoder(stock).encode(TEXTS)
    torch.set_float32_matmul_precision("high")
    encoder = FastEncoder(stock)
    vectors = encoder.encode(TEXTS)
    assert kinds(encoder) == {"split"}
    assert not encoder.stats.fallbacks
    assert 0 < cosine_distances(vectors, exact).max() <= MAX_DISTANCE
    assert not np.array_equal(vectors, exact)
    for place in (0, 5, 11):
        alone = encoder.encode([TEXTS[place]])
        assert np.array_equal(bits(alone), bits(vectors[place : place + 1]))


@on_tiles
def test_threads_change_no_bit(isa: str) -> None:
    torch.set_float32_matmul_precision("high")
    encoder = FastEncoder(families.make_sentence_transformer())
    vectors, threads = encoder.encode(TEXTS), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert np.array_equal(bits(encoder.encode(TEXTS)), bits(vectors))
    finally:
        torch.set_num_threads(threads)


@on_tiles
def test_the_setting_counts_at_the_next_call(isa: str, st: SentenceTransformer) -> None:
    encoder, accelerated = FastEncoder(st), accelerate(copy.deepcopy(st))
    exact = encoder.encode(TEXTS)
    accelerated.encode(TEXTS)
    high = None
    for setting in ("high", "medium", "highest", "high"):
        torch.set_float32_matmul_precision(setting)
        vectors = encoder.encode(TEXTS)
        high = vectors if setting == "high" and high is None else high
        assert np.array_equal(vectors, exact if setting == "highest" else high)
        assert_same_vectors(accelerated.encode(TEXTS), vectors)
        assert kinds(encoder) == {"panels" if setting == "highest" else "split"}
        for model in (encoder, accelerated):
            assert ("linear: split" in explain(model)) == (setting != "highest")
    assert not np.array_equal(high, exact)


@on_tiles
def test_settings_of_torch_that_contradict_one_another_change_nothing(
    isa: str, st: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contradict() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    exact = FastEncoder(st).encode(TEXTS)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", contradict)
    assert np.array_equal(FastEncoder(st).encode(TEXTS), exact)


@on_tiles
def test_training_stays_live(isa: str) -> None:
    torch.set_float32_matmul_precision("high")
    model = families.make_model("bert")
    ids = torch.randint(5, 90, (3, 12))
    expected = copy.deepcopy(model)(ids).last_hidden_state.square().mean()
    loss = accelerate(model)(ids).last_hidden_state.square().mean()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    weight = model.encoder.layer[0].output.dense.weight
    assert weight.grad is not None and weight.grad.abs().max() > 0


@on_tiles
def test_a_layer_that_fills_no_tile_stays_exact(isa: str) -> None:
    torch.set_float32_matmul_precision("high")
    overrides = {"intermediate_size": 98}
    encoder = FastEncoder(families.make_sentence_transformer(overrides=overrides))
    assert encoder.encode(["some words"]).shape == (1, 64)
    assert kinds(encoder) == {"split", "panels"}
    assert "(split: the number of inputs (98) is not a multiple of 32" in explain(encoder)


WITHOUT_TILES = [isa for isa in NATIVE if isa not in (*WITH_TILES, "generic")]


@pytest.mark.parametrize("isa", WITHOUT_TILES, indirect=True)
def test_without_tiles_nothing_changes(isa: str, st: SentenceTransformer) -> None:
    encoder = FastEncoder(st)
    exact, engine = encoder.encode(TEXTS), encoder.packed_engine
    assert "high precision" not in explain(encoder)
    assert engine is not None
    prepared = engine.prepared()
    torch.set_float32_matmul_precision("high")
    assert np.array_equal(encoder.encode(TEXTS), exact)
    assert engine.prepared() is prepared
    assert f"split: high precision needs AMX, this CPU runs {isa}" in explain(encoder)


def linear_of_peer(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return peer_split(x, *panels.split(module.weight)) + module.bias


@on_tiles
def test_real_weights(isa: str, st_minilm: SentenceTransformer) -> None:
    """The 2x rule, the peer being stock whose linear layers take the same three products."""
    texts, encoder = sample_texts()[:4], FastEncoder(st_minilm)
    exact = copy.deepcopy(st_minilm).double().encode(texts, convert_to_tensor=True)
    peer = copy.deepcopy(st_minilm)
    for module in peer.modules():
        if type(module) is nn.Linear:
            module.forward = partial(linear_of_peer, module)  # type: ignore[method-assign]
    torch.set_float32_matmul_precision("high")
    vectors = encoder.encode(texts, convert_to_tensor=True)
    assert kinds(encoder) == {"split"}
    expected = peer.encode(texts, convert_to_tensor=True)
    assert_close_to_oracle(vectors, exact, expected, torch.float32)
