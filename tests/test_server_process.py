"""A server in a process of its own: its command line, sockets, the end, and clients of others."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import api_clients
from families import make_cross_encoder, make_sentence_transformer, make_texts
from sbert_fast import FastEncoder
from serving import ROOT, SECRET, Answer, Process, command, running

pytest.importorskip("starlette", reason="the server is an extra")

TEXTS = make_texts(5, seed=9)
CLIENTS = Path(os.environ.get("SBERT_FAST_CLIENTS", ROOT / ".venv-clients"))
# Offline, huggingface_hub asks no address, be it this machine's.
ALONE = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "0"}
NAMES = ["openai", "openai_async", "huggingface_hub", "langchain_openai", "langchain_huggingface"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    model = make_sentence_transformer(prompts={"query": "find: "})
    model.save_pretrained(str(folder / "tiny"))
    make_cross_encoder(num_labels=1).save_pretrained(str(folder / "ranks"))
    return str(folder / "tiny"), str(folder / "ranks")


@pytest.fixture(scope="module")
def server(folders: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("log") / "stderr"
    limits = ("--read-timeout", "1", "--max-body", "100000")
    with running(log, folders[0], "--reranker", folders[1], *limits) as process:
        yield process


@pytest.fixture(scope="module")
def expected(folders: tuple[str, str]) -> Any:
    return FastEncoder(folders[0], device="cpu").encode(TEXTS, normalize_embeddings=True)


# Clients of others


def got(server: Process, name: str) -> Any:
    python = CLIENTS / "bin" / "python"
    if not python.exists():
        pytest.skip("the clients of others are not installed: make clients")
    script = [str(python), "-P", api_clients.__file__, name, server.url, json.dumps(TEXTS)]
    done = subprocess.run(
        script, capture_output=True, text=True, timeout=120, env=os.environ | ALONE
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*NAMES, "cohere"])
def test_clients(server: Process, expected: Any, name: str) -> None:
    for rows in got(server, name):
        np.testing.assert_array_equal(np.array(rows, dtype=np.float32), expected)


def test_dimensions_and_errors_of_openai(server: Process, folders: tuple[str, str]) -> None:
    options = {"normalize_embeddings": True, "truncate_dim": 6}
    wanted = FastEncoder(folders[0], device="cpu").encode(TEXTS, **options)
    (rows,) = got(server, "openai_dimensions")
    np.testing.assert_array_equal(np.array(rows, dtype=np.float32), wanted)
    (empty, missing) = got(server, "openai_errors")
    assert empty == [400, "`input` cannot be empty"]
    assert missing == [404, "there is no model of this name; there are: tiny, ranks"]


def test_curl(server: Process, expected: Any) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    asked = ["curl", "-sf", f"{server.url}/embed", "--json", json.dumps({"inputs": TEXTS})]
    rows = json.loads(subprocess.run(asked, capture_output=True, check=True, timeout=60).stdout)
    np.testing.assert_array_equal(np.array(rows, dtype=np.float32), expected)


def test_schemathesis(server: Process, tmp_path: Path) -> None:
    """Requests that the document allows, and some that it does not, never get an error of the
    server's, nor anything that the document does not have."""
    program = CLIENTS / "bin" / "schemathesis"
    if not program.exists():
        pytest.skip("the clients of others are not installed: make clients")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,"
    checks += "response_schema_conformance"
    options = ["--checks", checks, "--max-examples", "15", "--seed", "1", "--phases", "fuzzing"]
    asked = [str(program), "run", f"{server.url}/openapi.json", *options]
    done = subprocess.run(
        asked,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stdout[-6000:]


# Sockets


def connected(server: Process) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=30)


def everything(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    "beginning",
    [
        b"POST /embed HTT",
        b"POST /embed HTTP/1.1\r\nhost: a\r\n",
        b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n",
        b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{",
    ],
    ids=["line", "headers", "no-body", "body"],
)
def test_slow_clients(server: Process, beginning: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(beginning)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"error_type":"Validation"' in answer


def test_half_closed_and_lost_connections(server: Process) -> None:
    body = json.dumps({"inputs": TEXTS}).encode()
    head = b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
    for sent in (head, head + body[:9], head + body):
        with connected(server) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        with connected(server) as connection:
            connection.sendall(sent)
    with connected(server) as connection:
        connection.sendall(b"\x16\x03\x01\x02nonsense\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 400")
    assert server.ask("/health").status == 200


def test_large_bodies(server: Process) -> None:
    with connected(server) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: 10000000\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 413")
    assert server.ask("/embed", {"inputs": ["a"] * 10_000}).status == 422
    chunks = b"POST /embed HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(chunks + b"%x\r\n%b\r\n" % (100_001, b"a" * 100_001))
        assert everything(connection).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["endless", "whole"])
def test_large_headers(server: Process, end: bytes) -> None:
    line = b"a: " + b"b" * 1000 + b"\r\n"
    head = b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n" + line * 70 + end
    # With h11, uvicorn has an answer of its own.
    status = 431 if importlib.util.find_spec("httptools") else 400
    with connected(server) as connection:
        connection.sendall(head)
        time.sleep(0.2)
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(line * (0 if end else 70))
        assert everything(connection).startswith(b"HTTP/1.1 %d" % status)
    # Headers do not add up over the requests of a connection.
    with connected(server) as connection:
        for _ in range(3):
            connection.sendall(b"GET /ping HTTP/1.1\r\nhost: a\r\n" + line * 30 + b"\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_log_without_texts(server: Process) -> None:
    for body in ({"inputs": SECRET}, {"inputs": [SECRET, 1.5]}, {SECRET: 1}):
        server.ask("/embed", body)
    server.ask(f"/embed?{SECRET}", None)
    server.ask("/rerank", {"query": SECRET, "texts": [SECRET, None]})
    assert SECRET not in server.log.read_text()


# The command line


def test_what_runs_is_finished(folders: tuple[str, str], tmp_path: Path) -> None:
    texts = ["word " * 60] * 2000
    with running(tmp_path / "log", folders[0], "--threads", "1") as server:
        answers: list[Answer] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.ask("/embed", {"inputs": texts}))
        )
        asking.start()
        while "sbert_fast_requests_running 1.0" not in server.ask("/metrics").body.decode():
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert server.process.wait(60) == 0
    assert [(each.status, len(each.json)) for each in answers] == [(200, 2000)]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--host", "0.0.0.0"], 2, "--host 0.0.0.0 lets other machines in"),
        (["--token", "two words"], 2, "--token must be printable ASCII without spaces"),
        (["--token-file", "/nowhere"], 1, "/nowhere: No such file or directory"),
        (["--deadline", "0"], 2, "expected seconds above 0, got '0'"),
        (["/nowhere"], 1, "there is no such folder"),
        (["--port", "{port}"], 1, "--port {port} cannot be listened on: Address already in use"),
    ],
)
def test_what_is_refused(server: Process, arguments: list[str], code: int, told: str) -> None:
    filled = [each.format(port=server.port) for each in arguments]
    done = subprocess.run(command(*filled), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert told.format(port=server.port) in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extra_is_named() -> None:
    hidden = "import sys; sys.modules['orjson'] = None; from sbert_fast import cli;"
    code = hidden + "sys.exit(cli.main(['serve']))"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'sbert-fast[serve]'" in done.stderr
