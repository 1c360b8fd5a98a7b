"""A warm-up leaves the first call nothing to prepare, and nothing else behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from families import make_cross_encoder, make_sentence_transformer, make_xlnet
from sbert_fast import FastCrossEncoder, FastEncoder, ops
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import InvalidWeightsError
from sbert_fast.stats import EncoderStats

MODELS = {
    "encoder": lambda: FastEncoder(make_sentence_transformer()),
    "cross-encoder": lambda: FastCrossEncoder(make_cross_encoder("bert")),
}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines that have prepared weights since."""
    seen: list[Any] = []
    prepare = PackedEncoder._prepare

    def record(self: PackedEncoder, *args: Any) -> Any:
        seen.append(self)
        return prepare(self, *args)

    monkeypatch.setattr(PackedEncoder, "_prepare", record)
    return seen


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_first_call_prepares_nothing(make: Any, prepared: list[Any], launches: Any) -> None:
    model = make()
    prepared.clear()
    model.refresh()
    ops.reset_launches()
    assert model.warmup() is model
    assert len(prepared) == 1 and launches()
    getattr(model, model.method)(["sea", "sun"] if model.method == "encode" else [("sea", "sun")])
    assert len(prepared) == 1


def test_nothing_is_counted(encoder: FastEncoder) -> None:
    assert encoder.warmup().stats == EncoderStats()


def test_what_runs_in_sentence_transformers_is_left_alone(launches: Any) -> None:
    with pytest.warns(UserWarning, match="unaccelerated"):
        encoder = FastEncoder(make_xlnet())
    encoder.warmup()
    assert not launches() and encoder.stats == EncoderStats()


def test_weights_that_no_call_would_take() -> None:
    encoder = FastEncoder(make_sentence_transformer())
    encoder[0].auto_model.encoder.layer[0].output.dense.weight.data[:] = np.nan
    with pytest.raises(InvalidWeightsError):
        encoder.warmup()
