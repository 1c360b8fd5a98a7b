"""Every way to build an encoder, what it refuses, and what it leaves to sentence-transformers."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

from checks import assert_same_result, assert_same_vectors, bits
from families import (
    MAX_TOKENS,
    make_model,
    make_sentence_transformer,
    make_texts,
    make_tokenizer,
)
from sbert_fast import FastEncoder, explain, ops
from sbert_fast.errors import ImplementationError
from sbert_fast.ops import extension

TEXTS = make_texts(30)
Launches = Callable[[], dict[tuple[str, str], int]]


# Sources


def test_from_path(saved: str, st: SentenceTransformer, launches: Launches) -> None:
    encoder = FastEncoder(saved, device="cpu")
    assert isinstance(encoder, SentenceTransformer)
    assert encoder.prompts["query"] == "find: "
    ours = encoder.encode(TEXTS, prompt_name="query")
    assert_same_result(ours, st.encode(TEXTS, prompt_name="query"))
    assert launches() != {}


def test_from_the_name_of_a_plain_transformers_model(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    make_tokenizer("bert").save_pretrained(tmp_path)
    st = SentenceTransformer(str(tmp_path), device="cpu")
    assert_same_result(FastEncoder(str(tmp_path), device="cpu").encode(TEXTS), st.encode(TEXTS))


@pytest.mark.parametrize("kind", ["list", "ordered dict"])
def test_from_modules(st: SentenceTransformer, kind: str, launches: Launches) -> None:
    modules: Any = list(st)
    if kind == "ordered dict":
        modules = OrderedDict(zip(("transformer", "pooling", "normalize"), modules, strict=True))
    encoder = FastEncoder(modules=modules, device="cpu")
    assert_same_result(encoder.encode(TEXTS), st.encode(TEXTS))
    assert launches() != {}


def test_from_a_model_shares_its_modules_and_settings(launches: Launches) -> None:
    source = make_sentence_transformer(
        prompts={"query": "find: "},
        default_prompt_name="query",
        similarity_fn_name="dot",
        truncate_dim=24,
    )
    expected = source.encode(TEXTS)
    encoder = FastEncoder(source)
    assert [encoder[i] is source[i] for i in range(3)] == [True] * 3
    for name in ("default_prompt_name", "prompts", "similarity_fn_name", "truncate_dim", "device"):
        assert getattr(encoder, name) == getattr(source, name)
    assert encoder.max_seq_length == source.max_seq_length
    assert encoder.get_embedding_dimension() == source.get_embedding_dimension() == 24
    assert_same_result(encoder.encode(TEXTS), expected)

    ops.reset_launches()
    assert (bits(source.encode(TEXTS)) == bits(expected)).all()
    assert launches() == {}
    encoder.prompts["query"] = "changed: "
    assert source.prompts["query"] == "find: "


def test_arguments_win_over_those_of_the_model(st: SentenceTransformer) -> None:
    encoder = FastEncoder(st, truncate_dim=7, prompts={"query": "my own: "})
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 7)
    expected = st.encode(TEXTS, prompt="my own: ", truncate_dim=7)
    assert_same_result(encoder.encode(TEXTS, prompt_name="query"), expected)


def test_from_an_encoder(st: SentenceTransformer) -> None:
    first = FastEncoder(st)
    assert (bits(FastEncoder(first).encode(TEXTS)) == bits(first.encode(TEXTS))).all()


@pytest.mark.parametrize("saver", [FastEncoder, SentenceTransformer])
@pytest.mark.parametrize("loader", [FastEncoder, SentenceTransformer])
def test_save_and_load(st: SentenceTransformer, saver: type, loader: type, tmp_path: Path) -> None:
    model = FastEncoder(st) if saver is FastEncoder else st
    before = model.encode(TEXTS, prompt_name="query")
    model.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert config["model_type"] == "SentenceTransformer"
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert all(m["type"].startswith("sentence_transformers.") for m in modules)

    loaded = loader(str(tmp_path), device="cpu")
    assert_same_result(loaded.encode(TEXTS, prompt_name="query"), before)


# dtype, impl, batch_tokens


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float32", torch.float32, "auto"])
def test_dtype(st: SentenceTransformer, dtype: str | torch.dtype) -> None:
    encoder = FastEncoder(st, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).split(".")[-1])
    assert encoder.compute_dtype == wanted
    assert encoder.dtype == torch.float32
    assert encoder.encode(TEXTS).dtype == "float32"
    assert encoder.encode(TEXTS, output_value="token_embeddings")[0].dtype == torch.float32
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "computes_in"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_auto_dtype_is_that_of_the_model(
    saved: str, dtype: torch.dtype, computes_in: torch.dtype
) -> None:
    encoder = FastEncoder(saved, device="cpu", model_kwargs={"dtype": dtype})
    assert encoder.dtype == dtype
    assert encoder.compute_dtype == computes_in
    # In fp16 too: the weights fit, and fp32 holds them exactly.
    upcast = SentenceTransformer(saved, device="cpu", model_kwargs={"dtype": dtype}).float()
    if computes_in == torch.float32:
        assert_same_result(encoder.encode(TEXTS), upcast.encode(TEXTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float64"}, "dtype must be one of .*, got 'float64'"),
        ({"dtype": torch.float64}, "dtype must be one of .*, got torch.float64"),
        ({"dtype": "int4"}, "dtype must be one of .*, got 'int4'"),
        ({"dtype": None}, "dtype must be one of .*, got None"),
        ({"dtype": ["bfloat16"]}, "dtype must be one of .*, got \\['bfloat16'\\]"),
        ({"impl": "fastest"}, "impl must be one of auto, .*, got 'fastest'"),
        ({"impl": None}, "impl must be one of auto, .*, got None"),
        ({"batch_tokens": 0}, "batch_tokens must be a positive integer or 'auto', got 0"),
        ({"batch_tokens": 2.0}, "batch_tokens must be a positive integer or 'auto', got 2.0"),
        ({"batch_tokens": True}, "batch_tokens must be a positive integer or 'auto', got True"),
        ({"batch_tokens": "many"}, "batch_tokens must be a positive integer or 'auto', got 'many'"),
        ({"modules": []}, "modules must be None when a SentenceTransformer is given"),
    ],
)
def test_bad_argument(st: SentenceTransformer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastEncoder(st, **arguments)


def test_impl_is_used_or_refused(
    st: SentenceTransformer, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    FastEncoder(st, impl="reference").encode(TEXTS)
    assert {implementation for _, implementation in launches()} == {"reference"}
    monkeypatch.setattr(ops.dispatch, "refusal", lambda *_: "it is not there")
    with pytest.raises(ImplementationError, match="impl='cpu' was asked for, but it is not there"):
        FastEncoder(st, impl="cpu")


def test_the_variable_that_names_no_implementation_is_named(
    st: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FastEncoder(st)
    monkeypatch.setenv("SBERT_FAST_IMPL", "fastest")
    message = "^SBERT_FAST_IMPL must be one of auto, .*, got 'fastest'$"
    with pytest.raises(ValueError, match=message):
        FastEncoder(st)
    with pytest.raises(ValueError, match=message):
        encoder.refresh()
        encoder.encode(TEXTS)
    assert "SBERT_FAST_IMPL must be one of" in explain(encoder)


def test_log_says_what_runs(st: SentenceTransformer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sbert_fast"):
        encoder = FastEncoder(st, dtype="bfloat16", batch_tokens=100)
    assert encoder.packed_engine is not None
    implementation = encoder.packed_engine.implementation
    assert (
        f"packed bert in torch.bfloat16 on cpu, ops: {implementation}, at most 100 tokens a batch"
        in caplog.messages
    )


# max_seq_length


def test_max_seq_length_beyond_the_position_table() -> None:
    st = make_sentence_transformer()
    st.max_seq_length = MAX_TOKENS + 1
    message = f"max_seq_length must be an integer from 2, .* {MAX_TOKENS}, .* got {MAX_TOKENS + 1}"
    with pytest.raises(ValueError, match=message):
        FastEncoder(st)
    st.max_seq_length = MAX_TOKENS
    encoder = FastEncoder(st)
    encoder.max_seq_length = MAX_TOKENS + 1
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS)


@pytest.mark.parametrize("value", [-1, 0, 1])
def test_max_seq_length_below_the_special_tokens(value: int, batch_tokens: list[int]) -> None:
    encoder = FastEncoder(make_sentence_transformer())
    encoder.max_seq_length = value
    message = f"must be an integer from 2, the special tokens of a text, to .* got {value}$"
    with pytest.raises(ValueError, match=message):
        encoder.encode(["sea", "sun " * 2 * MAX_TOKENS])
    assert batch_tokens == []


def test_max_seq_length_without_special_tokens() -> None:
    st = make_sentence_transformer()
    st.tokenizer.backend_tokenizer.post_processor = None
    st.max_seq_length = 1
    texts = make_texts(10, max_words=20)
    assert_same_result(FastEncoder(st).encode(texts), st.encode(texts))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_max_seq_length_may_be_an_integer_of_numpy(kind: type) -> None:
    st = make_sentence_transformer()
    st.max_seq_length = kind(7)
    texts = make_texts(10, max_words=20)
    assert_same_result(FastEncoder(st).encode(texts), st.encode(texts))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_no_max_seq_length_means_the_room_of_the_position_table(family: str) -> None:
    st = make_sentence_transformer(family)
    texts = make_texts(4, max_words=400)
    expected = st.encode(texts)
    # The values that stand for "none": transformers' own, and the size of RoBERTa's whole table.
    for value in (transformers.tokenization_utils_base.VERY_LARGE_INTEGER, MAX_TOKENS + 2):
        if value == MAX_TOKENS + 2 and family == "bert":
            continue
        st.max_seq_length = value
        assert_same_vectors(FastEncoder(st).encode(texts), expected)


@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
@pytest.mark.parametrize("family", ["modernbert", "qwen3"])
def test_no_max_seq_length_means_no_end_where_positions_are_computed(family: str) -> None:
    st = make_sentence_transformer(family)
    st.max_seq_length = transformers.tokenization_utils_base.VERY_LARGE_INTEGER
    texts = make_texts(4, max_words=400)
    assert_same_vectors(FastEncoder(st).encode(texts), st.encode(texts))


@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_max_seq_length_of_none_fails_as_in_stock() -> None:
    st = make_sentence_transformer()
    st.max_seq_length = None
    with pytest.raises(TypeError) as stock:
        st.encode(["a text"])
    encoder = FastEncoder(st)
    with pytest.raises(TypeError) as ours:
        encoder.encode(["a text"])
    assert str(ours.value) == str(stock.value)
    assert encoder.stats.fallbacks == {"max_seq_length is None": 1}


def test_max_seq_length_set_later_is_honoured() -> None:
    st = make_sentence_transformer()
    encoder = FastEncoder(st)
    texts = make_texts(30, max_words=200)
    for length in (MAX_TOKENS, 3, 17):
        encoder.max_seq_length = length
        before = encoder.stats
        assert_same_result(encoder.encode(texts), st.encode(texts))
        states = encoder.encode(texts, output_value="token_embeddings")
        assert max(map(len, states)) == length
        assert encoder.stats.truncated > before.truncated


def test_the_model_that_was_handed_in_keeps_its_card() -> None:
    st = make_sentence_transformer()
    encoder = FastEncoder(st)
    assert st.model_card_data.model is st
    assert encoder.model_card_data.model is encoder


def test_plain_torch_is_not_taken_silently(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extension, "CPU", replace(extension.CPU, reason="it was not built"))
    FastEncoder(make_sentence_transformer())
    assert "no kernels run on cpu, only plain torch" in caplog.text
    caplog.clear()
    FastEncoder(make_sentence_transformer(), impl="reference")
    assert not caplog.text


def test_hooks_on_the_base_model_are_honoured(launches: Launches) -> None:
    st = make_sentence_transformer()
    encoder = FastEncoder(st)
    calls = []
    handle = st[0].auto_model.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    assert_same_result(encoder.encode(TEXTS), st.encode(TEXTS))
    assert launches() == {}
    assert len(calls) == 2 * -(-len(TEXTS) // 32)
    assert encoder.stats.fallbacks == {"BertLayer has forward hooks": 1}
    handle.remove()
    encoder.encode(TEXTS)
    assert launches() != {}


@pytest.mark.parametrize("value", ["a", 2.5, True])
def test_max_seq_length_must_be_an_integer(value: object) -> None:
    st = make_sentence_transformer("bert")
    st.max_seq_length = value
    with pytest.raises(ValueError, match="max_seq_length must be an integer"):
        FastEncoder(st)
