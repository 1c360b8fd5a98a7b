"""Who reads the states of masked tokens gets those of stock; all others get zeros."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import CNN, Dense, Normalize, Pooling
from torch import nn

import families
from checks import assert_same_vectors
from patched import LENGTHS, Batch, assert_identical, assert_same_states, pair, run
from rerankers import NAMES
from sbert_fast import accelerate, counts, packed_forward

MASKED_FIRST = {"the first token of a row is masked": 1}


def _left_padded(name: str) -> Batch:
    return {key: value.flip(1) for key, value in families.make_batch(name, LENGTHS).items()}


def _without_pooler(name: str) -> tuple[Any, Any]:
    original = families.make_model(name)
    if hasattr(original, "pooler"):
        original.pooler = None
    return original, accelerate(copy.deepcopy(original))


@pytest.mark.parametrize("name", families.WITHOUT_DISTANCES)
@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_left_padding_where_nobody_reads_it(name: str, given: str) -> None:
    original, model = _without_pooler(name)
    batch = _left_padded(name)
    if given == "embeddings":
        batch["inputs_embeds"] = torch.randn(5, 64, 64, generator=torch.Generator().manual_seed(0))
        del batch["input_ids"]
    assert_same_states(run(model, batch), run(original, batch), batch["attention_mask"])
    batch["attention_mask"][1] = (torch.arange(64) % 3 == 1).long()
    assert_same_states(run(model, batch), run(original, batch), batch["attention_mask"])
    assert counts(model) == {"packed": 2}


class Head(nn.Module):
    """Somebody's own, which reads column 0 by a method of another name."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def first(self, batch: Batch) -> Any:
        return self.base(**batch).last_hidden_state[:, 0]


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_left_padding_under_a_pooler(name: str) -> None:
    original, model = pair(name)
    batch = _left_padded(name)
    assert_identical(run(model, batch), run(original, batch))
    assert counts(model) == MASKED_FIRST


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra"])
@pytest.mark.parametrize("accelerated", ["head", "base"])
def test_left_padding_under_a_head(name: str, accelerated: str) -> None:
    original = families.make_model(name, head="AutoModelForSequenceClassification")
    model = copy.deepcopy(original)
    accelerate(model if accelerated == "head" else model.base_model)
    batch = _left_padded(name)
    assert_identical(run(model, batch), run(original, batch))
    assert counts(model) == MASKED_FIRST


def test_left_padding_under_a_head_that_came_later() -> None:
    original, model = _without_pooler("distilbert")
    batch = _left_padded("distilbert")
    with torch.inference_mode():
        assert torch.equal(Head(model).first(batch), Head(original).first(batch))
    assert counts(model) == MASKED_FIRST


@pytest.mark.parametrize(
    ("name", "head", "setting"),
    [
        ("bert", "AutoModelForQuestionAnswering", {}),
        ("distilbert", "AutoModelForQuestionAnswering", {}),
        ("electra", "AutoModelForMultipleChoice", {"summary_type": "mean"}),
        ("electra", "AutoModelForMultipleChoice", {"summary_type": "last"}),
    ],
)
def test_heads_that_read_padding(name: str, head: str, setting: dict[str, str]) -> None:
    original = families.make_model(name, head=head, **setting)
    model = accelerate(copy.deepcopy(original))
    batch = families.make_batch(name, LENGTHS)
    if "Choice" in head:
        batch = {key: value[None] for key, value in batch.items()}
    ours, theirs = run(model, batch), run(original, batch)
    for mine, other in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        assert torch.equal(mine, other)
    assert counts(model) == {f"{type(model).__name__}, behind the model, may read padding": 1}


HEADS = """
MaskedLM MultipleChoice NextSentencePrediction QuestionAnswering SequenceClassification
TokenClassification""".split()


@pytest.mark.parametrize("padding", ["auto", "zeros", "stock"])
@pytest.mark.parametrize("head", HEADS)
def test_what_runs_by_head(head: str, padding: Any) -> None:
    model = accelerate(families.make_model("bert", head=f"AutoModelFor{head}"), padding=padding)
    batch = families.make_batch("bert", LENGTHS)
    if head == "MultipleChoice":
        batch = {key: value[None] for key, value in batch.items()}
    run(model, batch)
    runs_packed = padding == "zeros" or (padding == "auto" and head != "QuestionAnswering")
    assert counts(model).get("packed", 0) == runs_packed


@pytest.mark.parametrize("reader", ["electra", "qwen3", "CNN"])
def test_zeros_are_for_answers_alone(reader: str) -> None:
    """Nobody could mask what these make of the states of padding."""
    batch = families.make_batch("bert", LENGTHS)
    if reader == "CNN":
        model: Any = accelerate(_with_reader(reader), padding="zeros")
        _embed(model)
    elif reader == "electra":
        head = {"head": "AutoModelForMultipleChoice", "summary_type": "mean"}
        model = accelerate(families.make_model("electra", **head), padding="zeros")
        run(model, {key: value[None] for key, value in batch.items()})
    else:
        head = {"head": "AutoModelForSequenceClassification", "pad_token_id": 4}
        model = accelerate(families.make_model("qwen3", **head), padding="zeros")
        run(model, batch)
    assert "packed" not in counts(model)


