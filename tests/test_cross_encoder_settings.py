"""FastCrossEncoder under settings that change what sentence-transformers makes of logits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from checks import assert_same_scores
from families import make_cross_encoder, make_texts, make_tokenizer, save_model
from rerankers import NAMES, assert_runs_in_stock
from sbert_fast import FastCrossEncoder
from sbert_fast.errors import InputError
from sbert_fast.sentence_transformers.stock import as_stock

TEXTS = [*make_texts(40, max_words=50), "", "a"]
PAIRS = [(TEXTS[i % 5], text) for i, text in enumerate(TEXTS)]
ZERO_MEAN: Callable[[Tensor], Tensor] = lambda scores: scores - scores.mean(dim=0)  # noqa: E731


# Activations

ACROSS_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": nn.Softmax(dim=0),
    "function": ZERO_MEAN,
    "hooked": nn.Sigmoid(),
}
ACROSS_ROWS["hooked"].register_forward_hook(lambda _, __, scores: ZERO_MEAN(scores))


@pytest.mark.parametrize("activate", ACROSS_ROWS.values(), ids=ACROSS_ROWS)
@pytest.mark.parametrize("batch_size", [5, 64, None])
@pytest.mark.parametrize("labels", [1, 3])
def test_activations_over_a_batch(
    activate: Callable[[Tensor], Tensor], batch_size: int | None, labels: int
) -> None:
    """They see the batches of sentence-transformers, whatever is computed at once."""
    stock = make_cross_encoder(num_labels=labels)
    model = FastCrossEncoder(stock)
    how = {"activation_fn": activate} | ({} if batch_size is None else {"batch_size": batch_size})
    assert_same_scores(model.predict(PAIRS, **how), stock.predict(PAIRS, **how))
    assert_same_scores(model.predict(PAIRS[0], **how), stock.predict(PAIRS[0], **how))
    assert not model.stats.fallbacks


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("convert", [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}])
@pytest.mark.parametrize(
    "activate",
    [torch.sigmoid, F.relu, nn.Sequential(), Tensor.double, Tensor.round, lambda x: x > 0],
)
def test_activations_of_any_kind(
    activate: Callable[[Tensor], Tensor], convert: dict[str, bool], labels: int
) -> None:
    stock = make_cross_encoder(num_labels=labels)
    how: Any = {"activation_fn": activate, **convert}
    assert_same_scores(FastCrossEncoder(stock).predict(PAIRS, **how), stock.predict(PAIRS, **how))


@pytest.mark.parametrize("when", ["before", "after"])
def test_no_activation(when: str) -> None:
    stock = make_cross_encoder()
    if when == "before":
        stock.activation_fn = None
    model = FastCrossEncoder(stock)
    stock.activation_fn = model.activation_fn = None
    scores = model.predict(PAIRS)
    assert_same_scores(scores, stock.predict(PAIRS))
    assert_same_scores(scores, model.predict(PAIRS, activation_fn=nn.Identity()))


def test_an_activation_of_its_own() -> None:
    stock = make_cross_encoder()
    model = FastCrossEncoder(stock, activation_fn=nn.Tanh())
    assert_same_scores(model.predict(PAIRS), stock.predict(PAIRS, activation_fn=nn.Tanh()))


@pytest.mark.parametrize("labels", [1, 3])
def test_softmax(labels: int) -> None:
    stock = make_cross_encoder(num_labels=labels)
    both = (m.predict(PAIRS, apply_softmax=True) for m in (FastCrossEncoder(stock), stock))
    assert_same_scores(*both)


@pytest.mark.parametrize(
    "activate",
    [nn.PReLU(2), nn.Linear(2, 1), nn.Softmax(dim=3), lambda x: x[:, 5], lambda x: x[1:]],
)
def test_activations_that_do_not_fit_the_labels(activate: Callable[[Tensor], Tensor]) -> None:
    stock = make_cross_encoder(num_labels=3)
    with pytest.raises(Exception) as theirs:
        stock.predict(PAIRS[:4], activation_fn=activate)
    with pytest.raises((theirs.type, ValueError)) as ours:
        FastCrossEncoder(stock).predict(PAIRS[:4], activation_fn=activate)
    assert ours.value.__notes__ == ["activation_fn was given logits of shape [4, 3]"]


# Settings


def _labels(model: CrossEncoder) -> None:
    model.config.num_labels = 3


def _types(model: CrossEncoder) -> None:
    model[0].model_forward_params = {"input_ids", "attention_mask"}


def _no_classifier(model: CrossEncoder) -> None:
    del model[0].auto_model.classifier


def _no_weight(model: CrossEncoder) -> None:
    model[0].auto_model.classifier.weight = None


def _another_shape(model: CrossEncoder) -> None:
    model[0].auto_model.classifier.weight = nn.Parameter(torch.randn(1, 32))


def _more_labels(model: CrossEncoder) -> None:
    model[0].auto_model.classifier = nn.Linear(64, 2)


CHANGES: dict[Callable[[CrossEncoder], None], str] = {
    _labels: "classifier of {} must be Linear [3, 64] [3], got Linear [1, 64] [1]",
    _types: "Transformer.model_forward_params is",
    _no_classifier: "classifier of {} must be Linear [1, 64] [1], got nothing",
    _no_weight: "classifier of {} must be Linear [1, 64] [1], got Linear [1]",
    _another_shape: "classifier of {} must be Linear [1, 64] [1], got Linear [1, 32] [1]",
    _more_labels: "classifier of {} must be Linear [1, 64] [1], got Linear [2, 64] [2]",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_runs_in_sentence_transformers(change: Callable[[CrossEncoder], None]) -> None:
    reason = CHANGES[change].format("BertForSequenceClassification")
    assert_runs_in_stock(FastCrossEncoder(make_cross_encoder()), change, PAIRS, reason)


def test_types_that_the_model_does_not_have() -> None:
    with tempfile.TemporaryDirectory() as folder:
        head = "AutoModelForSequenceClassification"
        save_model("distilbert", folder, head=head, num_labels=1)
        make_tokenizer("bert").save_pretrained(folder)
        stock = CrossEncoder(folder, device="cpu")
    model = FastCrossEncoder(stock)
    assert_same_scores(model.predict(PAIRS), stock.predict(PAIRS))
    assert not model.stats.fallbacks


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_pairs_without_tokens_are_refused(family: str) -> None:
    stock = make_cross_encoder(family)
    stock.tokenizer.backend_tokenizer.post_processor = None
    model = FastCrossEncoder(stock)
    with pytest.raises(InputError, match=r"inputs\[2\] must have tokens, got none"):
        model.predict([*PAIRS[:2], ("", "")])
    assert_same_scores(model.predict(PAIRS[:9]), stock.predict(PAIRS[:9]))


# Heads that read the last token


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", NAMES)
def test_a_head_reads_the_last_token_that_is_not_for_padding(family: str, side: str) -> None:
    stock = make_cross_encoder(family)
    stock.tokenizer.padding_side = side
    stock.tokenizer.backend_tokenizer.post_processor = None
    model = FastCrossEncoder(stock)
    pairs = [*PAIRS[:9], ("a", "b [PAD] [PAD]"), ("[PAD] a", "[PAD]")]
    assert_same_scores(model.predict(pairs), stock.predict(pairs))
    nothing_else = ("[PAD]", "[PAD] [PAD]")
    assert_same_scores(model.predict(nothing_else), stock.predict(nothing_else))
    assert not model.stats.fallbacks


@pytest.mark.parametrize("padding_id", [None, 4])
def test_padding_that_the_head_does_not_know(padding_id: int | None) -> None:
    model = FastCrossEncoder(make_cross_encoder("qwen3"))
    model.config.pad_token_id = padding_id
    reason = f"config.pad_token_id is {padding_id}, and the tokenizer pads with 0"
    # Without a padding id, stock scores one pair at a time.
    pairs = PAIRS[: 1 if padding_id is None else 3]
    assert np.array_equal(model.predict(pairs), as_stock(model).predict(pairs))
    assert model.stats.fallbacks == {reason: 1}
