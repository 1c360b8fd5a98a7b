"""The load on a server: what is asked, and what is told of the answers."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import orjson
import pytest

from benchmarks.serve import __main__ as command
from benchmarks.serve import load


class Counting:
    """A server on a thread that answers 200, and 429 to every third request, which it closes."""

    def __init__(self) -> None:
        self.bodies: Counter[bytes] = Counter()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._ready.wait(30)

    def _run(self) -> None:
        async def main() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await server.serve_forever()

        self._loop.run_until_complete(main())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        refuses = False
        while not refuses:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
            except asyncio.IncompleteReadError:
                break
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            self.bodies[await reader.readexactly(length)] += 1
            refuses = self.bodies.total() % 3 == 0
            line = b"429 No\r\nconnection: close" if refuses else b"200 OK"
            writer.write(b"HTTP/1.1 " + line + b"\r\ncontent-length: 2\r\n\r\n[]")
        writer.close()


def test_load() -> None:
    server = Counting()
    bodies = load.bodies_of(["a", "b", "c", "d", "e"], 2)
    assert [orjson.loads(body) for body in bodies] == [
        {"inputs": ["a", "b"]},
        {"inputs": ["c", "d"]},
    ]
    (seen,) = load.run(server.port, [load.Load(bodies, 2, 3)], 0.3)
    counted = {status: len(seconds) for status, seconds in seen.seconds.items()}
    assert sum(counted.values()) == server.bodies.total()
    assert counted[429] == server.bodies.total() // 3
    assert server.bodies.keys() == set(bodies)
    told = seen.summary(2)["200"]
    assert told["requests"] == counted[200]
    assert told["texts_per_s"] == pytest.approx(2 * told["requests_per_s"], rel=0.01)
    assert told["p50_ms"] <= told["p90_ms"] <= told["p99_ms"]


def test_arguments() -> None:
    args = command.parse_args(["--model", "folder", "--dtype", "bfloat16"])
    assert (args.model, args.dtype, args.rounds) == ("folder", "bfloat16", 3)
    with pytest.raises(SystemExit):
        command.parse_args(["--dtype", "float64"])
