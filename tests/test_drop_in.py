"""A FastEncoder in the place of a SentenceTransformer: what it takes, says and writes."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from checks import assert_same_result
from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder
from sbert_fast.errors import InputError, NonFiniteEmbeddingError
from sbert_fast.sentence_transformers.stock import listed

TEXTS = make_texts(8)
PAIRS = list(zip(TEXTS[:4], TEXTS[4:], strict=True))


# Recognised by name


@pytest.mark.parametrize(
    "make", [FastEncoder, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_type_passes_for_that_of_a_sentence_transformer(
    encoder: FastEncoder, make: Callable[[Any], Any]
) -> None:
    made = make(encoder)
    # BERTopic and KeyBERT ask the first question.
    assert "sentence_transformers" in str(type(made))
    assert "sentence_transformers" in type(made).__module__
    assert isinstance(made, SentenceTransformer)


# What is embedded besides texts

OTHERS: dict[str, tuple[Any, str]] = {
    "lists of two": ([list(pair) for pair in PAIRS], "list"),
    "tuples of two": (PAIRS, "tuple"),
    "array of two columns": (np.array(PAIRS), "list"),
    "array of objects": (np.array(PAIRS, dtype=object), "list"),
    "one dict": ({"text": TEXTS[0]}, "dict"),
    "dicts": ([{"text": text} for text in TEXTS], "dict"),
    "dict of a pair": ([{"text": PAIRS[0]}], "dict"),
    "dict of a numpy str": ([{"text": np.str_(TEXTS[0])}], "dict"),
    "texts, then a pair": ([*TEXTS, PAIRS[0]], "tuple"),
    "all of them": ([PAIRS[0], TEXTS[0], list(PAIRS[1]), {"text": TEXTS[1]}], "tuple"),
}


@pytest.mark.parametrize(("inputs", "kind"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"convert_to_tensor": True, "normalize_embeddings": True, "truncate_dim": 20},
        {"prompt_name": "query", "precision": "binary"},
        {"output_value": "token_embeddings"},
        {"output_value": None},
    ],
    ids=str,
)
def test_other_inputs_run_in_sentence_transformers(
    encoder: FastEncoder, st: SentenceTransformer, inputs: Any, kind: str, arguments: dict[str, Any]
) -> None:
    try:
        expected = st.encode(inputs, **arguments)
    except IndexError:
        pytest.skip("sentence-transformers 6.0 does not embed these itself")
    assert_same_result(encoder.encode(inputs, **arguments), expected)
    assert encoder.stats.fallbacks == {f"inputs of type {kind}": 1}


@pytest.mark.parametrize(
    "container", [iter, pd.Series, pa.array, lambda pairs: dict(pairs).items()]
)
def test_containers_of_pairs_that_only_we_take(
    encoder: FastEncoder, st: SentenceTransformer, container: Callable[[Any], Any]
) -> None:
    assert_same_result(encoder.encode(container(PAIRS)), st.encode(PAIRS))


def test_a_tuple_is_a_list_of_texts_and_no_pair(
    encoder: FastEncoder, st: SentenceTransformer
) -> None:
    assert_same_result(encoder.encode(PAIRS[0]), st.encode(PAIRS[0]))
    assert encoder.stats.fallbacks == {}


@pytest.mark.parametrize(
    "array",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, type=pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.chunked_array([TEXTS[:3], TEXTS[3:]]),
        pa.table({"text": TEXTS})["text"],
    ],
    ids=lambda array: f"{type(array).__name__} {array.type}",
)
def test_arrow_arrays_run_packed(encoder: FastEncoder, st: SentenceTransformer, array: Any) -> None:
    assert_same_result(encoder.encode(array), st.encode(TEXTS))
    assert encoder.stats.fallbacks == {}
    with pytest.raises(InputError, match=r"inputs\[8\] must be a str, got NoneType"):
        encoder.encode(pa.chunked_array([pa.array(TEXTS), pa.array([None], type=pa.string())]))


@pytest.mark.parametrize(
    "table", [pa.table({"text": TEXTS}), pa.record_batch({"text": TEXTS}), pd.DataFrame(PAIRS)]
)
def test_tables_are_refused(encoder: FastEncoder, table: Any) -> None:
    with pytest.raises(InputError, match=r"got (Table|RecordBatch|DataFrame): take one column"):
        encoder.encode(table)


@pytest.mark.parametrize("inputs", [PAIRS, {"text": "a"}, [{"text": "a"}]], ids=str)
def test_results_of_other_inputs_are_checked(inputs: Any) -> None:
    st = make_sentence_transformer()
    with torch.no_grad():
        st[0].auto_model.encoder.layer[-1].output.LayerNorm.weight.fill_(3e38)
    with pytest.raises(NonFiniteEmbeddingError):
        FastEncoder(st).encode(inputs)


def test_messages_in_a_tuple_are_no_conversation(st: SentenceTransformer) -> None:
    first, second = ({"role": "user", "content": text} for text in TEXTS[:2])
    assert listed(st, [first, second]) == ([[first, second]], True)
    assert listed(st, (first, second)) == ([[first], [second]], False)
    assert listed(st, np.array([first, second])) == ([[first], [second]], False)
    assert listed(st, first) == ([first], True)


# What is refused, in the words of sentence-transformers

REFUSED_INPUTS: dict[str, Any] = {
    "None": None,
    "int": 3,
    "bytes": b"a",
    "set": {"a"},
    "mapping that is not a dict": UserDict(text="a"),
    "no dimension": np.array("a"),
    "tensor": torch.zeros(3),
    "DataFrame": pd.DataFrame({"text": ["a"]}),
    "list of None": [None],
    "list of NaN": [float("nan")],
    "list of bytes": [b"a"],
    "list of arrays": [np.array(["a"])],
    "list of NA": [pd.NA],
    "three": [("a", "b", "c")],
    "nested": [["a"]],
    "half a pair": [("a", None)],
    "empty dict": [{}],
    "other dict": [{"txt": "a"}],
    "image": [{"image": "a.png"}],
    "message": {"role": "user", "content": "a"},
    "messages": [{"role": "user", "content": "a"}],
    "conversations": [[{"role": "user", "content": "a"}]],
}


@pytest.mark.parametrize("inputs", REFUSED_INPUTS.values(), ids=REFUSED_INPUTS)
def test_refused_inputs(encoder: FastEncoder, st: SentenceTransformer, inputs: Any) -> None:
    with pytest.raises(ValueError) as theirs:
        st.encode(inputs)
    with pytest.raises(InputError, match=r" inputs(\[0\])? must (be a str|have one dim)") as ours:
        encoder.encode(inputs)
    assert str(ours.value).startswith(str(theirs.value))
    assert isinstance(ours.value, ValueError) and isinstance(ours.value, TypeError)
    assert encoder.stats.fallbacks == {}


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": "error"},
        {"precision": 3},
        {"precision": "int4", "batch_size": 8},
        {"normalize": True},
        {"normalise": None, "precision": "int8"},
        {"prompt_name": "nowhere"},
        {"batch_size": 0},
        {"batch_size": -1, "precision": "error"},
        {"device": "foo"},
        {"device": "cuda:99"},
        {"device": 99},
    ],
    ids=str,
)
@pytest.mark.parametrize("inputs", ["a", ["a"], PAIRS], ids=["text", "list", "pairs"])
def test_refused_arguments(
    encoder: FastEncoder, st: SentenceTransformer, arguments: dict[str, Any], inputs: Any
) -> None:
    with pytest.raises((ValueError, RuntimeError, AssertionError)) as theirs:
        st.encode(inputs, **arguments)
    with pytest.raises(ValueError) as ours:
        encoder.encode(inputs, **arguments)
    assert str(theirs.value) in str(ours.value)
    assert isinstance(ours.value, type(theirs.value))
    assert encoder.stats.fallbacks == {}


def test_refused_arguments_name_what_the_modules_read(encoder: FastEncoder) -> None:
    encoder[1].forward_kwargs = {"known"}
    words = r"SentenceTransformer\.get_model_kwargs\(\), the valid .* are: \['known'\]"
    with pytest.raises(ValueError, match=words):
        encoder.encode(["a"], normalize=True)


@pytest.mark.parametrize(
    "name",
    ["a file", "missing", "missing/a/b", "/missing", "./missing", "~/x", "bad name!", "empty"],
)
def test_refused_paths(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm_path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    (tmp_path / "empty").mkdir()
    model = str(tmp_path / name) if name in ("a file", "missing", "empty") else name
    with pytest.raises((OSError, ValueError)) as theirs:
        SentenceTransformer(model, local_files_only=True)
    with pytest.raises(ValueError, match="model_name_or_path must be a folder") as ours:
        FastEncoder(model)
    assert str(ours.value).startswith(str(theirs.value))
    assert isinstance(ours.value, type(theirs.value))


# Where others look


def test_length_of_a_prompt_is_the_one_sentence_transformers_keeps() -> None:
    st = make_sentence_transformer(prompts={"query": "find: "})
    st.set_pooling_include_prompt(False)
    kept = copy.deepcopy(st)
    kept.encode_query(TEXTS)
    encoder = FastEncoder(st)
    encoder.encode_query(TEXTS)
    assert isinstance(st[0], Transformer)
    assert st[0]._prompt_length_mapping == kept[0]._prompt_length_mapping != {}
    assert encoder.stats.fallbacks == {}
