"""Models that begin with a Router: each call takes the route that stock takes, and runs packed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
)
from torch import nn

from checks import MAX_DISTANCE, assert_same_result, assert_same_vectors, bits, cosine_distances
from families import make_sentence_transformer, make_texts, make_tokenizer, make_xlnet, randomize
from sbert_fast import FastEncoder, explain

WIDTH = 64
TEXTS = [*make_texts(20), "", "the [SEP] sea"]
INPUTS = {"list": TEXTS, "single": TEXTS[2], "none": []}
PROMPTS = {"query": "find: ", "document": "of "}
Call = Callable[[SentenceTransformer, Any], Any]
CALLS: dict[str, Call] = {
    "encode": lambda model, inputs: model.encode(inputs),
    "query": lambda model, inputs: model.encode_query(inputs),
    "document": lambda model, inputs: model.encode_document(inputs, normalize_embeddings=True),
    "task": lambda model, inputs: model.encode(inputs, task="query", truncate_dim=20),
    "no task": lambda model, inputs: model.encode(inputs, task=None, prompt="of "),
    "wrong": lambda model, inputs: model.encode(inputs, task="translation"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "first": {},
    "default": {"default_route": "document"},
    "no default": {"allow_empty_key": False},
    "mapped": {"route_mappings": {("query", "text"): "document", (None, None): "query"}},
}


def static() -> list[nn.Module]:
    return [randomize(StaticEmbedding(make_tokenizer("bert").backend_tokenizer, embedding_dim=64))]


def transformer(name: str = "bert", **how: Any) -> list[nn.Module]:
    return list(make_sentence_transformer(name, normalize=False, **how))


def make_routed(
    query: list[nn.Module] | None = None, document: list[nn.Module] | None = None, **options: Any
) -> SentenceTransformer:
    """Two routes, static embeddings and a transformer, and a Normalize behind them."""
    router = Router({"query": query or static(), "document": document or transformer()}, **options)
    modules = [router, Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", prompts=PROMPTS).eval()


def attempt(call: Callable[[], Any]) -> Any:
    """What a call gives, or the error it raised, as text."""
    try:
        return call()
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module", params=OPTIONS)
def pair(request: pytest.FixtureRequest) -> tuple[FastEncoder, SentenceTransformer]:
    st = make_routed(**OPTIONS[request.param])
    return FastEncoder(st), st


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("call", CALLS)
def test_the_route_is_that_of_stock(
    pair: tuple[FastEncoder, SentenceTransformer],
    call: str,
    inputs: Any,
    launches: Callable[[], dict[tuple[str, str], int]],
) -> None:
    encoder, st = pair
    before = sum(encoder.stats.fallbacks.values())
    expected = attempt(lambda: CALLS[call](st, inputs))
    assert_same_result(attempt(lambda: CALLS[call](encoder, inputs)), expected)
    refused = isinstance(attempt(lambda: CALLS[call](st, "a text")), str)
    assert (launches() != {}) == (bool(inputs) and not refused)
    assert sum(encoder.stats.fallbacks.values()) - before == refused


@pytest.mark.parametrize("call", ["query", "document"])
def test_a_text_alone_has_the_same_bits(call: str) -> None:
    encoder = FastEncoder(make_routed(), dtype="bfloat16" if call == "query" else "float32")
    together = bits(CALLS[call](encoder, TEXTS))
    np.testing.assert_array_equal(together, [bits(CALLS[call](encoder, text)) for text in TEXTS])


class Numbers(nn.Module):
    """A first module of a user's own: a string that is a number is one to it."""

    modalities = ("text", "image")

    def preprocess(self, inputs: list[str], **_: Any) -> dict[str, Any]:
        return {"numbers": torch.tensor([float(len(text)) for text in inputs])}

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features | {"sentence_embedding": features["numbers"][:, None].repeat(1, WIDTH)}


@pytest.mark.filterwarnings("ignore:.*runs route 'document'")
def test_strings_that_may_be_something_else_run_in_stock() -> None:
    st = make_routed(document=[Numbers()], route_mappings={(None, "image"): "document"})
    encoder = FastEncoder(st)
    for inputs in (TEXTS, ["https://host/an_image.png"]):
        np.testing.assert_array_equal(encoder.encode(inputs), st.encode(inputs))
    assert encoder.stats.fallbacks == {"inputs of ['image', 'text']": 2}
    assert encoder.stats.texts == 0


