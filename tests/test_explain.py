"""explain: what runs, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import families
from patched import LENGTHS
from sbert_fast import FastEncoder, accelerate, explain, ops


def test_explain_the_installation() -> None:
    text = explain()
    assert "float32" in text
    assert "C++ ops" in text
    assert "batch planner" in text
    reason = ops.extension.CUDA.reason
    assert f"CUDA ops: {reason or ops.extension.CUDA.path}" in text


def test_explain_the_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ops.extension.Extension("_C_cuda", Path("a.so"), None, "13.0", ("8.0", "9.0a"))
    monkeypatch.setattr(ops.extension, "CUDA", library)
    assert "CUDA ops: a.so (CUDA 13.0, for 8.0, 9.0a)" in explain()


def test_explain_a_model() -> None:
    model = families.make_sentence_transformer("bert")
    assert "supported, not accelerated" in explain(model)
    accelerate(model, impl="reference")
    model.encode(["one", "two"])
    model[0].model(**families.make_batch("bert", LENGTHS))
    text = explain(model)
    assert "accelerated (bert): float32 on cpu, ops: reference (asked for by impl" in text
    assert "packed calls: 1" in text
    assert "1 x gradients are recorded" in text


def test_explain_a_fast_encoder() -> None:
    encoder = FastEncoder(families.make_sentence_transformer("bert"))
    encoder.encode(["one", "two"])
    text = explain(encoder)
    assert "encode: packed, float32 on cpu" in text
    assert "2 texts" in text
    assert "accelerate(model)" not in text


@pytest.mark.parametrize("length", [0, families.MAX_TOKENS + 1, "many"])
def test_a_max_seq_length_that_is_refused_is_told(length: object) -> None:
    encoder = FastEncoder(families.make_sentence_transformer("bert"))
    encoder.max_seq_length = length
    with pytest.raises(ValueError, match="max_seq_length must be an integer") as error:
        encoder.encode(["one"])
    assert encoder.unsupported_reason == str(error.value)
    assert f"  encode: refused: {error.value}" in explain(encoder).splitlines()


def test_weights_that_are_refused_are_told() -> None:
    encoder = FastEncoder(families.make_sentence_transformer("bert"))
    with torch.no_grad():
        encoder[0].auto_model.embeddings.LayerNorm.bias[3] = float("nan")
    encoder.refresh()
    assert encoder.unsupported_reason == "weights hold NaN or infinity: embeddings.LayerNorm.bias"
    assert f"encode: refused: {encoder.unsupported_reason}" in explain(encoder)
