"""Multi-vector encoders and rerankers that generate, accelerated: the same results."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.multi_vector_encoder.modules import (
    HierarchicalTokenPooling,
    MultiVectorMask,
)

import families
from checks import assert_same_vectors
from sbert_fast import accelerate, counts

TEXTS = families.make_texts(12)


def _transformer(name: str, head: str | None = None, **arguments: Any) -> Transformer:
    with tempfile.TemporaryDirectory() as folder:
        families.save_model(name, folder, head=head)
        return Transformer(folder, **arguments)


def _multi_vector(name: str, *modules: Any, **arguments: Any) -> MultiVectorEncoder:
    torch.manual_seed(0)
    names = {"module_input_name": "token_embeddings"}
    dense = Dense(64, 32, bias=False, activation_function=torch.nn.Identity(), **names)
    row = [_transformer(name, **arguments), dense, MultiVectorMask(["."]), Normalize(**names)]
    return MultiVectorEncoder(modules=[*row, *modules], device="cpu").eval()


def _assert_same_tokens(ours: list[Any], theirs: list[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_vectors(mine, other)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("pools", [False, True])
def test_multi_vectors(name: str, pools: bool) -> None:
    original = _multi_vector(name, *[HierarchicalTokenPooling(2)] * pools)
    model = accelerate(copy.deepcopy(original))
    for method in ("encode_query", "encode_document"):
        _assert_same_tokens(getattr(model, method)(TEXTS), getattr(original, method)(TEXTS))
    assert counts(model) == {"packed": 2}


@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize("strategy", ["fixed", "min"])
def test_queries_that_are_expanded(attends: bool, strategy: str) -> None:
    """Positions that attention does not see are scored all the same."""
    expansion = {"strategy": strategy, "length": 40, "attend": attends, "token": "[MASK]"}
    original = _multi_vector("bert", query_expansion=expansion)
    model = accelerate(copy.deepcopy(original))
    _assert_same_tokens(model.encode_query(TEXTS), original.encode_query(TEXTS))
    reader = "MultiVectorMask, behind the model, may read padding"
    assert counts(model) == {"packed" if attends else reader: 1}
    _assert_same_tokens(model.encode_document(TEXTS), original.encode_document(TEXTS))
    assert counts(model)["packed"] == 1 + attends


def test_a_reranker_that_generates() -> None:
    """It pads on the left and scores the logits of the last token."""
    transformer = _transformer("qwen3", "AutoModelForCausalLM", transformer_task="text-generation")
    original = CrossEncoder(modules=[transformer, LogitScore(7, 9)], device="cpu")
    model = accelerate(copy.deepcopy(original))
    pairs = list(zip(TEXTS[:6], TEXTS[6:], strict=True))
    ours, theirs = model.predict(pairs), original.predict(pairs)
    assert np.abs(ours - theirs).max() < 1e-5
    assert counts(model) == {"packed": 1}
