"""Refusals, in the shape and with the status that each API has for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sbert_fast.errors import (
    DeadlineError,
    InputError,
    NonFiniteEmbeddingError,
    QueueClosedError,
    QueueFullError,
    TokenIdError,
)

Api = Literal["tei", "openai", "cohere"]


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a refusal is told: status and type in text-embeddings-inference, status in the other
    two, type and code in OpenAI's."""

    status: int
    tei: str
    others: int
    openai: str = "invalid_request_error"
    code: str | None = None


KINDS = {
    "syntax": _Kind(400, "Validation", 400),
    "empty": _Kind(400, "Empty", 400),
    "unauthorized": _Kind(401, "Unauthorized", 401, code="invalid_api_key"),
    "missing": _Kind(404, "NotFound", 404),
    "model": _Kind(404, "NotFound", 404, code="model_not_found"),
    "method": _Kind(405, "Validation", 405),
    "slow": _Kind(408, "Validation", 408),
    "too_large": _Kind(413, "Validation", 413),
    "headers": _Kind(431, "Validation", 431),
    "validation": _Kind(422, "Validation", 400),
    "tokenizer": _Kind(422, "Tokenizer", 400),
    "backend": _Kind(424, "Backend", 400),
    "overloaded": _Kind(429, "Overloaded", 429, "requests", "rate_limit_exceeded"),
    "nonfinite": _Kind(500, "Backend", 500, "server_error", "nonfinite"),
    "internal": _Kind(500, "Backend", 500, "server_error"),
    "deadline": _Kind(503, "Overloaded", 503, "server_error", "deadline"),
    "unhealthy": _Kind(503, "Unhealthy", 503, "server_error"),
}


class Refusal(Exception):
    """A request that gets an error.

    Args:
        kind: a key of `KINDS`.
        message: for the client; holds none of its texts.
        retry_after: seconds after which it may ask again.
        closes: whether the connection is to be closed.
    """

    def __init__(
        self, kind: str, message: str, *, retry_after: float | None = None, closes: bool = False
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.closes = kind, message, closes
        self.retry_after = retry_after

    def status(self, api: Api) -> int:
        kind = KINDS[self.kind]
        return kind.status if api == "tei" else kind.others

    def content(self, api: Api) -> dict[str, Any]:
        """The body of the response."""
        kind = KINDS[self.kind]
        if api == "tei":
            return {"error": self.message, "error_type": kind.tei}
        if api == "cohere":
            return {"message": self.message}
        told = {"message": self.message, "type": kind.openai, "param": None, "code": kind.code}
        return {"error": told}

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = []
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after))))
        if self.kind == "unauthorized":
            headers.append((b"www-authenticate", b"Bearer"))
        if self.closes:
            headers.append((b"connection", b"close"))
        return headers


class ClientLeftError(Exception):
    """The client closed the connection before it had its response."""


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of an error. Messages of errors that are not about the request stay
    here: they could quote texts."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFullError):
        message = "Model is overloaded: too many tokens wait"
        return Refusal("overloaded", message, retry_after=error.seconds)
    if isinstance(error, DeadlineError):
        return Refusal("deadline", "the deadline passed before the model got to the request")
    if isinstance(error, QueueClosedError):
        return Refusal("unhealthy", "the server is stopping", closes=True)
    if isinstance(error, NonFiniteEmbeddingError):
        found = ", ".join(map(str, error.indices))
        return Refusal("nonfinite", f"the result is not finite at the index {found} of the inputs")
    if isinstance(error, TokenIdError):
        found = ", ".join(map(str, error.indices))
        return Refusal("tokenizer", f"inputs at {found} hold tokens that the model does not know")
    if isinstance(error, InputError):
        return Refusal("tokenizer", str(error))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Refusal("overloaded", "the request does not fit the memory", retry_after=1.0)
    return Refusal("internal", "internal error: the log of the server names it")
