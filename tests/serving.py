"""Asking a server: its application in this process, or a process of its own over a socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
SECRET = "xyzzyplugh"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def rows(self) -> NDArray[np.float32]:
        return np.array(self.json, dtype=np.float32)


def encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


async def asked(
    app: Any,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    leaves: asyncio.Event | None = None,
) -> Answer:
    """Ask an application; without a body this is a GET.

    Args:
        app: an ASGI application.
        path: of the route.
        body: bytes, or what becomes JSON.
        headers: by their names in lower case.
        leaves: set once the client goes away.
    """
    content = b"" if body is None else encoded(body)
    own = {"content-length": str(len(content)), **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET" if body is None else "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in own.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    coming = iter([{"type": "http.request", "body": content, "more_body": False}])
    sent: list[dict[str, Any]] = []
    leaves = leaves or asyncio.Event()

    async def receive() -> dict[str, Any]:
        for message in coming:
            return message
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if not sent:
        return Answer(0, {}, b"")
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(each.get("body", b"") for each in sent[1:]))


def ask(app: Any, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    return asyncio.run(asked(app, path, body, headers))


@dataclass
class Process:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    host: str
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            method = "GET" if body is None else "POST"
            content = None if body is None else encoded(body)
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "sbert_fast", "serve", *arguments]


@contextmanager
def running(log: Path, *arguments: str) -> Iterator[Process]:
    """A server with these arguments, on a port that is free."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with log.open("w") as out:
        process = subprocess.Popen(
            command(*arguments, "--port", "0"), stderr=out, text=True, env=environment
        )
    try:
        found = None
        while found is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
            text = log.read_text()
            assert process.returncode is None, text
            found = re.search(r"on http://([\d.]+):(\d+)", text)
        yield Process(process, found[1], int(found[2]), log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
