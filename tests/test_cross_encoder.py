"""FastCrossEncoder: the scores of CrossEncoder, packed."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from torch import nn

from checks import assert_same_scores
from families import FAMILIES, make_cross_encoder, make_texts
from rerankers import NAMES, assert_runs_in_stock, make_reranker
from sbert_fast import FastCrossEncoder, explain
from sbert_fast.errors import InputError, NonFiniteEmbeddingError
from sbert_fast.sentence_transformers.stock import as_stock
from sbert_fast.testing import assert_close_to_oracle

TEXTS = [*make_texts(40, max_words=50), "", "a"]
PAIRS = [(TEXTS[i % 5], text) for i, text in enumerate(TEXTS)]
Launches = Callable[[], dict[tuple[str, str], int]]


@pytest.fixture(scope="module")
def stock() -> CrossEncoder:
    return make_cross_encoder()


@pytest.fixture
def model(stock: CrossEncoder) -> FastCrossEncoder:
    return FastCrossEncoder(stock)


def test_signatures_are_those_of_sentence_transformers() -> None:
    for name in ("predict", "rank"):
        ours, theirs = (
            inspect.signature(getattr(cls, name)) for cls in (FastCrossEncoder, CrossEncoder)
        )
        assert list(ours.parameters) == list(theirs.parameters)
        assert [p.default for p in ours.parameters.values()] == [
            p.default for p in theirs.parameters.values()
        ]


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores(family: str, labels: int, launches: Launches) -> None:
    stock = make_cross_encoder(family, num_labels=labels)
    model = FastCrossEncoder(stock)
    assert model.unsupported_reason is None
    expected = stock.predict(PAIRS)
    launches()
    scores = model.predict(PAIRS)
    assert "varlen_attention" in {op for op, _ in launches()}
    if labels == 1:
        assert_same_scores(scores, expected)
    else:
        # Logits of any size, which stock itself may round by more than 1e-5.
        exact = copy.deepcopy(stock).double().predict(PAIRS)
        assert_close_to_oracle(*map(torch.from_numpy, (scores, exact, expected)), torch.float32)
    assert np.array_equal(np.argsort(scores.ravel()), np.argsort(expected.ravel()))
    assert not model.stats.fallbacks


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", *NAMES])
def test_bfloat16_loses_no_more_than_twice_what_stock_loses(name: str) -> None:
    stock = (make_reranker if name in NAMES else make_cross_encoder)(name)
    exact = stock.predict(PAIRS, activation_fn=nn.Identity())
    ours = FastCrossEncoder(stock, dtype="bfloat16").predict(PAIRS, activation_fn=nn.Identity())
    theirs = copy.deepcopy(stock).bfloat16().predict(PAIRS, activation_fn=nn.Identity())
    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max()


INPUTS: dict[str, Any] = {
    "list": PAIRS[:9],
    "lists": [list(pair) for pair in PAIRS[:9]],
    "one": PAIRS[3],
    "one list": list(PAIRS[3]),
    "array": np.array(PAIRS[:9]),
    "array of one": np.array(PAIRS[3]),
    "objects": np.array(PAIRS[:9], dtype=object),
    "none": [],
    "tuple": tuple(PAIRS[:9]),
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "prompt": {"prompt": "compare: "},
    "named prompt": {"prompt_name": "task"},
    "activation": {"activation_fn": nn.Tanh()},
    "logits": {"activation_fn": nn.Identity(), "batch_size": 2},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_inputs_and_arguments(
    stock: CrossEncoder, model: FastCrossEncoder, inputs: Any, arguments: dict[str, Any]
) -> None:
    stock.prompts = model.prompts = {"task": "rate it "}
    assert_same_scores(model.predict(inputs, **arguments), stock.predict(inputs, **arguments))
    assert not model.stats.fallbacks


def test_softmax_of_several_labels() -> None:
    stock = make_cross_encoder(num_labels=3)
    model = FastCrossEncoder(stock)
    both = (each.predict(PAIRS, apply_softmax=True) for each in (model, stock))
    assert_same_scores(*both)
    with pytest.raises(ValueError, match="only works for models with num_labels=1"):
        model.rank("a", ["b"])


every_kind = pytest.mark.parametrize("make", [make_cross_encoder, make_reranker])


@every_kind
def test_rank(make: Callable[[], CrossEncoder]) -> None:
    stock = make()
    model = FastCrossEncoder(stock)
    asked: dict[str, Any] = {"top_k": 7, "return_documents": True}
    ours, theirs = (m.rank(TEXTS[0], TEXTS[1:], **asked) for m in (model, stock))
    assert [each["corpus_id"] for each in ours] == [each["corpus_id"] for each in theirs]
    assert [each["text"] for each in ours] == [each["text"] for each in theirs]
    scores = [[each["score"] for each in found] for found in (ours, theirs)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    assert not model.stats.fallbacks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_a_score_depends_on_its_own_pair_alone(family: str, dtype: str) -> None:
    model = FastCrossEncoder(make_cross_encoder(family), dtype=dtype)
    together = model.predict(PAIRS)
    for index in range(0, len(PAIRS), 5):
        assert model.predict(PAIRS[index]) == together[index]
    assert np.array_equal(model.predict(PAIRS[::-1])[::-1], together)


@every_kind
def test_the_last_layer_computes_what_the_head_reads(
    make: Callable[[], CrossEncoder], feed_forward_rows: list[int]
) -> None:
    model = FastCrossEncoder(make())
    model.predict(PAIRS[:20])
    rows, layers = feed_forward_rows, model.config.num_hidden_layers
    assert rows[layers - 1 :: layers] == [32]
    assert all(count > 200 for count in rows[::layers])


def test_mean_of_all_states() -> None:
    stock = make_cross_encoder("modernbert")
    stock.config.classifier_pooling = "mean"
    model = FastCrossEncoder(stock)
    assert_same_scores(model.predict(PAIRS), stock.predict(PAIRS))
    assert not model.stats.fallbacks


# What runs in sentence-transformers


def _hook(model: CrossEncoder) -> None:
    model[0].auto_model.classifier.register_forward_hook(lambda *_: None)


def _other_classifier(model: CrossEncoder) -> None:
    model[0].auto_model.classifier = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 1))


def _forward(model: CrossEncoder) -> None:
    forward = model[0].auto_model.forward
    model[0].auto_model.forward = lambda **inputs: forward(**inputs)


def _module_behind(model: CrossEncoder) -> None:
    model.append(nn.Identity())


class MeanPooler(nn.Module):
    """A user's own: it reads every state."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.mean(dim=1)


