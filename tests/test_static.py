"""Models that begin with a StaticEmbedding: the mean of rows of a table, beside stock."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, StaticEmbedding
from tokenizers import normalizers
from torch import nn

from checks import assert_same_result, assert_same_vectors, bits, cosine_distances
from families import make_texts, make_tokenizer, randomize
from sbert_fast import FastEncoder, explain
from sbert_fast.errors import InvalidWeightsError, TokenIdError

WIDTH = 40
TEXTS = [*make_texts(40), "", " ", "the [SEP] sea", " ".join(make_texts(200, seed=1))]
INPUTS = {"list": TEXTS, "single": TEXTS[3], "nothing in it": [""], "none": []}
PROMPTS = {"query": "find: "}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "prompt": {"prompt": "find: "},
    "prompt_name": {"prompt_name": "query"},
    "task": {"task": "query"},
    "batch_size": {"batch_size": np.int64(3)},
    "list of tensors": {"convert_to_numpy": False},
    "truncate and normalize": {"truncate_dim": 20, "normalize_embeddings": True},
    "binary": {"precision": "binary"},
}
TAILS: dict[str, Callable[[], list[nn.Module]]] = {
    "alone": list,
    "normalize": lambda: [Normalize()],
    "dense": lambda: [randomize(Dense(WIDTH, 24)), Normalize(), randomize(Dense(24, 30), 1)],
}


def make_static(tail: str = "alone") -> SentenceTransformer:
    backend = make_tokenizer("bert").backend_tokenizer
    shape = backend.get_vocab_size(), WIDTH
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    table = StaticEmbedding(backend, embedding_weights=weights)
    modules = [table, *TAILS[tail]()]
    return SentenceTransformer(modules=modules, device="cpu", prompts=PROMPTS).eval()


@pytest.fixture(scope="module", params=TAILS)
def pair(request: pytest.FixtureRequest) -> tuple[FastEncoder, SentenceTransformer]:
    st = make_static(request.param)
    return FastEncoder(st), st


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(
    pair: tuple[FastEncoder, SentenceTransformer],
    inputs: Any,
    arguments: dict[str, Any],
    launches: Callable[[], dict[tuple[str, str], int]],
) -> None:
    encoder, st = pair
    assert_same_result(encoder.encode(inputs, **arguments), st.encode(inputs, **arguments))
    assert (launches() != {}) == bool(inputs)
    assert encoder.stats.fallbacks == {}


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_methods(method: str) -> None:
    st = make_static()
    encoder = FastEncoder(st)
    assert_same_vectors(getattr(encoder, method)(TEXTS), getattr(st, method)(TEXTS))
    assert encoder.stats.texts == len(TEXTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tail", TAILS)
def test_a_text_alone_has_the_same_bits(tail: str, dtype: str) -> None:
    encoder = FastEncoder(make_static(tail), dtype=dtype)
    together = bits(encoder.encode(TEXTS, normalize_embeddings=True))
    alone = [bits(encoder.encode(text, normalize_embeddings=True)) for text in TEXTS]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mean_loses_no_more_than_in_stock(dtype: torch.dtype) -> None:
    st, texts = make_static().to(dtype), [*TEXTS, "日" * 5000]
    ours, stock = FastEncoder(st).encode(texts), st.encode(texts)
    oracle = st.double().encode(texts)
    assert cosine_distances(ours, oracle).max() <= cosine_distances(stock, oracle).max()


# What changes after the first call


def _row(st: SentenceTransformer) -> None:
    st[0].embedding.weight.data[7:] *= -1


def _parameter(st: SentenceTransformer) -> None:
    st[0].embedding.weight = nn.Parameter(st[0].embedding.weight.detach().flip(1))


def _optimizer(st: SentenceTransformer) -> None:
    weight = st[0].embedding.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()


def _table(st: SentenceTransformer) -> None:
    st[0].embedding = nn.EmbeddingBag.from_pretrained(st[0].embedding.weight.detach().roll(1, 0))


def _truncation(st: SentenceTransformer) -> None:
    st.tokenizer.enable_truncation(4)


def _truncation_of_nothing(st: SentenceTransformer) -> None:
    st.tokenizer.enable_truncation(0)


def _normalizer(st: SentenceTransformer) -> None:
    st.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)


def _added(st: SentenceTransformer) -> None:
    st.tokenizer.add_tokens(["th"])
    table = st[0].embedding.weight.detach()
    st[0].embedding = nn.EmbeddingBag.from_pretrained(torch.cat((table, table[:1])))


def _tokenizer(st: SentenceTransformer) -> None:
    st.tokenizer = make_tokenizer("roberta").backend_tokenizer


SERVED = (
    _row,
    _parameter,
    _optimizer,
    _table,
    _truncation,
    _truncation_of_nothing,
    _normalizer,
    _added,
    _tokenizer,
)
# Not the longest: stock adds up the row of unknown words a thousand times, and rounds as often.
CASED = [text.title() for text in TEXTS[:-1]]


@pytest.mark.parametrize("change", SERVED)
def test_changes_are_served(change: Callable[[SentenceTransformer], None]) -> None:
    st = make_static()
    encoder = FastEncoder(st)
    before = encoder.encode(CASED)
    change(st)
    after = encoder.encode(CASED, batch_size=7)
    assert_same_vectors(after, st.encode(CASED))
    assert np.abs(after - before).max() > 1e-4
    assert encoder.stats.fallbacks == {}


def _option(name: str, value: object) -> Callable[[SentenceTransformer], None]:
    return lambda st: setattr(st[0].embedding, name, value)


def _doubled(method: Any) -> Any:
    def run(*args: Any, **how: Any) -> Any:
        found = method(*args, **how)
        return found | {"sentence_embedding": found["sentence_embedding"].square()}

    return run


def _forward(st: SentenceTransformer) -> None:
    st[0].forward = _doubled(st[0].forward)


def _forward_of_the_table(st: SentenceTransformer) -> None:
    forward = st[0].embedding.forward
    st[0].embedding.forward = lambda *args: forward(*args).square()


def _hook(st: SentenceTransformer) -> None:
    st[0].embedding.register_forward_hook(lambda _, __, output: output.square())


def _preprocess(st: SentenceTransformer) -> None:
    preprocess = st[0].preprocess
    st[0].preprocess = lambda inputs, **how: preprocess([f"find {i}" for i in inputs], **how)


def _encode_batch(st: SentenceTransformer) -> None:
    encode = st.tokenizer.encode_batch
    st.tokenizer.encode_batch = lambda texts, **how: encode([f"find {t}" for t in texts], **how)


class Squared(nn.EmbeddingBag):
    def forward(self, *args: Any, **how: Any) -> torch.Tensor:
        return super().forward(*args, **how).square()


def _class_of_the_table(st: SentenceTransformer) -> None:
    st[0].embedding.__class__ = Squared


def _padding(st: SentenceTransformer) -> None:
    st.tokenizer.enable_padding(length=60)


def _buffer(st: SentenceTransformer) -> None:
    table = st[0].embedding
    weight = table.weight.detach().flip(1)
    del table.weight
    table.register_buffer("weight", weight)


REFUSED: dict[str, tuple[Callable[[SentenceTransformer], None], str]] = {
    "mode": (_option("mode", "sum"), "EmbeddingBag.mode must be 'mean', got 'sum'"),
    "padding": (_option("padding_idx", 9), "EmbeddingBag.padding_idx must be None, got 9"),
    "norm": (_option("max_norm", 0.5), "EmbeddingBag.max_norm must be None, got 0.5"),
    "forward": (_forward, "forward of StaticEmbedding was replaced on an instance"),
    "table": (_forward_of_the_table, "forward of EmbeddingBag was replaced on an instance"),
    "hook": (_hook, "EmbeddingBag has forward hooks"),
    "preprocess": (_preprocess, "preprocess of StaticEmbedding was replaced on an instance"),
    "tokenizer": (_encode_batch, "the tokenizer has its own encode_batch"),
    "class": (_class_of_the_table, "expected torch.nn.EmbeddingBag, got test_static.Squared"),
    "tokens": (_padding, "the tokenizer pads: padding is part of the mean"),
    "buffer": (_buffer, "EmbeddingBag.weight must be a parameter [V, E]"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_changes_that_run_in_stock(
    change: Callable[[SentenceTransformer], None], reason: str
) -> None:
    st = make_static("dense")
    encoder = FastEncoder(st)
    before = encoder.encode(TEXTS)
    change(st)
    after = encoder.encode(TEXTS)
    # Within rounding: stock writes to a table whose rows have a largest norm.
    assert_same_vectors(after, st.encode(TEXTS))
    assert np.abs(after - before).max() > 1e-4, "the change does nothing"
    assert encoder.stats.fallbacks == {reason: 1}
    assert encoder.unsupported_reason == reason or encoder.packed_engine is not None


def test_padding_that_ends_runs_packed_again() -> None:
    st = make_static()
    _padding(st)
    with pytest.warns(UserWarning, match="the tokenizer pads"):
        encoder = FastEncoder(st)
    st.tokenizer.no_padding()
    assert_same_vectors(encoder.encode(TEXTS), st.encode(TEXTS))
    assert encoder.stats.fallbacks == {}


def test_other_outputs_are_those_of_stock() -> None:
    st = make_static()
    encoder = FastEncoder(st)
    for name in ("token_embeddings", None):
        try:
            expected: Any = st.encode(TEXTS[:3], output_value=name)
        except Exception as error:
            with pytest.raises(type(error)):
                encoder.encode(TEXTS[:3], output_value=name)
        else:
            assert_same_result(encoder.encode(TEXTS[:3], output_value=name), expected)
    assert encoder.stats.fallbacks == {
        "output_value='token_embeddings' of StaticEmbedding": 1,
        "output_value=None of StaticEmbedding": 1,
    }


def test_saved_and_pickled(tmp_path: Path) -> None:
    st = make_static("dense")
    expected = st.encode(TEXTS)
    FastEncoder(st).save_pretrained(str(tmp_path))
    loaded = FastEncoder(str(tmp_path), device="cpu")
    for encoder in (loaded, pickle.loads(pickle.dumps(loaded))):
        assert_same_vectors(encoder.encode(TEXTS), expected)
        assert encoder.stats.texts == len(TEXTS)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_array_equal(stock.encode(TEXTS), expected)


def test_what_explain_tells() -> None:
    encoder = FastEncoder(make_static(), impl="reference")
    encoder.encode(TEXTS)
    told = explain(encoder).splitlines()
    assert (
        told[1]
        == "  encode: packed, float32 on cpu, ops: reference (asked for by impl='reference')"
    )
    assert told[2].startswith(f"  so far: {len(TEXTS)} texts")
    assert len(told) == 4


def test_what_no_table_holds_is_refused() -> None:
    st = make_static()
    encoder = FastEncoder(st)
    with torch.no_grad():
        st[0].embedding.weight[3, 5] = float("nan")
    with pytest.raises(InvalidWeightsError, match=r"infinity: embedding\.weight"):
        encoder.encode(TEXTS)
    with torch.no_grad():
        st[0].embedding.weight[3, 5] = 0
    st.tokenizer.add_tokens(["zz"])
    with pytest.raises(TokenIdError, match=r"inputs\[1\] holds the token 'zz'"):
        encoder.encode(["the sea", "a zz"])
