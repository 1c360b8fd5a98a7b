"""dtype="int8": every family, how far from float32 it is, and where it is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import families
from checks import bits, cosine_distances
from sbert_fast import FastCrossEncoder, FastEncoder, explain
from sbert_fast.data import sample_texts
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import ImplementationError, InvalidWeightsError
from sbert_fast.ops import extension

pytestmark = pytest.mark.skipif(not extension.CPU.available, reason=str(extension.CPU.reason))


@pytest.mark.usefixtures("int8_anywhere")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family(name: str) -> None:
    stock = families.make_sentence_transformer(name)
    texts = families.make_texts(40)
    encoder = FastEncoder(stock, dtype="int8")
    vectors = encoder.encode(texts)
    # The worst text of random weights may lose much: some lose 1e-3 in bfloat16, in stock as well.
    assert cosine_distances(vectors, stock.encode(texts)).mean() <= 0.002
    assert not np.array_equal(vectors, FastEncoder(stock).encode(texts))
    assert not encoder.stats.fallbacks
    engine = encoder.packed_engine
    assert engine is not None
    assert {choice.kind.name for choice in engine.linears()} == {"int8"}
    for place in (0, 17, 39):
        assert np.array_equal(
            bits(encoder.encode([texts[place]])), bits(vectors[place : place + 1])
        )


@pytest.mark.usefixtures("int8_anywhere")
def test_real_weights(st_minilm: SentenceTransformer) -> None:
    """Nothing is calibrated: these are the texts of the package's own sample."""
    texts = sample_texts()[:400]
    distances = cosine_distances(
        FastEncoder(st_minilm, dtype="int8").encode(texts), st_minilm.encode(texts)
    )
    assert distances.max() <= 0.01
    assert distances.mean() <= 0.002


@pytest.mark.usefixtures("int8_anywhere")
def test_scores() -> None:
    stock = families.make_cross_encoder("bert")
    texts = families.make_texts(20)
    pairs = list(zip(texts, reversed(texts), strict=True))
    reranker = FastCrossEncoder(stock, dtype="int8")
    assert np.abs(reranker.predict(pairs) - stock.predict(pairs)).max() <= 0.01
    assert not reranker.stats.fallbacks


@pytest.mark.usefixtures("int8_anywhere")
def test_a_layer_that_int8_panels_cannot_hold_runs_in_the_compute_dtype() -> None:
    encoder = FastEncoder(
        families.make_sentence_transformer(overrides={"intermediate_size": 98}), dtype="int8"
    )
    assert encoder.encode(["some words"]).shape == (1, 64)
    told = "(int8: the number of inputs (98) is not a multiple of 4"
    assert told in explain(encoder)


@pytest.mark.usefixtures("int8_anywhere")
def test_weights_that_are_not_finite_are_named() -> None:
    stock = families.make_sentence_transformer()
    layer = stock[0].auto_model.encoder.layer[1].output.dense
    layer.weight.data[3, 5] = float("inf")
    with pytest.raises(InvalidWeightsError, match=r"encoder.layer.1.output.dense.weight"):
        FastEncoder(stock, dtype="int8").encode(["some words"])


@pytest.mark.parametrize("isa", ["generic"], indirect=True)
def test_a_cpu_without_int8_instructions(isa: str, st: SentenceTransformer) -> None:
    with pytest.raises(ImplementationError, match="dtype='int8' .* need AVX512-VNNI.* generic"):
        FastEncoder(st, dtype="int8")


@pytest.mark.usefixtures("int8_anywhere")
def test_what_int8_does_not_go_with(st: SentenceTransformer) -> None:
    with pytest.raises(ImplementationError, match="dtype='int8' .* need the C"):
        FastEncoder(st, dtype="int8", impl="reference")
    with pytest.raises(ValueError, match="dtype must be torch.float32, that of live weights"):
        PackedEncoder(st[0].auto_model, dtype=torch.int8, live=True)
