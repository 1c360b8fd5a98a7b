"""The OpenAPI document of a server, with an example for every route."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from sbert_fast.server.service import Service

_STRING = {"type": "string"}
_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}
_POSITIVE = {"type": ["integer", "null"], "minimum": 1}
_ID = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}


def version() -> str:
    """The version of this package; empty where it runs from its sources."""
    try:
        return metadata.version("sbert-fast")
    except metadata.PackageNotFoundError:
        return ""


def _array(of: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": of, **more}


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required or [], "properties": properties}


def _flag(default: bool | None) -> dict[str, Any]:
    return {"type": ["boolean", "null"], "default": default}


def _one(*names: str, default: str) -> dict[str, Any]:
    return {"enum": list(names), "default": default}


_TEXTS = _array(_STRING, minItems=1)
_IDS = _array(_ID, minItems=1)
_INPUT = {"anyOf": [_STRING, _IDS, _array({"anyOf": [_STRING, _IDS]}, minItems=1)]}
_PAIR = _array(_STRING, minItems=1, maxItems=2)
_NAME = {"type": ["string", "null"], "default": None}
_CUT: dict[str, Any] = {
    "truncate": _flag(None),
    "truncation_direction": _one("right", "left", "Right", "Left", default="right"),
}
_VECTORS = _array(_array(_NUMBER))
_SCORES = _array(_object(["score", "label"], score=_NUMBER, label=_STRING))
_TOKEN = _object(
    ["id", "text", "special", "start", "stop"],
    id=_COUNT,
    text=_STRING,
    special={"type": "boolean"},
    start={"type": ["integer", "null"]},
    stop={"type": ["integer", "null"]},
)
_OPENAI = _object(
    ["object", "data", "model", "usage"],
    object={"const": "list"},
    data=_array(
        _object(
            ["object", "embedding", "index"],
            object={"const": "embedding"},
            embedding={"anyOf": [_array(_NUMBER), _STRING]},
            index=_COUNT,
        )
    ),
    model=_STRING,
    usage=_object(["prompt_tokens", "total_tokens"], prompt_tokens=_COUNT, total_tokens=_COUNT),
)
_META = _object(["api_version", "billed_units"])
_ERRORS = {
    "tei": _object(["error", "error_type"], error=_STRING, error_type=_STRING),
    "openai": _object(["error"], error=_object(["message", "type", "param", "code"])),
    "cohere": _object(["message"], message=_STRING),
}
_STATUSES = {
    "400": "The body is not valid JSON, or a text is empty",
    "401": "No token, or another",
    "404": "No such model",
    "408": "The request took too long to arrive",
    "413": "The body is too large",
    "422": "A value is invalid; the message names it",
    "424": "The model is of another kind",
    "429": "Too much waits; Retry-After says for how long",
    "431": "The headers are too large",
    "500": "The result is not finite; the message names the index",
    "503": "The deadline passed before the model got to the request",
}


def _posts() -> dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """By path: API, summary, request, example, response."""
    prompted: Any = {"prompt_name": _NAME, **_CUT}
    text, texts = "What is deep learning?", ["It learns.", "It rains."]
    embedding = _object(
        ["inputs"], inputs=_INPUT, normalize=_flag(True), dimensions=_POSITIVE, **prompted
    )
    openai = _object(
        ["input"],
        input=_INPUT,
        model=_NAME,
        user=_NAME,
        encoding_format=_one("float", "base64", default="float"),
        dimensions=_POSITIVE,
    )
    plain = _object(["inputs"], inputs=_INPUT, **prompted)
    openai_example = {"input": [text], "encoding_format": "float"}
    return {
        "/embed": ("tei", "Embed", embedding, {"inputs": text}, _VECTORS),
        "/embed_all": ("tei", "Embed every token", plain, {"inputs": text}, _array(_VECTORS)),
        "/embed_sparse": (
            "tei",
            "Embed by SPLADE",
            plain,
            {"inputs": text},
            _array(_array(_object(["index", "value"], index=_COUNT, value=_NUMBER))),
        ),
        "/tokenize": (
            "tei",
            "Tokenise",
            _object(
                ["inputs"],
                inputs={"anyOf": [_STRING, _TEXTS]},
                add_special_tokens=_flag(True),
                prompt_name=_NAME,
            ),
            {"inputs": text},
            _array(_array(_TOKEN)),
        ),
        "/decode": (
            "tei",
            "Make texts of tokens",
            _object(
                ["ids"],
                ids={"anyOf": [_IDS, _array(_IDS, minItems=1)]},
                skip_special_tokens=_flag(True),
            ),
            {"ids": [1, 2]},
            _array(_STRING),
        ),
        "/embeddings": ("openai", "Embed", openai, openai_example, _OPENAI),
        "/v1/embeddings": ("openai", "Embed", openai, openai_example, _OPENAI),
        **_scores(text, texts, prompted),
        **_cohere(text, texts),
    }


def _scores(text: str, texts: list[str], prompted: dict[str, Any]) -> dict[str, Any]:
    return {
        "/similarity": (
            "tei",
            "Compare a text with others",
            _object(
                ["inputs"],
                inputs=_object(
                    ["source_sentence", "sentences"], source_sentence=_STRING, sentences=_TEXTS
                ),
                parameters={"anyOf": [_object(**prompted), {"type": "null"}]},
            ),
            {"inputs": {"source_sentence": text, "sentences": texts}},
            _array(_NUMBER),
        ),
        "/rerank": (
            "tei",
            "Rank texts for a query",
            _object(
                ["query", "texts"],
                query=_STRING,
                texts=_TEXTS,
                raw_scores=_flag(False),
                return_text=_flag(False),
                **_CUT,
            ),
            {"query": text, "texts": texts},
            _array(_object(["index", "score"], index=_COUNT, score=_NUMBER, text=_STRING)),
        ),
        "/predict": (
            "tei",
            "Classify",
            _object(
                ["inputs"],
                inputs={"anyOf": [_STRING, _PAIR, _array(_PAIR, minItems=1)]},
                raw_scores=_flag(False),
                **_CUT,
            ),
            {"inputs": [[text, texts[0]]]},
            {"anyOf": [_SCORES, _array(_SCORES)]},
        ),
    }


def _cohere(text: str, texts: list[str]) -> dict[str, Any]:
    kinds = "search_document", "search_query", "classification", "clustering"
    return {
        "/v2/embed": (
            "cohere",
            "Embed",
            _object(
                ["model", "texts"],
                model=_STRING,
                texts=_TEXTS,
                input_type=_one(*kinds, default=kinds[0]),
                embedding_types=_array(
                    {"enum": ["float", "base64", "binary", "ubinary"]}, minItems=1
                ),
                truncate=_one("NONE", "START", "END", default="END"),
                output_dimension=_POSITIVE,
            ),
            {"model": "MODEL", "texts": texts, "input_type": kinds[0]},
            _object(["id", "embeddings", "texts", "meta"], id=_STRING, texts=_TEXTS, meta=_META),
        ),
        "/v2/rerank": (
            "cohere",
            "Rank texts for a query",
            _object(
                ["model", "query", "documents"],
                model=_STRING,
                query=_STRING,
                documents=_TEXTS,
                top_n=_POSITIVE,
            ),
            {"model": "RERANKER", "query": text, "documents": texts, "top_n": 1},
            _object(
                ["id", "results", "meta"],
                id=_STRING,
                results=_array(
                    _object(["index", "relevance_score"], index=_COUNT, relevance_score=_NUMBER)
                ),
                meta=_META,
            ),
        ),
    }


def document(service: Service) -> dict[str, Any]:
    """The document of a server."""
    secured: list[Any] = [] if service.settings.token is None else [{"bearer": []}]
    paths: dict[str, Any] = {
        path: {"post": _operation(path, *described, secured)}
        for path, described in _posts().items()
    }
    plain = {"text/plain": {"schema": _STRING}}
    gets = {
        "/health": ("Whether the models still give the results of the start", None, []),
        "/metrics": ("Metrics for Prometheus", plain, []),
        "/info": ("What is served", {"application/json": {"schema": _object()}}, secured),
        "/v1/models": ("The models", {"application/json": {"schema": _object(["data"])}}, secured),
    }
    for path, (told, content, security) in gets.items():
        responses: dict[str, Any] = {"200": {"description": "Done"}}
        if content is not None:
            responses["200"]["content"] = content
        for status in ("503",) if path == "/health" else ("401",) if security else ():
            responses[status] = _failure("openai" if path == "/v1/models" else "tei", status)
        paths[path] = {"get": {"summary": told, "responses": responses, "security": security}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sbert-fast", "version": version()},
        "paths": paths,
        "components": {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(
    path: str,
    api: str,
    summary: str,
    request: dict[str, Any],
    example: dict[str, Any],
    response: dict[str, Any],
    secured: list[Any],
) -> dict[str, Any]:
    return {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_"),
        "security": secured,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": request, "example": example}},
        },
        "responses": {
            "200": {
                "description": "Done",
                "content": {"application/json": {"schema": response}},
            },
            **{status: _failure(api, status) for status in _STATUSES},
        },
    }


def _failure(api: str, status: str) -> dict[str, Any]:
    return {
        "description": _STATUSES[status],
        "content": {"application/json": {"schema": _ERRORS[api]}},
    }
