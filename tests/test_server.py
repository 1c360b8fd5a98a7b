"""The server's routes, in this process: results of the model, refusals in the API's own shape."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SpladePooling

from families import (
    make_cross_encoder,
    make_sentence_transformer,
    make_texts,
    make_tokenizer,
    make_xlnet,
    save_model,
)
from rerankers import make_reranker
from sbert_fast import FastCrossEncoder, FastEncoder
from sbert_fast.cli.serve import name_of
from serving import ask

pytest.importorskip("starlette", reason="the server is an extra")
from sbert_fast.server.app import create_app  # noqa: E402
from sbert_fast.server.models import Served, load  # noqa: E402
from sbert_fast.server.service import Service  # noqa: E402
from sbert_fast.server.settings import Settings  # noqa: E402
from tiny_service import make_service  # noqa: E402

TEXTS = make_texts(6, seed=4)
LONG = "word " * 200


@pytest.fixture(scope="module")
def service() -> Service:
    return make_service(max_texts=50, max_body=20_000)


@pytest.fixture(scope="module")
def app(service: Service) -> Any:
    return create_app(service)


def encode(service: Service, texts: Any, **options: Any) -> Any:
    return service.models["tiny"].model.encode(texts, **options)


# Results


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"inputs": TEXTS}, {}),
        ({"inputs": TEXTS[0]}, {}),
        ({"inputs": TEXTS, "normalize": False, "prompt_name": "query"}, {"prompt": "find: "}),
        ({"inputs": TEXTS, "dimensions": 5, "truncate": None}, {"truncate_dim": 5}),
        ({"inputs": [LONG, "a"], "truncate": True, "truncation_direction": "Right"}, {}),
    ],
    ids=["list", "single", "prompt", "dimensions", "cut"],
)
@pytest.mark.parametrize("path", ["/embed", "/"])
def test_embed(app: Any, service: Service, path: str, body: Any, options: Any) -> None:
    answer = ask(app, path, body)
    texts = body["inputs"] if isinstance(body["inputs"], list) else [body["inputs"]]
    wanted = encode(service, texts, normalize_embeddings=body.get("normalize", True), **options)
    np.testing.assert_array_equal(answer.rows, wanted)
    assert answer.headers["x-compute-characters"] == str(sum(map(len, texts)))
    assert int(answer.headers["x-compute-tokens"]) > 0


def test_texts_may_lose_their_beginning(app: Any, service: Service) -> None:
    length = service.models["tiny"].max_length
    end = " ".join(f"lion{n % 7}" for n in range(length))
    body = {"inputs": [LONG + end], "truncation_direction": "left"}
    left = ask(app, "/embed", body).rows
    np.testing.assert_array_equal(left, ask(app, "/embed", body | {"inputs": [end * 3 + end]}).rows)
    assert not np.array_equal(left, ask(app, "/embed", {"inputs": [LONG + end]}).rows)


def in_service(model: Any) -> tuple[Any, Any]:
    """The application of a model, and the model."""
    return create_app(Service([Served("one", model)], Settings())), model


@pytest.mark.parametrize("is_reranker", [False, True])
def test_a_default_prompt(is_reranker: bool) -> None:
    own: dict[str, Any] = {"prompts": {"query": "find: "}, "default_prompt_name": "query"}
    if is_reranker:
        raw = with_prompt(make_reranker(), own)
        app, model = in_service(FastCrossEncoder(raw, activation_fn=torch.nn.Identity()))
        body = {"query": TEXTS[0], "texts": TEXTS[1:2], "raw_scores": True}
        found = np.float32(ask(app, "/rerank", body).json[0]["score"])
        assert found == model.predict([(TEXTS[0], TEXTS[1])])
    else:
        app, model = in_service(FastEncoder(with_prompt(make_sentence_transformer(), own)))
        found = ask(app, "/embed", {"inputs": TEXTS, "normalize": False}).rows
        np.testing.assert_array_equal(found, model.encode(TEXTS))
    assert ask(app, "/health").status == 200


def with_prompt(model: Any, own: dict[str, Any]) -> Any:
    for name, value in own.items():
        setattr(model, name, value)
    return model


LEFT = {"truncation_direction": "left"}


@pytest.mark.parametrize("cut", [LEFT, {"truncate": False}], ids=["left", "none"])
@pytest.mark.parametrize("kind", ["unaccelerated", "sparse", "single", "template"])
def test_what_is_not_cut_as_asked_is_refused(kind: str, cut: Any, tmp_path: Path) -> None:
    path, body, short = "/embed", {"inputs": LONG}, {"inputs": "a"}
    if kind == "unaccelerated":
        app, model = in_service(FastEncoder(make_xlnet()))
        model.max_seq_length = 20
        app, _ = in_service(model)
    elif kind == "sparse":
        path, app = "/embed_sparse", create_app(Service([sparse(tmp_path)], Settings()))
    elif kind == "single":
        path, app = "/predict", in_service(FastCrossEncoder(make_cross_encoder()))[0]
    else:
        model = make_reranker()
        model.max_seq_length = 40
        app, _ = in_service(FastCrossEncoder(model))
        path, body = "/rerank", {"query": "a", "texts": [LONG]}
        short = {"query": "a", "texts": ["b"]}
    assert ask(app, path, body | cut).status == (424 if cut is LEFT else 422)
    assert ask(app, path, body | {"truncate": True}).status == 200
    if cut is not LEFT:
        assert ask(app, path, short | cut).status == 200


def test_a_cut_fits_the_positions() -> None:
    """Some rows of RoBERTa's table are nobody's position."""
    st = make_sentence_transformer("roberta")
    st.max_seq_length = rows = st[0].auto_model.config.max_position_embeddings
    app, _ = in_service(FastEncoder(st))
    most = ask(app, "/info").json["max_input_length"]
    assert most < rows
    long = "word " * rows
    left = ask(app, "/embed", {"inputs": long, "truncation_direction": "left"})
    assert (left.status, left.headers["x-compute-tokens"]) == (200, str(most))
    answer = ask(app, "/embed", {"inputs": long, "truncate": False})
    assert f"must have less than {most} tokens" in answer.json["error"]


def test_the_copy_that_cuts_is_made_once(app: Any, service: Service) -> None:
    served, body = service.models["tiny"], {"inputs": LONG, "truncation_direction": "left"}
    ask(app, "/embed", body)
    kept = served._cutting
    assert kept is not None and ask(app, "/embed", body).status == 200
    assert served._cutting is kept


def test_a_model_without_a_limit() -> None:
    static = StaticEmbedding(make_tokenizer("bert").backend_tokenizer, embedding_dim=8)
    static.tokenizer.no_truncation()
    app, model = in_service(FastEncoder(modules=[static], device="cpu"))
    assert ask(app, "/info").json["max_input_length"] is None
    found = ask(app, "/embed", {"inputs": TEXTS, "normalize": False, "truncate": False}).rows
    np.testing.assert_array_equal(found, model.encode(TEXTS))


def test_embed_all(app: Any, service: Service) -> None:
    states = encode(service, TEXTS[:2], output_value="token_embeddings")
    answer = ask(app, "/embed_all", {"inputs": TEXTS[:2]}).json
    assert len(answer) == 2
    for ours, expected in zip(answer, states, strict=True):
        np.testing.assert_array_equal(np.array(ours, dtype=np.float32), expected.numpy())


def test_similarity(app: Any, service: Service) -> None:
    inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS[:3]}
    found = ask(app, "/similarity", {"inputs": inputs, "parameters": None}).rows
    rows = encode(service, TEXTS[:3], normalize_embeddings=True)
    np.testing.assert_array_equal(found, rows @ rows[0])


def test_rerank(app: Any, service: Service) -> None:
    logits = service.models["ranks"].model.predict([(TEXTS[0], text) for text in TEXTS[1:]])
    body = {"query": TEXTS[0], "texts": TEXTS[1:], "raw_scores": True, "return_text": True}
    answer = ask(app, "/rerank", body).json
    assert [each["index"] for each in answer] == np.argsort(-logits).tolist()
    for each in answer:
        assert (np.float32(each["score"]), each["text"]) == (
            logits[each["index"]],
            TEXTS[1:][each["index"]],
        )
    scores = ask(app, "/rerank", body | {"raw_scores": False, "return_text": False}).json
    assert all(each.keys() == {"index", "score"} for each in scores)
    sigmoids = 1 / (1 + np.exp(-np.sort(logits)[::-1].astype(np.float64)))
    np.testing.assert_allclose([each["score"] for each in scores], sigmoids, rtol=1e-6)
    cohere = {"model": "ranks", "query": TEXTS[0], "documents": TEXTS[1:], "top_n": 2}
    results = ask(app, "/v2/rerank", cohere).json["results"]
    assert [(r["index"], r["relevance_score"]) for r in results] == [
        (each["index"], each["score"]) for each in scores[:2]
    ]


def test_predict(app: Any, service: Service) -> None:
    pairs = [[TEXTS[0], text] for text in TEXTS[1:4]]
    logits = service.models["sorts"].model.predict(pairs)
    answer = ask(app, "/predict", {"inputs": pairs, "raw_scores": True}).json
    for row, expected in zip(answer, logits, strict=True):
        order = np.argsort(-expected).tolist()
        assert [each["label"] for each in row] == [f"LABEL_{index}" for index in order]
        np.testing.assert_array_equal(np.float32([each["score"] for each in row]), expected[order])
    one = ask(app, "/predict", {"inputs": pairs[0]}).json
    np.testing.assert_allclose(sum(each["score"] for each in one), 1, rtol=1e-6)
    assert [each["label"] for each in one] == [each["label"] for each in answer[0]]
    # Texts that are no pairs, among pairs.
    mixed = ask(app, "/predict", {"inputs": [[TEXTS[0]], pairs[0], [TEXTS[1]]]}).json
    assert mixed[1] == one
    assert mixed[0] == ask(app, "/predict", {"inputs": TEXTS[0]}).json


def test_tokens(app: Any, service: Service) -> None:
    text = "a Lion, näive"
    (tokens,) = ask(app, "/tokenize", {"inputs": text}).json
    own = [token for token in tokens if not token["special"]]
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in own)
    assert [token["id"] for token in tokens] == service.models["tiny"].model.tokenizer(
        text
    ).input_ids
    (bare,) = ask(app, "/tokenize", {"inputs": [text], "add_special_tokens": False}).json
    assert bare == own
    ids = [token["id"] for token in own]
    (decoded,) = ask(app, "/decode", {"ids": ids}).json
    assert ask(app, "/decode", {"ids": [ids, ids]}).json == [decoded, decoded]
    # Ids mean the text that they stand for.
    by_ids = ask(app, "/v1/embeddings", {"input": [ids]}).json["data"][0]["embedding"]
    np.testing.assert_array_equal(
        np.array(by_ids, dtype=np.float32), encode(service, decoded, normalize_embeddings=True)
    )


def test_openai(app: Any, service: Service) -> None:
    expected = encode(service, TEXTS, normalize_embeddings=True, truncate_dim=8)
    body = {"input": TEXTS, "model": "tiny", "dimensions": 8, "encoding_format": "base64"}
    answer = ask(app, "/v1/embeddings", body).json
    rows = [np.frombuffer(base64.b64decode(e["embedding"]), "<f4") for e in answer["data"]]
    np.testing.assert_array_equal(np.stack(rows), expected)
    assert [each["index"] for each in answer["data"]] == list(range(len(TEXTS)))
    tokens = sum(map(len, service.models["tiny"].model.tokenizer(TEXTS).input_ids))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [m["id"] for m in ask(app, "/v1/models").json["data"]] == list(service.models)


def test_cohere(app: Any, service: Service) -> None:
    body = {"model": "tiny", "texts": TEXTS, "input_type": "search_query"}
    body["embedding_types"] = ["float", "binary", "ubinary", "base64"]
    found = ask(app, "/v2/embed", body).json["embeddings"]
    expected = encode(service, TEXTS, prompt_name="query", normalize_embeddings=True)
    np.testing.assert_array_equal(np.array(found["float"], dtype=np.float32), expected)
    for kind in ("binary", "ubinary"):
        wanted = encode(service, TEXTS, prompt_name="query", precision=kind)
        np.testing.assert_array_equal(found[kind], wanted)
    assert base64.b64decode(found["base64"][1]) == expected[1].tobytes()


def sparse(tmp_path: Path) -> Served:
    save_model("bert", str(tmp_path / "base"), head="AutoModelForMaskedLM")
    base = Transformer(str(tmp_path / "base"), transformer_task="fill-mask")
    SparseEncoder(modules=[base, SpladePooling()]).save_pretrained(str(tmp_path / "splade"))
    return load("splade", str(tmp_path / "splade"), device="cpu")


def test_embed_sparse(tmp_path: Path) -> None:
    served = sparse(tmp_path)
    app = create_app(Service([served], Settings()))
    expected = served.model.encode(TEXTS[:3], convert_to_sparse_tensor=False).numpy()
    found = np.zeros_like(expected)
    for row, values in enumerate(ask(app, "/embed_sparse", {"inputs": TEXTS[:3]}).json):
        for each in values:
            found[row, each["index"]] = each["value"]
    np.testing.assert_array_equal(found, expected)
    assert ask(app, "/health").status == 200
    assert ask(app, "/embed", {"inputs": "a"}).status == 424


def test_metrics(app: Any, service: Service) -> None:
    ask(app, "/embed", {"inputs": [LONG, "b"]})
    text = ask(app, "/metrics").body.decode()
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    for name in ("request_duration_count", "batch_next_tokens_count", "embed_queue_duration_sum"):
        assert float(samples[f"te_{name}"]) > 0
    assert float(samples['te_request_success{method="batch"}']) > 0
    assert float(samples['sbert_fast_truncated_total{model="tiny"}']) > 0
    assert float(samples["sbert_fast_padded_tokens_total"]) == 0
    assert float(samples["te_queue_size"]) == 0


def test_the_document_has_examples_that_work(app: Any) -> None:
    document = ask(app, "/openapi.json").json
    names = {"MODEL": "tiny", "RERANKER": "ranks"}
    for path, operations in document["paths"].items():
        if "post" not in operations:
            continue
        content = operations["post"]["requestBody"]["content"]["application/json"]
        example = content["example"]
        example["model"] = names.get(example.get("model", ""), "tiny")
        expected = 424 if path == "/embed_sparse" else 200
        assert (path, ask(app, path, example).status) == (path, expected)
        assert set(example) - {"model"} <= set(content["schema"]["properties"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [("a/b", ("a/b", "a/b")), ("mine=a/b", ("mine", "a/b")), ("tests", ("tests", "tests"))],
)
def test_names(given: str, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import ROOT

    monkeypatch.chdir(ROOT)
    assert name_of(given) == expected
