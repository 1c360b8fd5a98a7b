"""The input contract: what is a text, what is refused and how, and results that are not finite."""

from __future__ import annotations

import pickle
from collections import UserString
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sentence_transformers import SentenceTransformer

from checks import assert_same_result, assert_same_vectors
from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder, tokenization
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import InputError, NonFiniteEmbeddingError
from sbert_fast.packing import PackedBatch

TEXTS = make_texts(12)
Launches = Callable[[], dict[tuple[str, str], int]]


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


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_container(
    encoder: FastEncoder, st: SentenceTransformer, container: Callable[[list[str]], Any]
) -> None:
    assert_same_result(encoder.encode(container(TEXTS)), st.encode(TEXTS))


@pytest.mark.parametrize(
    "empty", [[], (), iter([]), np.array([], dtype="U1"), pd.Series([], dtype=str)]
)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}, {"output_value": None}],
)
def test_no_text(
    encoder: FastEncoder, st: SentenceTransformer, empty: Any, arguments: dict[str, Any]
) -> None:
    assert_same_result(encoder.encode(empty, **arguments), st.encode([], **arguments))


# Inputs that are not texts

BAD_ELEMENTS: dict[str, Any] = {
    "None": None,
    "int": 3,
    "float": float("nan"),
    "bytes": b"bytes",
    "list": ["nested"],
    "tuple": ("a", "b", "c"),
    "dict": {"a": "text"},
    "array": np.array(["a"]),
    "tensor": torch.zeros(3),
    "bool": True,
    "pandas NA": pd.NA,
    "wrapped string": UserString("a"),
}


@pytest.mark.parametrize("element", BAD_ELEMENTS.values(), ids=BAD_ELEMENTS)
@pytest.mark.parametrize("index", [0, 7, len(TEXTS)])
def test_element_that_is_no_text(
    encoder: FastEncoder, element: Any, index: int, launches: Launches
) -> None:
    texts = [*TEXTS[:index], element, *TEXTS[index:]]
    kind = type(element).__name__
    for container in (list, tuple, iter):
        with pytest.raises(InputError, match=rf" inputs\[{index}\] must be a str, got {kind}"):
            encoder.encode(container(texts))
    assert launches() == {}
    assert encoder.stats.texts == 0
    assert encoder.stats.fallbacks == {}
    assert issubclass(InputError, TypeError) and issubclass(InputError, ValueError)


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        (None, "NoneType"),
        (3, "int"),
        (b"bytes", "bytes"),
        (bytearray(b"bytes"), "bytearray"),
        (torch.zeros(3), "Tensor"),
        (np.array("no dimension"), "ndarray"),
        (object(), "object"),
    ],
)
def test_inputs_that_are_no_texts(
    encoder: FastEncoder, inputs: Any, kind: str, launches: Launches
) -> None:
    message = f" inputs must be a str or an iterable of str, got {kind}$"
    with pytest.raises(InputError, match=message):
        encoder.encode(inputs)
    assert launches() == {}


@pytest.mark.parametrize("inputs", [np.array([b"a"]), np.array([["a"]]), np.array([1.5])])
def test_arrays_that_hold_no_texts(encoder: FastEncoder, inputs: Any, launches: Launches) -> None:
    with pytest.raises(InputError, match=r" inputs\[0\] must be a str"):
        encoder.encode(inputs)
    assert launches() == {}


def test_missing_inputs(encoder: FastEncoder) -> None:
    with pytest.raises(TypeError, match="inputs"):
        encoder.encode()


@pytest.mark.parametrize("surrogate", ["\ud800", "\udfff", "\udc00\ud800"])
def test_lone_surrogate(encoder: FastEncoder, surrogate: str, launches: Launches) -> None:
    with pytest.raises(InputError, match=r"^inputs\[5\] .* lone surrogate .* at character 4$"):
        encoder.encode([*TEXTS[:5], "text" + surrogate, *TEXTS])
    with pytest.raises(InputError, match=r"^inputs\[0\] "):
        encoder.encode(surrogate)
    assert launches() == {}


def test_error_comes_before_any_text_of_a_generator_is_computed(
    encoder: FastEncoder, launches: Launches
) -> None:
    def texts() -> Iterator[Any]:
        yield from make_texts(1000)
        yield 5

    with pytest.raises(InputError, match=r" inputs\[1000\] "):
        encoder.encode(texts(), batch_size=1)
    assert launches() == {}


# Texts at the edges

EDGES: dict[str, str] = {
    "empty": "",
    "spaces": "  \n\t ",
    "no-break space": "\u00a0",
    "zero width": "\u200b\u200d\ufeff",
    "NUL": "sea\x00sun",
    "only NUL": "\x00",
    "control": "\x01\x02\x7f\x80\x9f",
    "right to left": "\u202esea\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "combining": "e\u0301 a\u0308\u0323 \u0301",
    "emoji": "\U0001f469\U0001f3fd\u200d\U0001f680 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "highest": "\U0010ffff",
    "not a character": "\uffff\ufffe",
    "Chinese": "\u4e2d\u6587\u6587\u672c",
    "special tokens": "[CLS] sea [SEP] sun [MASK] [PAD] [UNK]",
    "long word": "a" * 150,
    "line ends": "sea\r\nsun\u2028moon\x85star",
}


@pytest.mark.parametrize("text", EDGES.values(), ids=EDGES)
def test_edge(encoder: FastEncoder, st: SentenceTransformer, text: str) -> None:
    assert_same_result(encoder.encode(text), st.encode(text))
    assert_same_result(encoder.encode([*TEXTS, text]), st.encode([*TEXTS, text]))
    assert encoder.stats.fallbacks == {}


