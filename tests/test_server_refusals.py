"""The server says no: in the shape of each API, under load, and to whatever comes."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from typing import Any

import pytest
import torch

from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder
from sbert_fast.errors import InvalidWeightsError
from serving import SECRET, Answer, ask, asked

pytest.importorskip("starlette", reason="the server is an extra")
from sbert_fast.server import tei  # noqa: E402
from sbert_fast.server.app import create_app  # noqa: E402
from sbert_fast.server.errors import KINDS  # noqa: E402
from sbert_fast.server.models import Served  # noqa: E402
from sbert_fast.server.service import Service  # noqa: E402
from sbert_fast.server.settings import Settings  # noqa: E402
from tiny_service import held, make_service  # noqa: E402

TEXTS = make_texts(6, seed=4)
LONG = "word " * 200


@pytest.fixture(scope="module")
def service() -> Service:
    return make_service(max_texts=50, max_body=20_000)


@pytest.fixture(scope="module")
def app(service: Service) -> Any:
    return create_app(service)


# Refusals

_TEI, _OPENAI, _COHERE = "error", "error.message", "message"


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("/embed", b"{", 400, "the body is not valid JSON"),
        ("/embed", b"[" * 5000, 400, "the body is not valid JSON"),
        ("/embed", b'{"inputs": "\\ud800"}', 400, "the body is not valid JSON"),
        ("/embed", [], 422, "the body must be an object, got an array"),
        ("/embed", {}, 422, "inputs is missing"),
        ("/embed", {"inputs": []}, 400, "`inputs` cannot be empty"),
        ("/embed", {"inputs": None}, 422, "inputs must be a string or an array, got null"),
        ("/embed", {"inputs": ["a", 1.5]}, 422, r"inputs[1] must be a string or an array"),
        ("/embed", {"inputs": [True]}, 422, "inputs[0] must be a string or an array"),
        ("/embed", {"inputs": [1, -1]}, 422, "inputs[1] must be a token id, got -1"),
        ("/embed", {"inputs": [1 << 30]}, 422, "inputs[0] holds ids that are no tokens"),
        ("/embed", {"inputs": [[]]}, 400, "inputs[0] holds no token"),
        ("/embed", {"inputs": "a", "normalize": 1}, 422, "normalize must be a boolean"),
        ("/embed", {"inputs": "a", "dimensions": 0}, 422, "dimensions must be a positive integer"),
        ("/embed", {"inputs": "a", "dimensions": 10**6}, 422, "dimensions must be at most"),
        ("/embed", {"inputs": "a", "prompt_name": "no"}, 422, "model's prompts: query"),
        ("/embed", {"inputs": LONG, "truncate": False}, 422, "must have less than"),
        ("/embed", {"inputs": "a", "truncation_direction": "up"}, 422, "right, left"),
        ("/embed", {"inputs": ["a"] * 51}, 422, "batch size 51 > maximum allowed batch size 50"),
        ("/embed", {"inputs": ["a", ""]}, 400, "`inputs` cannot be empty, got an empty text at 1"),
        ("/embed_all", {"inputs": "lion " * 40}, 413, "the response would be too large"),
        ("/embed_sparse", {"inputs": "a"}, 424, "model is not a sparse embedding model"),
        ("/predict", {"inputs": [["a", "b", "c"]]}, 422, "inputs[0] must be an array of one or"),
        ("/predict", {"inputs": ["a", 2]}, 422, "inputs[1] must be a string"),
        ("/rerank", {"query": "a", "texts": []}, 400, "`texts` cannot be empty"),
        ("/rerank", {"query": "a", "texts": ["b", {}]}, 422, "texts[1] must be a string"),
        ("/similarity", {"inputs": {"source_sentence": "a"}}, 422, "sentences is missing"),
        ("/decode", {"ids": [[1], "a"]}, 422, "ids[1] must be an array of token ids"),
        ("/nowhere", {}, 404, "there is no such route"),
        ("/embed", None, 405, "method not allowed"),
        ("/embed", b"a" * 20_001, 413, "the body has more than 20000 bytes"),
        ("/v1/embeddings", {"input": []}, 400, "`input` cannot be empty"),
        ("/v1/embeddings", {"input": "a", "model": "no"}, 404, "no model of this name"),
        ("/v1/embeddings", {"input": "a", "model": "ranks"}, 400, "not an embedding model"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "x"}, 400, "float, base64"),
        ("/v1/nowhere", {}, 404, "there is no such route"),
        ("/v2/embed", {"model": "tiny", "texts": ["a"], "embedding_types": ["int8"]}, 400, "int8"),
        ("/v2/embed", {"model": "tiny", "images": ["a"]}, 400, "images is not supported"),
        ("/v2/rerank", {"model": "ranks", "query": "a", "documents": [1]}, 400, "documents[0]"),
        ("/v2/rerank", {"model": "ranks", "query": "a", "documents": ["b"],
                        "max_tokens_per_doc": 9}, 400, "max_tokens_per_doc is not supported"),
    ],
)  # fmt: skip
def test_refusals(
    app: Any, path: str, body: Any, status: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 30 tokens, or few more.
    monkeypatch.setattr(tei, "_MOST_NUMBERS", 30 * 64)
    answer = ask(app, path, body)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert told in message_of(path, answer)


def message_of(path: str, answer: Answer) -> str:
    """The message of an error, which has the shape that the API of the path has for it."""
    found = answer.json
    if path.startswith("/v1/"):
        assert found["error"].keys() == {"message", "type", "param", "code"}
        return found["error"]["message"]
    if path.startswith("/v2/"):
        assert found.keys() == {"message"}
        return found["message"]
    assert found.keys() == {"error", "error_type"}
    return found["error"]


def test_a_token(service: Service) -> None:
    app = create_app(make_service(token="secret-token"))
    for headers in ({}, {"authorization": "Bearer secret"}, {"authorization": "secret-token"}):
        for path, body in (("/embed", {"inputs": "a"}), ("/info", None), ("/v1/models", None)):
            assert ask(app, path, body, headers).status == 401
    good = {"authorization": "Bearer secret-token"}
    assert ask(app, "/embed", {"inputs": "a"}, good).status == 200
    assert ask(app, "/info", None, good).json["model_id"] == "tiny"
    assert [ask(app, path).status for path in ("/health", "/ping", "/", "/metrics")] == [200] * 4


def test_an_embedding_that_is_not_finite() -> None:
    st = make_sentence_transformer()
    served = Served("tiny", FastEncoder(st))
    (number,) = st.tokenizer("lion", add_special_tokens=False)["input_ids"][:1]
    with torch.no_grad():
        st[0].auto_model.embeddings.word_embeddings.weight[number] = 3e38
    app = create_app(Service([served], Settings()))
    answer = ask(app, "/embed", {"inputs": ["tiger", "tiger", "lion"]})
    assert (answer.status, answer.json["error_type"]) == (500, "Backend")
    assert "at the index 2 of the inputs" in answer.json["error"]
    assert ask(app, "/embed", {"inputs": ["tiger"]}).status == 200


@pytest.mark.parametrize("error", [ValueError, InvalidWeightsError])
def test_an_error_of_the_server_is_logged(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service()

    def fails(inputs: Any, options: dict[str, Any]) -> Any:
        raise error(SECRET)

    service.models["tiny"].queue._runner.run = fails
    answer = ask(create_app(service), "/embed", {"inputs": "a"})
    assert (answer.status, answer.json["error_type"]) == (500, "Backend")
    assert error.__name__ in caplog.text and SECRET not in caplog.text + answer.json["error"]


def test_a_body_that_never_begins() -> None:
    app = create_app(make_service(read_seconds=0.05))
    scope = {
        "type": "http", "method": "POST", "path": "/embed", "query_string": b"", "root_path": "",
        "headers": [(b"content-length", b"10")],
    }  # fmt: skip
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    assert sent[0]["status"] == 408


def test_failures_are_counted_from_none_on() -> None:
    app = create_app(make_service())
    text = ask(app, "/metrics").body.decode()
    for kind in (*KINDS, "dropped"):
        assert f'te_request_failure{{err="{kind}"}} 0.0' in text


def test_health_compares(service: Service) -> None:
    fresh = make_service()
    app = create_app(fresh)
    assert ask(app, "/health").status == 200
    with torch.no_grad():
        fresh.models["tiny"].model[0].auto_model.embeddings.LayerNorm.bias += 1
    answer = ask(app, "/health")
    assert (answer.status, answer.json) == (503, {"error": "unhealthy", "error_type": "Unhealthy"})
    assert 'te_request_failure{err="unhealthy"} 1.0' in ask(app, "/metrics").body.decode()


# Load


def test_load() -> None:
    """A full queue refuses, a deadline passes, a client leaves: what is left runs."""
    service = make_service(queue_tokens=40, deadline=0.5)
    app, queue = create_app(service), service.models["tiny"].queue
    gate = held(service)

    async def main() -> list[Answer]:
        first = asyncio.ensure_future(asked(app, "/embed", {"inputs": "a"}))
        while not queue.waiting_texts == 0 or queue._thread is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        leaves = asyncio.Event()
        gone = asyncio.ensure_future(asked(app, "/embed", {"inputs": "b b b"}, leaves=leaves))
        late = asyncio.ensure_future(asked(app, "/v1/embeddings", {"input": "c " * 20}))
        while queue.waiting_texts < 2:
            await asyncio.sleep(0.01)
        full = await asked(app, "/embed", {"inputs": "d " * 30})
        leaves.set()
        nothing = await gone
        while queue.waiting_texts > 1:
            await asyncio.sleep(0.01)
        late_answer = await late
        gate.set()
        return [
            await first,
            full,
            nothing,
            late_answer,
            await asked(app, "/embed", {"inputs": "e"}),
        ]

    first, full, nothing, late, last = asyncio.run(main())
    assert (full.status, full.json["error_type"]) == (429, "Overloaded")
    assert int(full.headers["retry-after"]) >= 1
    assert (nothing.status, late.status) == (0, 503)
    assert late.json["error"]["code"] == "deadline"
    assert (first.status, last.status) == (200, 200)
    text = ask(app, "/metrics").body.decode()
    for kind in ("overloaded", "dropped", "deadline"):
        assert f'te_request_failure{{err="{kind}"}} 1.0' in text


def test_too_many_requests_at_a_time() -> None:
    service = make_service(max_requests=2)
    app = create_app(service)
    gate = held(service)

    async def main() -> list[Answer]:
        asking = [asyncio.ensure_future(asked(app, "/embed", {"inputs": "a"})) for _ in range(4)]
        done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        gate.set()
        return await asyncio.gather(*asking)

    assert sorted(answer.status for answer in asyncio.run(main())) == [200, 200, 429, 429]


def _random_body(rng: random.Random, depth: int = 0) -> Any:
    kinds = [None, True, -1, 7, 1.5, "", SECRET, "lion " * 9, 1 << 40]
    if depth > 3 or rng.random() < 0.4:
        return rng.choice(kinds)
    if rng.random() < 0.4:
        return [_random_body(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ["inputs", "input", "query", "texts", "ids", "model", "truncate", "normalize"]
    names += ["dimensions", "documents", "parameters", "source_sentence", "sentences", "top_n"]
    return {rng.choice(names): _random_body(rng, depth + 1) for _ in range(rng.randrange(5))}


def test_random_bodies(
    app: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """None brings the server down, none is an error of the server's, none is in a log."""
    rng = random.Random(5)
    paths = ["/embed", "/embed_all", "/rerank", "/predict", "/similarity", "/tokenize", "/decode"]
    paths += ["/v1/embeddings", "/v2/embed", "/v2/rerank"]

    async def main() -> list[int]:
        found = []
        for _ in range(2000):
            body = _random_body(rng)
            content = json.dumps(body).encode()
            if rng.random() < 0.1:
                content = bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
            found.append((await asked(app, rng.choice(paths), content)).status)
        return found

    with caplog.at_level(logging.DEBUG):
        statuses = asyncio.run(main())
    assert {status for status in statuses if status >= 500} == set()
    assert SECRET not in caplog.text + "".join(capfd.readouterr())
    assert ask(app, "/health").status == 200
