"""Load on a server: connections that ask one request after the other, for a number of seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

# How long a client waits that was refused.
_PAUSE_SECONDS = 0.02


@dataclass
class Load:
    """What some connections ask.

    Attributes:
        bodies: of requests, in turn.
        texts: of each.
        connections: how many ask at a time.
        headers: further ones.
    """

    bodies: Sequence[bytes]
    texts: int
    connections: int
    headers: str = ""


@dataclass
class Seen:
    """What came back: seconds of each answer, by status."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    elapsed: float = 0.0

    def summary(self, texts: int) -> dict[str, Any]:
        """Requests and texts a second, and percentiles of milliseconds, by status."""
        told: dict[str, Any] = {"elapsed_s": round(self.elapsed, 3)}
        for status, seconds in sorted(self.seconds.items()):
            p50, p90, p99 = (np.percentile(seconds, [50, 90, 99]) * 1000).round(3).tolist()
            told[str(status)] = {
                "requests": len(seconds),
                "requests_per_s": round(len(seconds) / self.elapsed, 2),
                "texts_per_s": round(texts * len(seconds) / self.elapsed, 2),
                "p50_ms": p50,
                "p90_ms": p90,
                "p99_ms": p99,
            }
        return told


def bodies_of(texts: Sequence[str], count: int) -> list[bytes]:
    """Bodies of `/embed` with so many texts each."""
    parts = [texts[start : start + count] for start in range(0, len(texts) - count + 1, count)]
    return [orjson.dumps({"inputs": list(part)}) for part in parts]


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, headers: str = ""
) -> tuple[int, bool]:
    """The status of an answer, and whether the connection stays open."""
    head = f"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{headers}"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    found = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(found.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
    await reader.readexactly(length)
    return int(found[9:12]), b"connection: close" not in found


async def _connection(port: int, load: Load, number: int, until: float, seen: Seen) -> None:
    turn = number
    while time.perf_counter() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        stays = True
        while stays and time.perf_counter() < until:
            body = load.bodies[turn % len(load.bodies)]
            turn += load.connections
            started = time.perf_counter()
            status, stays = await ask(reader, writer, body, load.headers)
            seen.seconds.setdefault(status, []).append(time.perf_counter() - started)
            if status == 429:
                await asyncio.sleep(_PAUSE_SECONDS)
        writer.close()


async def _all(port: int, loads: Sequence[Load], seconds: float) -> list[Seen]:
    found = [Seen() for _ in loads]
    started = time.perf_counter()
    await asyncio.gather(
        *(
            _connection(port, load, number, started + seconds, seen)
            for load, seen in zip(loads, found, strict=True)
            for number in range(load.connections)
        )
    )
    for seen in found:
        seen.elapsed = time.perf_counter() - started
    return found


def run(port: int, loads: Sequence[Load], seconds: float) -> list[Seen]:
    """What comes back of loads at the same time; no request begins after `seconds`."""
    return asyncio.run(_all(port, loads, seconds))
