"""A request from its first byte to its last: who asks, how much, how long; errors in the shape of
the API."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from sbert_fast.pending import PRIORITIES, Priority
from sbert_fast.server.errors import Api, ClientLeftError, Refusal, refusal_of
from sbert_fast.server.reading import parsed
from sbert_fast.server.service import Exchange, Service

logger = logging.getLogger("sbert_fast.server")

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Handler = Callable[[Service, dict[str, Any], Exchange], Awaitable[Any]]
JSON = b"application/json"
# Bytes of the headers of a request.
MOST_HEADERS = 1 << 16
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY


def dumps(content: Any) -> bytes:
    return orjson.dumps(content, option=_OPTIONS)


class Endpoint:
    """A route that takes a JSON object and gives JSON: an ASGI application.

    Args:
        service: what `handle` asks.
        api: whose errors it tells.
        handle: makes the content of the response.
        times: whether the response has the headers of text-embeddings-inference about times.
    """

    def __init__(self, service: Service, api: Api, handle: Handler, *, times: bool = True) -> None:
        self._service, self._api, self._handle, self._times = service, api, handle, times
        token = service.settings.token
        self._bearer = None if token is None else b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        service, started = self._service, time.perf_counter()
        service.running += 1
        service.metrics.running.inc()
        try:
            exchange, body = await self._admitted(scope, receive, started)
            content = await self._handle(service, body, exchange)
            service.metrics.successes.labels(exchange.method).inc()
            await respond(send, 200, dumps(content), _times(exchange) if self._times else [])
        except (ClientLeftError, asyncio.CancelledError) as error:
            service.metrics.failures.labels("dropped").inc()
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            await self._refuse(send, error)
        finally:
            service.running -= 1
            service.metrics.running.dec()

    async def _admitted(
        self, scope: Scope, receive: Any, started: float
    ) -> tuple[Exchange, dict[str, Any]]:
        """The request, if its client may ask, and its body.

        Raises:
            Refusal: it may not, or the body is not one.
        """
        settings = self._service.settings
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADERS:
            raise Refusal("headers", f"the headers exceed {MOST_HEADERS} bytes", closes=True)
        headers = dict(scope["headers"])
        if self._bearer is not None:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._bearer):
                raise Refusal("unauthorized", "a bearer token is needed", closes=True)
        if self._service.running > settings.max_requests:
            seconds = max(served.queue.seconds_to_wait for served in self._service.models.values())
            raise Refusal("overloaded", "Model is overloaded", retry_after=seconds, closes=True)
        priority = _priority(headers)
        body = await _body(headers, receive, settings.max_body, settings.read_seconds)
        exchange = Exchange(receive, started, started + settings.deadline, priority)
        return exchange, parsed(body)

    async def _refuse(self, send: Send, error: Exception) -> None:
        refusal = refusal_of(error)
        status = refusal.status(self._api)
        self._service.metrics.failed(refusal, self._api)
        if refusal.kind in ("internal", "nonfinite"):
            # Without its message, which may quote a text.
            where = traceback.extract_tb(error.__traceback__)[-1]
            logger.error("%s at %s:%s", type(error).__name__, where.filename, where.lineno)
            if os.environ.get("SBERT_FAST_DEBUG") == "1":
                traceback.print_exception(error)
        await respond(send, status, dumps(refusal.content(self._api)), refusal.headers)


def _priority(headers: dict[bytes, bytes]) -> Priority | None:
    given = headers.get(b"x-priority")
    if given is None:
        return None
    for name in PRIORITIES:
        if given == name.encode():
            return name
    raise Refusal("validation", f"x-priority must be one of {', '.join(PRIORITIES)}")


async def _body(headers: dict[bytes, bytes], receive: Any, most: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        Refusal: it is too large, or takes too long.
        ClientLeftError: the rest of it will not come.
    """
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > most:
        raise Refusal("too_large", f"the body has more than {most} bytes", closes=True)
    try:
        async with asyncio.timeout(seconds):
            return await _whole(receive, most)
    except TimeoutError:
        raise Refusal("slow", f"the body took more than {seconds:g} s", closes=True) from None


async def _whole(receive: Any, most: int) -> bytes:
    parts, size, more = list[bytes](), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > most:
            raise Refusal("too_large", f"the body has more than {most} bytes", closes=True)
    return b"".join(parts)


async def respond(
    send: Send,
    status: int,
    body: bytes,
    headers: list[tuple[bytes, bytes]] | None = None,
    kind: bytes = JSON,
) -> None:
    own = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": own + (headers or [])})
    await send({"type": "http.response.body", "body": body})


def _times(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    """What text-embeddings-inference tells of a request: milliseconds, characters, tokens."""
    total = b"%d" % ((time.perf_counter() - exchange.started) * 1000)
    return [
        (b"x-compute-type", b"packed"),
        (b"x-compute-time", total),
        (b"x-compute-characters", b"%d" % exchange.characters),
        (b"x-compute-tokens", b"%d" % exchange.tokens),
        (b"x-total-time", total),
        (b"x-tokenization-time", b"%d" % (exchange.tokenized * 1000)),
        (b"x-queue-time", b"%d" % (exchange.waited * 1000)),
        (b"x-inference-time", b"%d" % (exchange.computed * 1000)),
    ]
