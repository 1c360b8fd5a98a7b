"""FastCrossEncoder of rerankers that generate: the scores of CrossEncoder, packed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from checks import assert_same_scores
from families import make_texts
from rerankers import CHAT_TEMPLATE, NAMES, PROCESSING, make_reranker
from sbert_fast import FastCrossEncoder

TEXTS = [*make_texts(30, max_words=10), "", "a", "the sea [SEP] is old"]
PAIRS = [(TEXTS[i % 5], text) for i, text in enumerate(TEXTS)]
LONG = make_texts(20, max_words=60, seed=1)
LONG_PAIRS = [(LONG[0], text) for text in LONG]
# A newer chat template finds the text of a message in a list.
STRUCTURED = CHAT_TEMPLATE.replace("m.content", "m.content[0].text")
Launches = Callable[[], dict[tuple[str, str], int]]

WAYS: dict[str, dict[str, Any]] = {
    "as pairs": {"template": None},
    "formatted": {},
    "structured": {"template": STRUCTURED},
    "asked": {"processing": PROCESSING},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_scores(name: str, way: dict[str, Any], launches: Launches) -> None:
    stock = make_reranker(name, **way)
    model = FastCrossEncoder(stock)
    assert model.unsupported_reason is None
    expected = stock.predict(PAIRS)
    launches()
    for _ in range(2):
        scores = model.predict(PAIRS)
        assert "varlen_attention" in {op for op, _ in launches()}
        assert_same_scores(scores, expected)
        assert np.array_equal(np.argsort(scores), np.argsort(expected))
    assert expected.std() > 0.01 and not model.stats.fallbacks


@pytest.mark.parametrize("tokens", [(57, None), (-1, 83)], ids=str)
def test_tokens_of_the_score(tokens: tuple[int, int | None]) -> None:
    stock = make_reranker(tokens=tokens)
    model = FastCrossEncoder(stock)
    assert_same_scores(model.predict(PAIRS), stock.predict(PAIRS))
    assert not model.stats.fallbacks


def test_a_bias_of_the_head() -> None:
    stock = make_reranker()
    stock[0].model.lm_head.bias = nn.Parameter(torch.randn(len(stock.tokenizer)))
    model = FastCrossEncoder(stock)
    assert_same_scores(model.predict(PAIRS), stock.predict(PAIRS))
    assert not model.stats.fallbacks


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "arguments", [{"prompt": "compare the "}, {"prompt_name": "task"}], ids=str
)
def test_prompts(way: dict[str, Any], arguments: dict[str, Any]) -> None:
    stock = make_reranker(**way)
    model = FastCrossEncoder(stock)
    stock.prompts = model.prompts = {"task": "rate it "}
    scores = model.predict(PAIRS, **arguments)
    assert_same_scores(scores, stock.predict(PAIRS, **arguments))
    assert np.abs(scores - model.predict(PAIRS)).max() > 1e-3
    assert not model.stats.fallbacks


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.parametrize("limit", [5, 21, 64])
def test_pairs_that_are_cut(limit: int, restored: bool, side: str) -> None:
    """sentence-transformers puts back what the template ends with."""
    processing = {"chat_template": {"add_generation_prompt": True, "restore_suffix": restored}}
    stock = make_reranker(processing=processing)
    stock.max_seq_length, stock.tokenizer.truncation_side = limit, side
    model = FastCrossEncoder(stock)
    assert_same_scores(model.predict(LONG_PAIRS), stock.predict(LONG_PAIRS))
    lengths = model.packed_pipeline.tokenizer(LONG_PAIRS).lengths
    assert lengths.max() == limit
    assert model.stats.truncated == (lengths == limit).sum() and not model.stats.fallbacks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_score_depends_on_its_own_pair_alone(way: dict[str, Any], dtype: str) -> None:
    model = FastCrossEncoder(make_reranker(**way), dtype=dtype)
    together = model.predict(PAIRS)
    for index in range(0, len(PAIRS), 5):
        assert model.predict(PAIRS[index]) == together[index]
    assert np.array_equal(model.predict(PAIRS[::-1])[::-1], together)


def test_any_to_any() -> None:
    stock = make_reranker()
    stock[0].transformer_task = "any-to-any"
    model = FastCrossEncoder(stock)
    assert_same_scores(model.predict(PAIRS), stock.predict(PAIRS))
    assert not model.stats.fallbacks


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(make: Callable[[Any], Any]) -> None:
    model = FastCrossEncoder(make_reranker(processing=PROCESSING))
    made = make(model)
    assert np.array_equal(made.predict(PAIRS), model.predict(PAIRS))
    assert made.unsupported_reason is None
