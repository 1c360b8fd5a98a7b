"""The application: every route, and what answers where there is none."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sbert_fast.server import openapi, others, tei
from sbert_fast.server.errors import Api, Refusal
from sbert_fast.server.http import Endpoint, dumps
from sbert_fast.server.metrics import CONTENT_TYPE
from sbert_fast.server.service import Service

# Paths, whose API it is, and what answers a POST.
_POSTS: dict[str, tuple[Api, Any]] = {
    "/embed": ("tei", tei.embed),
    "/embed_all": ("tei", tei.embed_all),
    "/embed_sparse": ("tei", tei.embed_sparse),
    "/rerank": ("tei", tei.rerank),
    "/predict": ("tei", tei.predict),
    "/similarity": ("tei", tei.similarity),
    "/tokenize": ("tei", tei.tokenize),
    "/decode": ("tei", tei.decode),
    "/embeddings": ("openai", others.openai_embeddings),
    "/v1/embeddings": ("openai", others.openai_embeddings),
    "/v2/embed": ("cohere", others.cohere_embed),
    "/v2/rerank": ("cohere", others.cohere_rerank),
}
# What a POST to the root means, by the kind of the first model.
_ROOT = {
    "embedding": tei.embed,
    "sparse": tei.embed_sparse,
    "reranker": tei.rerank,
    "classifier": tei.predict,
}


def create_app(service: Service) -> Starlette:
    """The ASGI application of a service."""
    first = next(iter(service.models.values()))
    posts: dict[str, tuple[Api, Any]] = {**_POSTS, "/": ("tei", _ROOT[first.kind])}
    routes = [
        Route(path, Endpoint(service, api, handle, times=api == "tei"), methods=["POST"])
        for path, (api, handle) in posts.items()
    ]
    document = dumps(openapi.document(service))

    async def health(_: Request) -> Response:
        if await service.is_healthy():
            return Response(b"", media_type="text/plain")
        refusal = Refusal("unhealthy", "unhealthy")
        service.metrics.failed(refusal, "tei")
        return _answer(refusal, "tei")

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def described(_: Request) -> Response:
        return Response(document, media_type="application/json")

    async def info(request: Request) -> Response:
        if (refused := _stranger(service, request)) is not None:
            return _answer(refused, "tei")
        return Response(dumps(info_of(service)), media_type="application/json")

    async def models(request: Request) -> Response:
        if (refused := _stranger(service, request)) is not None:
            return _answer(refused, "openai")
        return Response(dumps(others.openai_models(service)), media_type="application/json")

    routes += [Route(path, health, methods=["GET"]) for path in ("/health", "/ping", "/")]
    routes += [
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", described, methods=["GET"]),
        Route("/info", info, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
    ]

    async def nowhere(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        known = {404: ("missing", "there is no such route"), 405: ("method", "method not allowed")}
        refusal = Refusal(*known.get(status, ("internal", "internal error")))
        headers = dict(getattr(error, "headers", None) or {})
        answer = _answer(refusal, _api_of(request.url.path))
        answer.headers.update(headers)
        return answer

    return Starlette(routes=routes, exception_handlers={HTTPException: nowhere})


def _answer(refusal: Refusal, api: Api) -> Response:
    headers = {name.decode(): value.decode() for name, value in refusal.headers}
    status = refusal.status(api)
    return Response(dumps(refusal.content(api)), status, headers, "application/json")


def _api_of(path: str) -> Api:
    return "openai" if path.startswith("/v1/") else "cohere" if path.startswith("/v2/") else "tei"


def _stranger(service: Service, request: Request) -> Refusal | None:
    """Why a client is told nothing; None if it may ask."""
    token = service.settings.token
    given = request.headers.get("authorization", "").encode("latin-1")
    if token is None or hmac.compare_digest(given, b"Bearer " + token.encode()):
        return None
    return Refusal("unauthorized", "a bearer token is needed")


def info_of(service: Service) -> dict[str, Any]:
    """What `/info` tells of the first model, as text-embeddings-inference does."""
    served, settings = next(iter(service.models.values())), service.settings
    kind: dict[str, Any] = {"embedding": {"pooling": pooling_of(served.model)}}
    if served.kind == "sparse":
        kind = {"embedding": {"pooling": "splade"}}
    elif served.kind != "embedding":
        labels = {str(index): name for index, name in served.labels.items()}
        ids = {name: str(index) for index, name in labels.items()}
        kind = {served.kind: {"id2label": labels, "label2id": ids}}
    return {
        "model_id": served.name,
        "model_sha": None,
        "model_dtype": served.dtype,
        "served_model_name": served.name,
        "model_type": kind,
        "max_concurrent_requests": settings.max_requests,
        "max_input_length": served.max_length,
        "max_batch_tokens": served.batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_texts,
        "auto_truncate": settings.auto_truncate,
        "tokenization_workers": 1,
        "version": openapi.version(),
        "sha": None,
        "docker_label": None,
    }


def pooling_of(model: Any) -> str:
    """The pooling of a model, by the name that text-embeddings-inference has for it."""
    for module in getattr(model, "_modules", {}).values():
        mode = getattr(module, "pooling_mode", None)
        if mode is not None:
            name = str(mode)
            return {"lasttoken": "last_token"}.get(name, name)
    return "mean"