def _other_pooler(model: CrossEncoder) -> None:
    model[0].auto_model.bert.pooler = MeanPooler()


@pytest.mark.parametrize(
    "change", [_hook, _other_classifier, _forward, _module_behind, _other_pooler]
)
def test_changed_models_run_in_sentence_transformers(change: Callable[[Any], None]) -> None:
    assert_runs_in_stock(FastCrossEncoder(make_cross_encoder()), change, PAIRS)


def _tuples(model: CrossEncoder) -> None:
    model[0].auto_model.config.return_dict = False


def _dropout_in_training(model: CrossEncoder) -> None:
    model[0].auto_model.dropout.train()


def _head_in_training(model: CrossEncoder) -> None:
    model.train()


@pytest.mark.parametrize("change", [_tuples, _dropout_in_training, _head_in_training])
def test_what_changes_no_score(change: Callable[[Any], None], launches: Launches) -> None:
    model = FastCrossEncoder(make_cross_encoder())
    expected = model.predict(PAIRS)
    change(model)
    launches()
    assert_same_scores(model.predict(PAIRS), expected)
    assert not model.training


def test_the_mean_of_all_states_after_loading() -> None:
    model = FastCrossEncoder(make_cross_encoder("modernbert"))
    model.predict(PAIRS)
    model.config.classifier_pooling = "mean"
    assert_same_scores(model.predict(PAIRS), as_stock(model).predict(PAIRS))


