"""Running the application: the socket, slow clients, signals, the end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from sbert_fast.server.app import create_app
from sbert_fast.server.errors import KINDS
from sbert_fast.server.service import Service

logger = logging.getLogger("sbert_fast.server")

# The thread of the event loop and those of queues take turns: Python's 5 ms would be felt.
_SWITCH_SECONDS = 5e-4
_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)


def protocol_of(seconds: float) -> type[Any]:
    """uvicorn's protocol, which closes connections whose headers take longer than `seconds`."""
    base: Any = AutoHTTPProtocol

    class Impatient(base):  # type: ignore[misc, unused-ignore]
        _timer: asyncio.TimerHandle | None = None
        _then: Callable[[], None] | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect(transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._expect(self._refuse)
            else:
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _expect(self, otherwise: Callable[[], None]) -> None:
            """Give headers their time; more of them gives them no more."""
            if self._timer is not None and otherwise == self._refuse == self._then:
                return
            self._stop()
            self._then = otherwise
            self._timer = asyncio.get_running_loop().call_later(seconds, otherwise)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self) -> None:
            if not self.transport.is_closing():
                body = b'{"error":"the headers took too long","error_type":"%b"}'
                body %= KINDS["slow"].tei.encode()
                self.transport.write(_SLOW % (len(body), body))
                self.transport.close()

    return Impatient


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
