"""Every argument of `encode` against sentence-transformers: values, types, dtypes, shapes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from checks import assert_same_result, assert_same_vectors
from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder, inference
from sbert_fast.arguments import check_device
from sbert_fast.values import PRECISIONS

PROMPTS = {"query": "find: ", "document": "a passage of a book: ", "empty": ""}
TEXTS = make_texts(40)
INPUTS = {"list": TEXTS, "one": TEXTS[:1], "single": TEXTS[3], "empty": []}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "prompt": {"prompt": "find: "},
    "empty prompt": {"prompt": ""},
    "prompt_name": {"prompt_name": "document"},
    "empty prompt_name": {"prompt_name": "empty"},
    "prompt wins over prompt_name": {"prompt": "find: ", "prompt_name": "document"},
    "batch_size": {"batch_size": 3},
    "batch_size numpy": {"batch_size": np.int64(3)},
    "numpy": {"convert_to_numpy": True},
    "tensor": {"convert_to_tensor": True},
    "tensor wins over numpy": {"convert_to_numpy": True, "convert_to_tensor": True},
    "list of tensors": {"convert_to_numpy": False},
    "device": {"device": "cpu"},
    "torch device": {"device": torch.device("cpu")},
    "device with index": {"device": "cpu:0"},
    "normalize": {"normalize_embeddings": True},
    "truncate": {"truncate_dim": 20},
    "truncate and normalize": {"truncate_dim": 20, "normalize_embeddings": True},
    "truncate beyond": {"truncate_dim": 100},
    "precision None": {"precision": None},
    "task": {"task": "query"},
    "token_embeddings": {"output_value": "token_embeddings"},
    "token_embeddings of a prompt": {"output_value": "token_embeddings", "prompt": "find: "},
    "token_embeddings as numpy": {"output_value": "token_embeddings", "convert_to_numpy": True},
    "token_embeddings as tensor": {"output_value": "token_embeddings", "convert_to_tensor": True},
    "token_embeddings normalize": {
        "output_value": "token_embeddings",
        "normalize_embeddings": True,
        "truncate_dim": 20,
    },
}

Pair = tuple[FastEncoder, SentenceTransformer]


@pytest.fixture(scope="module", params=[True, False], ids=["normalized", "plain"])
def pair(request: pytest.FixtureRequest) -> Pair:
    st = make_sentence_transformer(normalize=request.param, prompts=PROMPTS)
    return FastEncoder(st), st


@pytest.fixture(scope="module")
def encoder() -> FastEncoder:
    return FastEncoder(make_sentence_transformer(prompts=PROMPTS))


def test_signature_is_that_of_sentence_transformers() -> None:
    ours = list(inspect.signature(FastEncoder.encode).parameters.values())
    theirs = list(inspect.signature(SentenceTransformer.encode).parameters.values())
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    assert [p.default for p in ours[2:]] == [p.default for p in theirs[2:]]


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_argument(
    pair: Pair,
    inputs: str | list[str],
    arguments: dict[str, Any],
    launches: Callable[[], dict[tuple[str, str], int]],
) -> None:
    encoder, st = pair
    theirs = st.encode(inputs, **arguments)
    assert launches() == {}
    assert_same_result(encoder.encode(inputs, **arguments), theirs)
    assert (launches() != {}) == bool(inputs)
    assert encoder.stats.fallbacks == {}


@pytest.mark.parametrize("kind", [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(pair: Pair, precision: str, kind: dict[str, bool]) -> None:
    encoder, st = pair
    ours = encoder.encode(TEXTS, precision=precision, **kind)
    theirs = st.encode(TEXTS, precision=precision, **kind)
    assert type(ours) is type(theirs)
    assert [(e.dtype, e.shape) for e in ours] == [(e.dtype, e.shape) for e in theirs]
    # A value on the edge of two steps may fall on either side of it between the two engines.
    floats = encoder.encode(TEXTS)
    assert (np.stack(ours) == quantize_embeddings(floats, precision=precision)).all()


@pytest.mark.parametrize("arguments", [{}, {"prompt": "find: "}, {"truncate_dim": 20}])
def test_all_features_are_those_of_one_unpadded_text(pair: Pair, arguments: dict[str, Any]) -> None:
    encoder, st = pair
    ours = encoder.encode(TEXTS, output_value=None, **arguments)
    assert isinstance(ours, list)
    for text, features in zip(TEXTS, ours, strict=True):
        theirs = st.encode(text, output_value=None, **arguments)
        assert features.pop("modality") == "text"
        # Before 6.2, sentence-transformers takes the first letter of it.
        assert theirs.pop("modality") in ("text", "t")
        assert_same_result(features, theirs)
    assert_same_result(
        [f["sentence_embedding"] for f in ours],
        encoder.encode(TEXTS, convert_to_numpy=False, **arguments),
    )
    assert isinstance(encoder.encode(TEXTS[0], output_value=None), dict)
    assert encoder.encode([], output_value=None) == []


def test_batch_size_limits_the_tokens_of_a_batch(
    encoder: FastEncoder, batch_tokens: list[int]
) -> None:
    expected = encoder.encode(TEXTS)
    total = sum(batch_tokens)
    for batch_size in (1, 2, 5):
        batch_tokens.clear()
        before = encoder.stats
        assert_same_vectors(encoder.encode(TEXTS, batch_size=batch_size), expected)
        assert max(batch_tokens) <= batch_size * encoder.max_seq_length
        assert len(batch_tokens) >= total / (batch_size * encoder.max_seq_length)
        assert encoder.stats.batches - before.batches == len(batch_tokens)
        assert encoder.stats.tokens - before.tokens == sum(batch_tokens) == total
        assert encoder.stats.texts - before.texts == len(TEXTS)


def test_default_batch_size_limits_nothing(batch_tokens: list[int]) -> None:
    st = make_sentence_transformer()
    encoder = FastEncoder(st, batch_tokens=1_000_000)
    texts = make_texts(200)
    default = encoder.encode(texts)
    assert len(batch_tokens) == 1
    encoder.max_seq_length = 8
    batch_tokens.clear()
    encoder.encode(texts)
    assert len(batch_tokens) == 1
    batch_tokens.clear()
    encoder.encode(texts, batch_size=32)
    assert len(batch_tokens) > 1
    assert max(batch_tokens) <= 32 * 8

    batch_tokens.clear()
    small = FastEncoder(make_sentence_transformer(), batch_tokens=100)
    assert_same_vectors(small.encode(texts), default)
    assert max(batch_tokens) <= 100


@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings", None])
def test_slices_keep_the_order(
    encoder: FastEncoder, monkeypatch: pytest.MonkeyPatch, output_value: str | None
) -> None:
    whole = encoder.encode(TEXTS, output_value=output_value, prompt="find: ")
    for limits in ((10**9, 7), (500, 10**9)):
        with monkeypatch.context() as patch:
            patch.setattr(inference, "_SLICES", {"cpu": limits})
            before = encoder.stats.batches
            parts = encoder.encode(TEXTS, output_value=output_value, prompt="find: ")
            assert encoder.stats.batches - before >= 6
        assert_same_result(parts, whole)


@pytest.mark.parametrize(("show", "shown"), [(True, True), (False, False), (None, False)])
def test_progress_bar(
    encoder: FastEncoder, capsys: pytest.CaptureFixture[str], show: bool | None, shown: bool
) -> None:
    encoder.encode(TEXTS, show_progress_bar=show)
    output = capsys.readouterr()
    assert output.out == ""
    assert (f"{len(TEXTS)}/{len(TEXTS)}" in output.err) == shown
    assert shown or output.err == ""


def test_progress_bar_follows_the_logger_of_sentence_transformers(
    encoder: FastEncoder, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sentence_transformers"):
        encoder.encode(TEXTS)
    assert "text/s" in capsys.readouterr().err


@pytest.mark.parametrize("prompts", [PROMPTS, None], ids=["prompts", "no prompts"])
@pytest.mark.parametrize("inputs", [TEXTS, TEXTS[3]], ids=["list", "single"])
@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_encode_query_and_document(
    method: str, inputs: str | list[str], prompts: dict[str, str] | None
) -> None:
    st = make_sentence_transformer(prompts=prompts)
    encoder = FastEncoder(st)
    for arguments in ({}, {"prompt": "my own: "}, {"convert_to_tensor": True, "truncate_dim": 8}):
        ours = getattr(encoder, method)(inputs, **arguments)
        assert_same_result(ours, getattr(st, method)(inputs, **arguments))
    assert encoder.stats.fallbacks == {}


def test_default_prompt_name() -> None:
    st = make_sentence_transformer(prompts=PROMPTS, default_prompt_name="query")
    encoder = FastEncoder(st)
    assert_same_vectors(encoder.encode(TEXTS), st.encode(TEXTS))
    joined = ["find: " + text for text in TEXTS]
    assert_same_vectors(encoder.encode(TEXTS), encoder.encode(joined, prompt=""))
    assert_same_vectors(encoder.encode(TEXTS, prompt=""), st.encode(TEXTS, prompt=""))
    other = FastEncoder(st, default_prompt_name="document")
    assert_same_vectors(other.encode(TEXTS), st.encode(TEXTS, prompt_name="document"))


def test_similarity(pair: Pair) -> None:
    encoder, st = pair
    ours, theirs = encoder.encode(TEXTS), st.encode(TEXTS)
    assert torch.equal(encoder.similarity(theirs, theirs), st.similarity(theirs, theirs))
    assert torch.equal(
        encoder.similarity_pairwise(theirs, theirs), st.similarity_pairwise(theirs, theirs)
    )
    nearest = encoder.similarity(ours, theirs).argmax(dim=1)
    assert nearest.tolist() == list(range(len(TEXTS)))


def test_truncate_embeddings_context(pair: Pair) -> None:
    encoder, st = pair
    with encoder.truncate_embeddings(12), st.truncate_embeddings(12):
        assert_same_result(encoder.encode(TEXTS), st.encode(TEXTS))
        assert_same_result(encoder.encode(TEXTS, truncate_dim=6), st.encode(TEXTS, truncate_dim=6))
    assert encoder.encode(TEXTS).shape[1] == encoder.get_embedding_dimension()
    with (
        encoder.truncate_embeddings(-1),
        pytest.raises(ValueError, match="truncate_dim must be a positive integer, got -1"),
    ):
        encoder.encode(TEXTS)


def test_old_keyword_sentences(encoder: FastEncoder) -> None:
    expected = encoder.encode(TEXTS)
    assert (encoder.encode(sentences=TEXTS) == expected).all()
    assert (encoder.encode_query(sentences=TEXTS, prompt="") == expected).all()


@pytest.mark.parametrize("value", [1, "x", None, False, torch.zeros(2)], ids=repr)
def test_unknown_keyword(encoder: FastEncoder, value: object) -> None:
    with pytest.raises(ValueError, match="unknown"):
        encoder.encode(TEXTS, unknown=value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": -1}, "batch_size must be a positive integer, got -1"),
        ({"batch_size": 1.5}, "batch_size must be a positive integer, got 1.5"),
        ({"batch_size": True}, "batch_size must be a positive integer, got True"),
        ({"batch_size": None}, "batch_size must be a positive integer, got None"),
        ({"output_value": "tokens"}, "output_value must be one of .*, got 'tokens'"),
        ({"precision": "int4"}, "precision must be one of .*, got 'int4'"),
        ({"truncate_dim": 0}, "truncate_dim must be a positive integer, got 0"),
        ({"truncate_dim": -5}, "truncate_dim must be a positive integer, got -5"),
        ({"truncate_dim": "20"}, "truncate_dim must be a positive integer, got '20'"),
        ({"prompt_name": "nowhere"}, "'nowhere' not found"),
        ({"device": []}, "device must be a device or a list of devices, got an empty list"),
        ({"device": "cuda:99"}, r"device must be one that this machine has \(cpu.*'cuda:99'"),
        ({"device": ["cpu", "gpu"]}, r"device must be one that this machine has \(cpu.*'gpu'"),
    ],
)
def test_bad_argument(
    encoder: FastEncoder,
    arguments: dict[str, Any],
    message: str,
    launches: Callable[[], dict[tuple[str, str], int]],
) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS, **arguments)
    assert launches() == {}


def test_devices_are_counted_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("a GPU was started"))
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        check_device("device", device)
    with pytest.raises(ValueError, match=r"device must be .*\(cpu, cuda:0, cuda:1\), got 'cuda:2'"):
        check_device("device", "cuda:2")


def test_processing_kwargs_run_in_sentence_transformers(pair: Pair) -> None:
    _, st = pair
    encoder = FastEncoder(st)
    arguments = {"processing_kwargs": {"text": {"max_length": 6, "truncation": True}}}
    assert_same_result(encoder.encode(TEXTS, **arguments), st.encode(TEXTS, **arguments))
    assert encoder.stats.fallbacks == {"argument 'processing_kwargs'": 1}
    assert_same_result(encoder.encode(TEXTS, processing_kwargs=None), encoder.encode(TEXTS))
    assert encoder.stats.fallbacks == {"argument 'processing_kwargs'": 1}


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_queries_and_documents_have_the_same_default(batch_tokens: list[int], method: str) -> None:
    encoder = FastEncoder(make_sentence_transformer())
    texts = ["one two three four"] * 400
    encoder.encode(texts)
    whole = len(batch_tokens)
    getattr(encoder, method)(texts)
    assert len(batch_tokens) == 2 * whole
    getattr(encoder, method)(texts, batch_size=1)
    assert len(batch_tokens) > 3 * whole
