"""The routes of text-embeddings-inference."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbert_fast.server.errors import Refusal
from sbert_fast.server.models import Served
from sbert_fast.server.reading import (
    check_count,
    choice_of,
    count_of,
    flag_of,
    ids_of,
    inputs_of,
    listed,
    object_of,
    sequences_of,
    text_of,
    texts_of,
)
from sbert_fast.server.service import Exchange, Service

# Numbers in a response of /embed_all: some 200 MB of JSON.
_MOST_NUMBERS = 1 << 24


def began(service: Service, exchange: Exchange, *, single: bool) -> None:
    """Count a request."""
    exchange.method = "single" if single else "batch"
    service.metrics.requests.labels(exchange.method).inc()


def cutting(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """How a request wants texts cut, for :meth:`Service.run`."""
    truncate = flag_of(body, "truncate", None)
    side = choice_of(body, "truncation_direction", ("right", "left"), "right")
    return {
        "truncate": service.settings.auto_truncate if truncate is None else truncate,
        "side": side,
    }


def prompted(served: Served, body: dict[str, Any]) -> dict[str, Any]:
    """The prompt that a request names, for `encode`."""
    name = text_of(body, "prompt_name", None)
    if name is None:
        return {}
    if name not in served.prompts:
        known = ", ".join(served.prompts) or "none"
        raise Refusal("validation", f"prompt_name must be one of the model's prompts: {known}")
    return {"prompt": served.prompts[name]}


def as_texts(served: Served, inputs: list[Any]) -> list[str]:
    """Texts in place of token ids: those that the tokenizer makes of them.

    Special tokens among them are dropped, and put around the texts again.
    """
    texts = []
    for index, each in enumerate(inputs):
        if not isinstance(each, str):
            if not each:
                raise Refusal("empty", f"inputs[{index}] holds no token")
            if max(each) >= served.tokenizer.get_vocab_size():
                raise Refusal("tokenizer", f"inputs[{index}] holds ids that are no tokens")
            each = served.tokenizer.decode(each, skip_special_tokens=True)
        texts.append(each)
    return texts


def truncated_dimension(served: Served, dimensions: int | None) -> dict[str, Any]:
    """The number of dimensions that a request wants, for `encode`."""
    if dimensions is None:
        return {}
    if served.dimension is not None and dimensions > served.dimension:
        raise Refusal("validation", f"dimensions must be at most {served.dimension}")
    return {"truncate_dim": dimensions}


async def embed(service: Service, body: dict[str, Any], exchange: Exchange) -> NDArray[Any]:
    served = service.find(("embedding",))
    inputs, single = inputs_of(body, "inputs", service.settings.max_texts)
    began(service, exchange, single=single)
    options = {
        "normalize_embeddings": flag_of(body, "normalize", True),
        **prompted(served, body),
        **truncated_dimension(served, count_of(body, "dimensions")),
    }
    texts = as_texts(served, inputs)
    found = await service.run(served, texts, options, exchange, **cutting(service, body))
    return np.asarray(found)


async def embed_all(service: Service, body: dict[str, Any], exchange: Exchange) -> list[Any]:
    served = service.find(("embedding",))
    inputs, single = inputs_of(body, "inputs", service.settings.max_texts)
    began(service, exchange, single=single)
    options = {"output_value": "token_embeddings", **prompted(served, body)}
    texts = as_texts(served, inputs)
    most = _MOST_NUMBERS // max(1, served.width)
    cut = cutting(service, body)
    states = await service.run(served, texts, options, exchange, most=most, **cut)
    return [np.ascontiguousarray(state.float().cpu().numpy()) for state in states]


async def embed_sparse(service: Service, body: dict[str, Any], exchange: Exchange) -> list[Any]:
    served = service.find(("sparse",))
    inputs, single = inputs_of(body, "inputs", service.settings.max_texts)
    began(service, exchange, single=single)
    options = prompted(served, body)
    texts = as_texts(served, inputs)
    found = await service.run(served, texts, options, exchange, **cutting(service, body))
    sparse = found.coalesce().cpu()
    rows, columns = sparse.indices().tolist()
    result: list[list[dict[str, Any]]] = [[] for _ in texts]
    for row, column, value in zip(rows, columns, sparse.values().tolist(), strict=True):
        result[row].append({"index": column, "value": value})
    return result


async def similarity(service: Service, body: dict[str, Any], exchange: Exchange) -> NDArray[Any]:
    served = service.find(("embedding",))
    inputs = object_of(body, "inputs")
    source = text_of(inputs, "source_sentence")
    others = texts_of(inputs, "sentences", service.settings.max_texts)
    check_count(len(others) + 1, service.settings.max_texts)
    began(service, exchange, single=False)
    parameters = object_of(body, "parameters", None) or {}
    options = {"normalize_embeddings": True, **prompted(served, parameters)}
    cut = cutting(service, parameters)
    found = await service.run(served, [source, *others], options, exchange, **cut)
    return np.ascontiguousarray(found[1:] @ found[0])


async def rerank(service: Service, body: dict[str, Any], exchange: Exchange) -> list[Any]:
    query = text_of(body, "query")
    texts = texts_of(body, "texts", service.settings.max_texts)
    raw, echoes = flag_of(body, "raw_scores", False), flag_of(body, "return_text", False)
    served = service.find(("reranker",))
    began(service, exchange, single=False)
    cut = cutting(service, body)
    scores = await scored(service, served, query, texts, exchange, raw=raw, **cut)
    order = np.argsort(-scores, kind="stable").tolist()
    return [
        {"index": i, **({"text": texts[i]} if echoes else {}), "score": scores[i]} for i in order
    ]


async def scored(
    service: Service,
    served: Served,
    query: str,
    texts: list[str],
    exchange: Exchange,
    *,
    raw: bool = False,
    **cut: Any,
) -> NDArray[np.float32]:
    """A score a text: fp32 `[len(texts)]`."""
    pairs = [(query, text) for text in texts]
    logits = await service.run(served, pairs, {}, exchange, **cut)
    return _activated(np.asarray(logits)[:, None], raw=raw)[:, 0]


def _activated(logits: NDArray[Any], *, raw: bool) -> NDArray[np.float32]:
    """Scores of logits `[N, labels]`: by a sigmoid, or by a softmax over several labels."""
    if raw:
        return logits.astype(np.float32)
    wide = logits.astype(np.float64)
    if wide.shape[1] == 1:
        return (1.0 / (1.0 + np.exp(-wide))).astype(np.float32)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


async def predict(service: Service, body: dict[str, Any], exchange: Exchange) -> list[Any]:
    inputs, single = sequences_of(body, service.settings.max_texts)
    raw = flag_of(body, "raw_scores", False)
    served = service.find(("classifier", "reranker"))
    began(service, exchange, single=single)
    cut, places = cutting(service, body), list(range(len(inputs)))
    # A list of texts would be a pair to a cross-encoder: each is a call.
    calls = [[place] for place in places if isinstance(inputs[place], str)]
    if pairs := [place for place in places if not isinstance(inputs[place], str)]:
        calls.append(pairs)
    result: list[Any] = [None] * len(inputs)
    for call in calls:
        some = [inputs[place] for place in call]
        found = await service.run(served, some, {}, exchange, **cut)
        scores = _activated(np.asarray(found).reshape(len(call), -1), raw=raw)
        for place, row in zip(call, scores, strict=True):
            result[place] = [
                {"score": row[i], "label": served.labels.get(i, f"LABEL_{i}")}
                for i in np.argsort(-row, kind="stable").tolist()
            ]
    return result[0] if single else result


async def tokenize(service: Service, body: dict[str, Any], exchange: Exchange) -> list[Any]:
    if isinstance(body.get("inputs"), str):
        texts = [body["inputs"]]
    else:
        texts = texts_of(body, "inputs", service.settings.max_texts)
    adds = flag_of(body, "add_special_tokens", True)
    served = next(iter(service.models.values()))
    prompt = prompted(served, body).get("prompt", "")
    began(service, exchange, single=False)
    texts = [prompt + text for text in texts]
    found = served.tokenizer.encode_batch(texts, add_special_tokens=adds)
    return [_tokens(text, encoding) for text, encoding in zip(texts, found, strict=True)]


def _tokens(text: str, encoding: Any) -> list[dict[str, Any]]:
    """The tokens of a text; `start` and `stop` count its characters."""
    parts = zip(
        encoding.ids,
        encoding.tokens,
        encoding.special_tokens_mask,
        encoding.offsets,
        strict=True,
    )
    return [
        {"id": number, "text": token, "special": True, "start": None, "stop": None}
        if special
        else {
            "id": number, "text": text[start:stop], "special": False, "start": start, "stop": stop
        }
        for number, token, special, (start, stop) in parts
    ]  # fmt: skip


async def decode(service: Service, body: dict[str, Any], exchange: Exchange) -> list[str]:
    ids = listed(body, "ids", 1 << 20)
    skips = flag_of(body, "skip_special_tokens", True)
    served = next(iter(service.models.values()))
    if isinstance(ids[0], list):
        check_count(len(ids), service.settings.max_texts)
        several = [
            ids_of(each, f"ids[{index}]", is_only_ids=True) for index, each in enumerate(ids)
        ]
    else:
        several = [ids_of(ids, "ids", is_only_ids=True)]
    began(service, exchange, single=False)
    if any(max(each, default=0) >= served.tokenizer.get_vocab_size() for each in several):
        raise Refusal("tokenizer", "ids hold some that are no tokens")
    return list(served.tokenizer.decode_batch(several, skip_special_tokens=skips))