LAST: dict[str, tuple[dict[str, Any], bool]] = {
    "right": ({}, True),
    "left": ({}, True),
    "embeddings": ({}, False),
    "other padding": ({"pad_token_id": 4}, False),
}


@pytest.mark.parametrize("case", LAST)
@pytest.mark.parametrize("name", NAMES)
def test_heads_that_read_the_last_token(name: str, case: str) -> None:
    """They look for it among the ids, and know no other padding than that of the config."""
    settings, runs_packed = LAST[case]
    original = families.make_model(name, head="AutoModelForSequenceClassification", **settings)
    model = accelerate(copy.deepcopy(original))
    batch = _left_padded(name) if case == "left" else families.make_batch(name, LENGTHS)
    if case == "embeddings":
        ids = batch.pop("input_ids")
        batch["inputs_embeds"] = original.get_input_embeddings()(ids).detach()
    ours, theirs = run(model, batch).logits, run(original, batch).logits
    reader = f"{type(model).__name__}, behind the model, may read padding"
    assert counts(model) == {"packed" if runs_packed else reader: 1}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * runs_packed)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_padding_as_in_stock(name: str) -> None:
    original = families.make_model(name)
    model = accelerate(copy.deepcopy(original), padding="stock")
    batch = families.make_batch(name, LENGTHS)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_identical(run(twin, batch), run(original, batch))
        assert counts(twin) == {"padding, whose states were asked for": 1}
    full = families.make_batch(name, [9, 9])
    assert_same_states(run(model, full), run(original, full), full["attention_mask"])
    run(accelerate(model), batch)
    assert counts(model)["packed"] == 2


def test_padding_is_one_of_two() -> None:
    model = families.make_model("bert")
    with pytest.raises(ValueError, match="^padding must be 'auto', 'zeros' or 'stock', got"):
        accelerate(model, padding="zero")
    assert "forward" not in model.__dict__


class Window(nn.Module):
    """Somebody's own module of a SentenceTransformer: every token and the one behind it."""

    def forward(self, features: Batch) -> Batch:
        states = features["token_embeddings"]
        features["token_embeddings"] = states + states.roll(-1, dims=1)
        return features


class OwnPooling(Pooling):
    """A plain mean over all columns."""

    def forward(self, features: Batch, **kwargs: Any) -> Batch:
        features["sentence_embedding"] = features["token_embeddings"].mean(dim=1)
        return features


READERS: dict[str, Callable[[], nn.Module]] = {
    "CNN": lambda: CNN(64, out_channels=32, kernel_sizes=[1, 3]),
    "Window": Window,
    "OwnPooling": lambda: OwnPooling(64),
}


def _embed(model: SentenceTransformer) -> Any:
    return model.encode(families.make_texts(8), convert_to_tensor=True)


def _with_reader(reader: str) -> SentenceTransformer:
    torch.manual_seed(0)
    modules = [families.make_sentence_transformer("bert")[0], READERS[reader]()]
    if reader != "OwnPooling":
        modules.append(Pooling(96 if reader == "CNN" else 64))
    return SentenceTransformer(modules=modules, device="cpu").eval()


@pytest.mark.parametrize("reader", READERS)
def test_a_module_that_reads_padding_gets_the_states_of_stock(reader: str) -> None:
    original = _with_reader(reader)
    expected, model = _embed(original), accelerate(copy.deepcopy(original))
    for twin in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        SentenceTransformer(modules=list(model), device="cpu"),
    ):
        assert torch.equal(_embed(twin), expected)
    assert counts(model) == {f"{reader}, behind the model, may read padding": 2}
    same = model.encode(["one text"] * 3, convert_to_tensor=True)
    assert_same_vectors(same, original.encode(["one text"] * 3, convert_to_tensor=True))
    assert counts(model)["packed"] == 1


def test_a_module_that_is_appended_later() -> None:
    original, model = (families.make_sentence_transformer("bert") for _ in range(2))
    accelerate(model)
    for m in (original, model):
        del m[2], m[1]
        m.append(Window())
        m.append(Pooling(64))
    assert torch.equal(_embed(model), _embed(original))
    model[1].forward = model[1].forward
    assert torch.equal(_embed(model), _embed(original))
    assert counts(model) == {"Window, behind the model, may read padding": 2}


def test_modules_that_read_no_padding_run_packed() -> None:
    original = families.make_sentence_transformer("bert", normalize=False)
    torch.manual_seed(0)
    original.insert(1, Dense(64, 64, module_input_name="token_embeddings"))
    original.append(Normalize())
    model = accelerate(copy.deepcopy(original))
    assert_same_vectors(_embed(model), _embed(original))
    assert counts(model) == {"packed": 1}


def test_gradients_are_told_of_once_a_class(caplog: pytest.LogCaptureFixture) -> None:
    packed_forward._warn_about_gradients.cache_clear()
    batch = families.make_batch("bert", LENGTHS)
    with caplog.at_level(logging.WARNING, logger="sbert_fast"):
        for name in ("bert", "bert", "distilbert"):
            model = accelerate(families.make_model(name), dtype="bfloat16")
            for twin in (model, copy.deepcopy(model)):
                twin(**batch)
                assert [*counts(twin)] == [
                    "gradients are recorded: not in another dtype than that of the weights, "
                    "torch.float32"
                ]
    told = [record.getMessage().split()[0] for record in caplog.records]
    assert told == ["BertModel", "DistilBertModel"]
