"""Inputs and results of models that run in sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from checks import assert_same_result
from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder
from sbert_fast.errors import InputError, NonFiniteEmbeddingError

TEXTS = make_texts(12)


# Containers of texts


def _column(texts: list[str]) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"text": texts})["text"]


class Text(str):
    """A user's own kind of string."""


CONTAINERS: dict[str, Callable[[list[str]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "dict keys": lambda texts: dict.fromkeys(texts).keys(),
    "numpy U": np.array,
    "numpy object": lambda texts: np.array(texts, dtype=object),
    "numpy strings": lambda texts: [np.str_(text) for text in texts],
    "pandas object": lambda texts: pd.Series(texts, dtype=object),
    "pandas string": lambda texts: pd.Series(texts, dtype="string"),
    "pandas shuffled index": lambda texts: pd.Series(texts, index=range(len(texts), 0, -1)),
    "pandas Index": pd.Index,
    "datasets column": _column,
    "subclass of str": lambda texts: [Text(text) for text in texts],
}


# Models that run in sentence-transformers


@pytest.fixture
def unaccelerated() -> FastEncoder:
    st = make_sentence_transformer(prompts={"query": "find: "})
    st[0].auto_model.register_forward_hook(lambda *_: None)
    return FastEncoder(st)


@pytest.mark.parametrize("element", [None, 3, float("nan"), True, b"bytes", pd.NA, torch.zeros(3)])
def test_unaccelerated_text_models_refuse_the_same(
    unaccelerated: FastEncoder, element: Any
) -> None:
    kind = type(element).__name__
    with pytest.raises(InputError, match=rf" inputs\[2\] must be a str, got {kind}"):
        unaccelerated.encode(["a", ("a", "pair"), element])
    with pytest.raises(InputError, match=f" inputs must be .*got {kind}"):
        unaccelerated.encode(element)
    with pytest.raises(InputError, match=r"^inputs\[1\] .* lone surrogate .* at character 4$"):
        unaccelerated.encode(["a", "text\ud800"])
    with pytest.raises(InputError, match=r"^prompt\[0\] must be a str, got int"):
        unaccelerated.encode(["a"], prompt=3)
    assert unaccelerated.stats.fallbacks == {}


def test_chat_models_are_text_models(
    unaccelerated: FastEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transformer, "modalities", ["text", "message"])
    with pytest.raises(InputError, match=r" inputs\[1\] must be a str, got NoneType"):
        unaccelerated.encode(["a", None])
    monkeypatch.setattr(Transformer, "modalities", ["text", "image"])
    with pytest.raises(ValueError, match="Unsupported input type: NoneType"):
        unaccelerated.encode(["a", None])


@pytest.mark.parametrize(
    "arguments", [{"bogus": 1}, {"bogus": None}, {"prompt_name": "nowhere"}, {"batch_size": 0}]
)
def test_unaccelerated_calls_that_are_refused_are_not_counted(
    unaccelerated: FastEncoder, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments)) + "|'nowhere' not found"):
        unaccelerated.encode(TEXTS, **arguments)
    assert unaccelerated.stats.fallbacks == {}
    assert "unaccelerated" not in caplog.text


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_unaccelerated_containers(
    st: SentenceTransformer, container: Callable[[list[str]], Any]
) -> None:
    model = make_sentence_transformer()
    model[0].auto_model.register_forward_hook(lambda *_: None)
    encoder = FastEncoder(model)
    assert_same_result(encoder.encode(container(TEXTS)), st.encode(TEXTS))
    assert encoder.stats.fallbacks == {"BertModel has forward hooks": 1}


@pytest.mark.parametrize(
    "inputs",
    [{"text": "a"}, [{"text": "a"}, {"text": "b"}], [("a", "b"), ("sea", "sun")], [["a", "b"]]],
    ids=repr,
)
def test_unaccelerated_models_embed_what_sentence_transformers_does(
    st: SentenceTransformer, inputs: Any
) -> None:
    model = make_sentence_transformer()
    model[0].auto_model.register_forward_hook(lambda *_: None)
    assert_same_result(FastEncoder(model).encode(inputs), st.encode(inputs))


class Numbers(torch.nn.Module):
    """A first module of a user's own, which embeds numbers."""

    modalities = ("number",)

    def preprocess(self, inputs: list[float], **_: Any) -> dict[str, torch.Tensor]:
        return {"numbers": torch.tensor(inputs)}

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return features | {"sentence_embedding": features["numbers"][:, None].repeat(1, 4)}


@pytest.mark.parametrize("silent", [False, True])
def test_models_of_other_modalities_take_what_they_take(
    silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if silent:
        monkeypatch.delattr(Numbers, "modalities")
    with pytest.warns(UserWarning, match="the first module must be .*, got Numbers"):
        encoder = FastEncoder(modules=[Numbers()], device="cpu")
    assert encoder.encode([3.0, 4.0]).tolist() == [[3.0] * 4, [4.0] * 4]
    assert sum(encoder.stats.fallbacks.values()) == 1


def test_unaccelerated_embeddings_are_finite_too() -> None:
    st = make_sentence_transformer()
    weight = st[0].auto_model.embeddings.word_embeddings.weight
    encoder = FastEncoder(st)
    # The packed engine would not call it.
    st[0].auto_model.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(NonFiniteEmbeddingError, match=r"inputs\[0, 1\]") as error:
        encoder.encode(["a", "b"])
    assert error.value.indices == [0, 1]