# What changes after the first call


def _route(st: SentenceTransformer, name: str) -> Any:
    return st[0].sub_modules[name]


def _rows(st: SentenceTransformer) -> None:
    _route(st, "query")[0].embedding.weight.data.neg_()


def _weights(st: SentenceTransformer) -> None:
    base = _route(st, "document")[0].auto_model
    base.encoder.layer[0].output.dense.weight.data.neg_()


def _default(st: SentenceTransformer) -> None:
    st[0].default_route = "document"


def _mapping(st: SentenceTransformer) -> None:
    st[0].route_mappings["query", "text"] = "document"


def _exchanged(st: SentenceTransformer) -> None:
    routes = st[0].sub_modules
    routes["query"], routes["document"] = routes["document"], routes["query"]


def _pooling(st: SentenceTransformer) -> None:
    _route(st, "document")[1] = Pooling(WIDTH, "max")


def _dense(st: SentenceTransformer) -> None:
    _route(st, "query").append(randomize(Dense(WIDTH, 24)))


def _tail(st: SentenceTransformer) -> None:
    st[1] = randomize(Dense(WIDTH, WIDTH))


def _tokenizer(st: SentenceTransformer) -> None:
    _route(st, "query")[0].tokenizer.enable_truncation(3)


SERVED = _rows, _weights, _default, _mapping, _exchanged, _pooling, _dense, _tail, _tokenizer


def all_of(model: SentenceTransformer) -> list[np.ndarray]:
    return [CALLS[call](model, TEXTS) for call in ("encode", "query", "document")]


@pytest.mark.parametrize("change", SERVED)
def test_changes_are_served(change: Callable[[SentenceTransformer], None]) -> None:
    st = make_routed()
    encoder = FastEncoder(st)
    before = all_of(encoder)
    change(st)
    encoder[1] = st[1]
    after = all_of(encoder)
    for ours, theirs in zip(after, all_of(st), strict=True):
        assert_same_vectors(ours, theirs)
    moved = [
        a.shape != b.shape or cosine_distances(a, b).max() > MAX_DISTANCE
        for a, b in zip(after, before, strict=True)
    ]
    assert any(moved)
    assert encoder.stats.fallbacks == {}


def _forward(st: SentenceTransformer) -> None:
    forward = st[0].forward

    def run(features: Any, **how: Any) -> Any:
        found = forward(features, **how)
        return found | {"sentence_embedding": found["sentence_embedding"].square()}

    st[0].forward = run


def _preprocess(st: SentenceTransformer) -> None:
    preprocess = st[0].preprocess
    st[0].preprocess = lambda inputs, **how: preprocess([f"find {i}" for i in inputs], **how)


def _hook(st: SentenceTransformer) -> None:
    _route(st, "query")[0].register_forward_hook(lambda *_: None)


def _subclass(st: SentenceTransformer) -> None:
    st[0].__class__ = type("Own", (Router,), {})


