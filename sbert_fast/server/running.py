"""Running the application: the socket, slow clients, signals, the end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from sbert_fast.server.app import create_app
from sbert_fast.server.errors import Refusal
from sbert_fast.server.http import MOST_HEADERS, dumps
from sbert_fast.server.service import Service

logger = logging.getLogger("sbert_fast.server")

# The thread of the event loop and those of queues take turns: Python's 5 ms would be felt.
_SWITCH_SECONDS = 5e-4
_HEAD = (
    b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)

# With h11, which lacks it, uvicorn itself limits the size of headers.
_CALLBACK = "on_headers_complete"


def protocol_of(seconds: float) -> type[Any]:
    """uvicorn's protocol, which refuses headers that take more than `seconds`, or are too large."""
    base: Any = AutoHTTPProtocol

    class Impatient(base):  # type: ignore[misc, unused-ignore]
        _timer: asyncio.TimerHandle | None = None
        _then: Callable[[], None] | None = None
        _is_in_headers, _header_bytes = hasattr(base, _CALLBACK), 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect(transport.close)

        def on_headers_complete(self) -> None:
            self._is_in_headers = False
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._is_in_headers, self._header_bytes = True, 0
            super().on_message_complete()

        def data_received(self, data: bytes) -> None:
            was_in_headers = self._is_in_headers
            super().data_received(data)
            if was_in_headers and self._is_in_headers:
                self._header_bytes += len(data)
                if self._header_bytes > MOST_HEADERS:
                    self._refuse("headers", "the headers are too large")
            if self.cycle is None or self.cycle.response_complete:
                self._expect(self._late)
            else:
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _expect(self, otherwise: Callable[[], None]) -> None:
            """Give headers their time; more of them gives them no more."""
            if self._timer is not None and otherwise == self._late == self._then:
                return
            self._stop()
            self._then = otherwise
            self._timer = asyncio.get_running_loop().call_later(seconds, otherwise)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._refuse("slow", "the headers took too long")

        def _refuse(self, kind: str, told: str) -> None:
            if not self.transport.is_closing():
                refusal = Refusal(kind, told)
                status, body = refusal.status("tei"), dumps(refusal.content("tei"))
                self.transport.write(_HEAD % (status, _phrase(status), len(body), body))
                self.transport.close()

    return Impatient


def _phrase(status: int) -> bytes:
    return HTTPStatus(status).phrase.encode()


class _Server(uvicorn.Server):
    """Ends when it is told to, as if that were what it had been started for."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: the port is in use, or may not be used; names it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        told = error.strerror or str(error)
        raise OSError(f"--host {host} --port {port} cannot be listened on: {told}") from error
    listener.setblocking(False)
    return listener


def serve(service: Service, listener: socket.socket) -> None:
    """Serve until a signal says to stop; what runs by then is finished.

    Args:
        service: what to serve.
        listener: from :func:`bound`.
    """
    settings = service.settings
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    config = uvicorn.Config(
        create_app(service),
        http=protocol_of(settings.read_seconds),
        ws="none",
        lifespan="off",
        # Lines about requests hold their paths, in which there may be anything.
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(settings.stop_seconds),
    )
    try:
        _Server(config).run(sockets=[listener])
    finally:
        sys.setswitchinterval(before)
        for served in service.models.values():
            served.queue.close()