def test_empty_text_is_the_special_tokens_alone(encoder: FastEncoder) -> None:
    assert len(encoder.encode("", output_value="token_embeddings")) == 2
    assert np.abs(encoder.encode("")).max() > 0
    assert_same_vectors(encoder.encode(" \n"), encoder.encode(""))


MEGABYTE = 1_000_000
HUGE: dict[str, str] = {
    "dots": "." * MEGABYTE,
    "one letter": "a" * MEGABYTE,
    "one space": " " * MEGABYTE,
    "spaces, then words": " " * MEGABYTE + "the sea and the sun",
    "NULs, then words": "\x00" * MEGABYTE + "the sea and the sun",
    "one long word, then words": "a" * MEGABYTE + " the sea and the sun",
    "combining marks": "e" + "\u0301" * 100_000,
    "combining marks, then words": "e" + "\u0301" * 100_000 + " the sea and the sun",
    "emoji": "\U0001f600" * 100_000,
    "words": "the sea and the sun " * 50_000,
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_huge_text(encoder: FastEncoder, st: SentenceTransformer, text: str) -> None:
    ours = encoder.encode([TEXTS[0], text])
    # sentence-transformers tokenises all of it; the vectors must not tell.
    assert_same_vectors(ours, st.encode([TEXTS[0], text]))
    assert encoder.stats.tokens <= 2 * encoder.max_seq_length


def test_huge_text_does_not_reach_the_tokenizer(
    encoder: FastEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes hostile text expensive is tokenising what is then cut off."""
    seen: list[int] = []
    tokenize = tokenization.tokenize

    def record(encode: Any, texts: list[str]) -> Any:
        seen.extend(map(len, texts))
        return tokenize(encode, texts)

    monkeypatch.setattr(tokenization, "tokenize", record)
    encoder.encode(["." * MEGABYTE, "the sea and the sun " * 50_000])
    assert max(seen) <= 64 * encoder.max_seq_length
    assert encoder.stats.truncated == 2


# Results that are not finite


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch, st: SentenceTransformer) -> str:
    """A word whose hidden state the engine turns into NaN."""
    word = "river"
    token = st.tokenizer.convert_tokens_to_ids(word)
    forward = PackedEncoder.__call__

    def poisoned(self: PackedEncoder, batch: PackedBatch, *args: Any) -> torch.Tensor:
        x = forward(self, batch, *args).clone()
        x[batch.input_ids == token] = float("nan")
        return x

    monkeypatch.setattr(PackedEncoder, "__call__", poisoned)
    return word


@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings", None])
def test_non_finite_result_names_the_texts(
    encoder: FastEncoder, poison: str, output_value: str | None
) -> None:
    clean = [text for text in make_texts(60) if poison not in text]
    texts = [*clean[:3], f"a {poison}", *clean[3:20], f"{poison} and sea", *clean[20:]]
    with pytest.raises(NonFiniteEmbeddingError, match=r"inputs\[3, 21\]") as caught:
        encoder.encode(texts, output_value=output_value)
    assert caught.value.indices == [3, 21]
    assert "2 embeddings hold NaN or infinity" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(NonFiniteEmbeddingError) as caught:
        encoder.encode(f"the {poison}", output_value=output_value)
    assert caught.value.indices == [0]
    assert len(encoder.encode(clean, output_value=output_value)) == len(clean)


def test_non_finite_result_in_a_later_batch(encoder: FastEncoder, poison: str) -> None:
    texts = [*(text for text in TEXTS if poison not in text), poison]
    with pytest.raises(NonFiniteEmbeddingError) as caught:
        encoder.encode(texts, batch_size=1)
    assert caught.value.indices == [len(texts) - 1]


def test_overflow_is_not_returned() -> None:
    st = make_sentence_transformer()
    with torch.no_grad():
        st[0].auto_model.encoder.layer[-1].output.LayerNorm.weight.fill_(3e38)
    assert not np.isfinite(st.encode(TEXTS)).all()
    with pytest.raises(NonFiniteEmbeddingError, match="computed in torch.float32") as caught:
        FastEncoder(st).encode(TEXTS)
    assert caught.value.indices == list(range(len(TEXTS)))


def test_error_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteEmbeddingError("not finite", [3, 21])))
    assert str(error) == "not finite"
    assert error.indices == [3, 21]
    assert str(pickle.loads(pickle.dumps(InputError("inputs[3] must be")))) == "inputs[3] must be"


def test_tables_and_sets_are_no_list_of_texts(encoder: FastEncoder) -> None:
    with pytest.raises(InputError, match="inputs must have one dimension, got DataFrame: take"):
        encoder.encode(pd.DataFrame({"text": ["a", "b"]}))
    with pytest.raises(InputError, match="an iterable of str, got set"):
        encoder.encode({"a", "b"})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(3, "got int"), (["a"], "got list"), ("\ud800", "got a lone surrogate")],
)
def test_prompts_are_checked(encoder: FastEncoder, prompt: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"prompt\[0\] must be .*{message}"):
        encoder.encode(["a"], prompt=prompt)


@pytest.mark.parametrize("number", [10**5000, -(10**5000)], ids=["positive", "negative"])
def test_a_number_too_long_to_be_written_out(encoder: FastEncoder, number: int) -> None:
    with pytest.raises(InputError, match=r" inputs\[1\] must be a str, got int \(a huge int\)$"):
        encoder.encode(["a", number])
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got a huge int$"):
        encoder.encode(["a"], batch_size=-abs(number))
    with pytest.raises(InputError, match=r" inputs\[0\] must be a str, got int \(1{77}\.\.\.\)$"):
        encoder.encode([int("1" * 3000)])


def test_inputs_and_its_former_name_exclude_each_other(encoder: FastEncoder) -> None:
    with pytest.raises(TypeError, match="got both"):
        encoder.encode(["a"], sentences=["b"])