# Which calls of three run in stock, and why.
REFUSED = {
    _forward: (3, "forward of Router was replaced on an instance"),
    _preprocess: (3, "preprocess of Router was replaced on an instance"),
    _hook: (2, "StaticEmbedding has forward hooks"),
    _subclass: (3, "the first module must be Transformer or StaticEmbedding, got Own"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_changes_that_run_in_stock(change: Callable[[SentenceTransformer], None]) -> None:
    st = make_routed()
    encoder = FastEncoder(st)
    all_of(encoder)
    change(st)
    assert_same_result(all_of(encoder), all_of(st))
    calls, reason = REFUSED[change]
    assert encoder.stats.fallbacks == {reason: calls}


def test_a_route_that_is_not_supported_runs_in_stock() -> None:
    st = make_routed(document=list(make_xlnet()))
    with pytest.warns(
        UserWarning, match="route 'document' of this model in .*: XLNetModel"
    ) as told:
        encoder = FastEncoder(st)
    assert [warning.filename for warning in told] == [__file__]
    for ours, theirs in zip(all_of(encoder), all_of(st), strict=True):
        assert_same_vectors(ours, theirs)
    ((reason, times),) = encoder.stats.fallbacks.items()
    assert (times, encoder.stats.texts) == (1, 2 * len(TEXTS))
    lines = explain(encoder).splitlines()
    assert lines[1].startswith("  encode, route 'query': packed, float32 on cpu, ops: ")
    assert lines[2] == f"  encode, route 'document': sentence-transformers: {reason}"
    assert encoder.unsupported_reason is None


def test_routes_that_share_a_model_share_its_weights() -> None:
    shared = transformer()
    twice = Normalize()
    query, document = [*shared, randomize(Dense(WIDTH, 24)), twice], [*shared, twice]
    st = make_routed(query, document)
    encoder = FastEncoder(st)
    for ours, theirs in zip(all_of(encoder), all_of(st), strict=True):
        assert_same_vectors(ours, theirs)
    engines = {
        id(engine) for each in encoder._session.assemblies.values() for engine in each._engines()
    }
    assert len(engines) == 1 and encoder.stats.fallbacks == {}


def test_a_warm_up_prepares_every_route() -> None:
    encoder = FastEncoder(make_routed())
    encoder.refresh()
    encoder.warmup()
    found = [found for each in encoder._session.assemblies.values() for found in each._engines()]
    assert len(found) == 2 and all(engine.current() is not None for engine in found)


def test_prompts_are_left_out_on_their_own_route() -> None:
    query, document = transformer("roberta"), transformer("bert")
    query[1].include_prompt = document[1].include_prompt = False
    st = make_routed(query, document)
    encoder = FastEncoder(st)
    for ours, theirs in zip(all_of(encoder), all_of(st), strict=True):
        assert_same_vectors(ours, theirs)
    assert encoder.stats.fallbacks == {}


def test_other_outputs() -> None:
    st = make_routed()
    encoder = FastEncoder(st)
    how: dict[str, Any] = {"task": "document", "output_value": "token_embeddings"}
    assert_same_result(encoder.encode(TEXTS, **how), st.encode(TEXTS, **how))
    assert encoder.stats.fallbacks == {}
    how["output_value"] = None
    ours, theirs = (model.encode(TEXTS[:1], **how) for model in (encoder, st))
    assert_same_result(ours, theirs)
    encoder.encode(TEXTS, modality="text")
    assert encoder.stats.fallbacks == {
        "output_value=None of a Router": 1,
        "argument 'modality'": 1,
    }


def test_parts_of_documents_are_pooled_on_their_route() -> None:
    document = "the old road by the water. rain and stones"
    spans = [(0, 26), (27, len(document))]
    alone = FastEncoder(modules=[*transformer(), Normalize()], device="cpu")
    expected = alone.encode_chunks(document, spans)
    routed = FastEncoder(make_routed(document=list(alone)[:2]))
    assert_same_vectors(routed.encode_chunks(document, spans, task="document"), expected)
    with pytest.raises(ValueError, match="No route found for task type 'other'"):
        routed.encode_chunks(document, spans, task="other")


def test_without_a_default_route_there_is_a_reason() -> None:
    encoder = FastEncoder(make_routed(allow_empty_key=False))
    assert encoder.packed_engine is None
    assert str(encoder.unsupported_reason).startswith("Could not determine route for task=None")
    assert "encode, route 'document': packed" in explain(encoder)


def test_saved_pickled_and_copied(tmp_path: Path) -> None:
    st = make_routed(route_mappings={("query", None): "query"})
    expected = all_of(st)
    FastEncoder(st).save_pretrained(str(tmp_path))
    loaded = FastEncoder(str(tmp_path), device="cpu")
    for encoder in (loaded, pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        for ours, theirs in zip(all_of(encoder), expected, strict=True):
            assert_same_vectors(ours, theirs)
        assert encoder.stats.fallbacks == {}


def test_what_was_derived_of_other_routes_is_dropped() -> None:
    st = make_routed()
    encoder = FastEncoder(st)
    assert set(encoder._session.assemblies) == {"query", "document"}
    encoder[0] = torch.nn.Sequential(*encoder[0].sub_modules["document"])[0]
    encoder.insert(1, Pooling(WIDTH))
    encoder.encode(TEXTS)
    assert set(encoder._session.assemblies) == {None}
