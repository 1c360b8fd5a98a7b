"""The routes of OpenAI and Cohere."""

from __future__ import annotations

import uuid
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbert_fast.server.errors import Refusal
from sbert_fast.server.models import Served
from sbert_fast.server.reading import (
    choice_of,
    count_of,
    inputs_of,
    listed,
    text_of,
    texts_of,
)
from sbert_fast.server.service import Exchange, Service
from sbert_fast.server.tei import as_texts, began, scored, truncated_dimension

_VERSION = {"version": "2"}
# The prompts that models of sentence-transformers have for what Cohere calls types of inputs.
_PROMPTS = {
    "search_query": ("query", "search_query"),
    "search_document": ("document", "passage", "search_document"),
    "classification": ("classification",),
    "clustering": ("clustering",),
    "image": (),
}
_CUT = {"NONE": (False, "right"), "START": (True, "left"), "END": (True, "right")}


def _base64(row: NDArray[np.float32]) -> str:
    return b64encode(row.tobytes()).decode()


def _bits(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.packbits(rows > 0, axis=1)


_TYPES: dict[str, Callable[[NDArray[np.float32]], Any]] = {
    "float": lambda rows: rows,
    "base64": lambda rows: [_base64(row) for row in rows],
    "ubinary": _bits,
    # As sentence-transformers has it, and Cohere.
    "binary": lambda rows: (_bits(rows).astype(np.int16) - 128).astype(np.int8),
}


async def openai_embeddings(
    service: Service, body: dict[str, Any], exchange: Exchange
) -> dict[str, Any]:
    served = service.find(("embedding",), text_of(body, "model", None))
    inputs, single = inputs_of(body, "input", service.settings.max_texts)
    form = choice_of(body, "encoding_format", ("float", "base64"), "float")
    text_of(body, "user", None)
    began(service, exchange, single=single)
    options = {
        "normalize_embeddings": True,
        **truncated_dimension(served, count_of(body, "dimensions")),
    }
    truncate = service.settings.auto_truncate
    texts = as_texts(served, inputs)
    rows = await service.run(served, texts, options, exchange, truncate=truncate)
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": row if form == "float" else _base64(row),
            }
            for index, row in enumerate(np.asarray(rows))
        ],
        "model": served.name,
        "usage": {"prompt_tokens": exchange.tokens, "total_tokens": exchange.tokens},
    }


def openai_models(service: Service) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "sbert-fast"}
            for name in service.models
        ],
    }


async def cohere_embed(
    service: Service, body: dict[str, Any], exchange: Exchange
) -> dict[str, Any]:
    served = service.find(("embedding",), text_of(body, "model"))
    kind = choice_of(body, "input_type", tuple(_PROMPTS), "search_document")
    for name in ("images", "inputs"):
        if body.get(name) is not None:
            raise Refusal("validation", f"{name} is not supported: pass texts")
    if body.get("max_tokens") is not None:
        raise Refusal("validation", "max_tokens is not supported: the model's own length is used")
    texts = texts_of(body, "texts", service.settings.max_texts)
    types = _types(body, service.settings.max_texts)
    truncate, side = _CUT[choice_of(body, "truncate", tuple(_CUT), "END")]
    began(service, exchange, single=False)
    options = {
        "normalize_embeddings": True,
        **_prompt(served, kind),
        **truncated_dimension(served, count_of(body, "output_dimension")),
    }
    rows = await service.run(served, texts, options, exchange, truncate=truncate, side=side)
    rows = np.asarray(rows)
    return {
        "response_type": "embeddings_by_type",
        "id": str(uuid.uuid4()),
        "embeddings": {name: _TYPES[name](rows) for name in types},
        "texts": texts,
        "meta": {"api_version": _VERSION, "billed_units": {"input_tokens": exchange.tokens}},
    }


def _types(body: dict[str, Any], most: int) -> list[str]:
    if body.get("embedding_types") is None:
        return ["float"]
    types = listed(body, "embedding_types", most)
    for index, name in enumerate(types):
        if not isinstance(name, str) or name not in _TYPES:
            raise Refusal(
                "validation",
                f"embedding_types[{index}] must be one of {', '.join(_TYPES)}: int8 and uint8 "
                "need the ranges of a corpus",
            )
    return types


def _prompt(served: Served, kind: str) -> dict[str, Any]:
    for name in _PROMPTS[kind]:
        if name in served.prompts:
            return {"prompt": served.prompts[name]}
    return {}


async def cohere_rerank(
    service: Service, body: dict[str, Any], exchange: Exchange
) -> dict[str, Any]:
    served = service.find(("reranker",), text_of(body, "model"))
    query = text_of(body, "query")
    texts = texts_of(body, "documents", service.settings.max_texts)
    top = count_of(body, "top_n")
    if body.get("max_tokens_per_doc") is not None:
        told = "max_tokens_per_doc is not supported: the model's own length is used"
        raise Refusal("validation", told)
    began(service, exchange, single=False)
    scores = await scored(service, served, query, texts, exchange)
    order = np.argsort(-scores, kind="stable").tolist()[:top]
    return {
        "id": str(uuid.uuid4()),
        "results": [{"index": i, "relevance_score": scores[i]} for i in order],
        "meta": {"api_version": _VERSION, "billed_units": {"search_units": 1}},
    }