@pytest.mark.parametrize("inputs", ["a text", ["a", "b"], [["a"], ["b"]]], ids=str)
def test_other_inputs_run_in_sentence_transformers(
    stock: CrossEncoder, model: FastCrossEncoder, inputs: Any
) -> None:
    try:
        expected = stock.predict(inputs)
    except Exception as error:
        with pytest.raises(type(error)):
            model.predict(inputs)
    else:
        counted = sum(model.stats.fallbacks.values())
        scores = model.predict(inputs)
        if sum(model.stats.fallbacks.values()) > counted:
            assert np.array_equal(scores, expected)
        else:  # Two texts are one pair for some versions, which runs packed.
            assert np.shape(inputs) == (2,)
            assert_same_scores(*map(np.atleast_1d, (scores, expected)))


@pytest.mark.parametrize("inputs", [[], PAIRS[0], PAIRS[:3]], ids=["none", "one", "some"])
@pytest.mark.parametrize("arguments", list(ARGUMENTS.values())[:3], ids=list(ARGUMENTS)[:3])
def test_results_of_sentence_transformers(inputs: Any, arguments: dict[str, Any]) -> None:
    model = FastCrossEncoder(make_cross_encoder())
    _hook(model)
    expected = as_stock(model).predict(inputs, **arguments)
    assert_same_scores(model.predict(inputs, **arguments), expected)
    assert sum(model.stats.fallbacks.values()) == 1


def test_written_weights_are_seen(stock: CrossEncoder) -> None:
    own = copy.deepcopy(stock)
    model = FastCrossEncoder(own)
    before = model.predict(PAIRS)
    own[0].auto_model.classifier.bias.data += 0.5
    own[0].auto_model.bert.encoder.layer[0].output.dense.weight.data *= 1.5
    assert_same_scores(model.predict(PAIRS), own.predict(PAIRS))
    assert np.abs(model.predict(PAIRS) - before).max() > 1e-3


REFUSED: dict[str, tuple[Any, str]] = {
    "no pair": ([("a", "b"), 5], r"inputs\[1\] must be a pair of texts, got int"),
    "three": ([("a", "b", "c"), ("a", "b")], r"inputs\[0\] must be a pair of texts, got 3 elem"),
    "None": ([("a", "b"), ("a", None)], r"inputs\[1\]\[1\] must be a str, got NoneType"),
    "surrogate": ([("a", "b\ud800")], r"inputs\[0\]\[1\] must be valid Unicode"),
}


@pytest.mark.parametrize(("inputs", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_inputs(model: FastCrossEncoder, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.predict(inputs)


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"device": "nowhere"}, {"pool": {}, "chunk_size": 0}], ids=str
)
def test_refused_arguments_name_themselves(
    model: FastCrossEncoder, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        model.predict(PAIRS, **arguments)


def test_scores_that_are_not_finite_are_refused(stock: CrossEncoder) -> None:
    own = copy.deepcopy(stock)
    own[0].auto_model.classifier.bias.data[:] = float("nan")
    with pytest.raises(NonFiniteEmbeddingError, match="for inputs"):
        FastCrossEncoder(own).predict(PAIRS[:3])


# Copies, files, workers


def _saved(model: FastCrossEncoder, path: Path) -> FastCrossEncoder:
    model.save_pretrained(str(path))
    assert "FastCrossEncoder" not in (path / "README.md").read_text()
    return FastCrossEncoder(str(path), device="cpu")


COPIES: dict[str, Callable[[FastCrossEncoder, Path], FastCrossEncoder]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "saved": _saved,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies(
    model: FastCrossEncoder, make: Callable[[Any, Path], FastCrossEncoder], tmp_path: Path
) -> None:
    model.activation_fn = nn.Tanh()
    made = make(model, tmp_path)
    assert np.array_equal(made.predict(PAIRS), model.predict(PAIRS))
    assert made.unsupported_reason is None and type(made.activation_fn) is nn.Tanh


def test_worker_processes(model: FastCrossEncoder) -> None:
    expected = model.predict(PAIRS)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        scores = model.predict(PAIRS, pool=pool, chunk_size=7)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_explain(model: FastCrossEncoder) -> None:
    model.predict(PAIRS)
    told = explain(model)
    assert "predict: packed, float32 on cpu" in told and f"so far: {len(PAIRS)} texts" in told


def test_friends_recognise_the_type(model: FastCrossEncoder) -> None:
    assert "sentence_transformers" in str(type(model)) and isinstance(model, CrossEncoder)
