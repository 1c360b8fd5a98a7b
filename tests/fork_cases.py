"""Forks, each by one of the ways people fork, in a process of their own: run by test_fork.py.

No child can hang: an alarm kills it, and every wait of the parent has a limit.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gunicorn.app.base import BaseApplication
from sentence_transformers import SentenceTransformer

from sbert_fast import FastEncoder, accelerate

LIMIT = 15  # seconds until a child counts as hanging
TEXTS = ["A text of some words.", "Another, longer one, of a few words more.", "Short"] * 4
Encode = Callable[[list[str]], np.ndarray]

# Inherited by children, as a server's global is.
current: Encode


def _limit() -> None:
    signal.alarm(LIMIT)


def embed(texts: list[str]) -> np.ndarray:
    return current(texts)


def embed_columns(batch: dict[str, list[Any]]) -> dict[str, Any]:
    _limit()
    return {"vector": current(batch["text"])}


class Items:
    """A dataset whose items are vectors."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> np.ndarray:
        return current([TEXTS[index]])[0]


def _fork(child: Callable[[], np.ndarray]) -> np.ndarray:
    """What `child` returns in a forked process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            _limit()
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(child().astype(np.float32).tobytes())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"the child ended with {os.waitstatus_to_exitcode(status)}")
    return np.frombuffer(data, np.float32).reshape(len(TEXTS), -1)


def _plain() -> np.ndarray:
    return _fork(partial(embed, TEXTS))


def _in_thread(target: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(target())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(3 * LIMIT)
    if not results:
        raise RuntimeError("the thread hangs")
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _from_a_thread() -> np.ndarray:
    return _in_thread(_plain)


def _twice_deep() -> np.ndarray:
    """A child that encodes, and then forks: a pre-fork server's workers do."""

    def child() -> np.ndarray:
        embed(TEXTS)
        return _plain()

    return _fork(child)


def _many() -> np.ndarray:
    """A process a job, as rq has it, with work of the parent in between."""
    for _ in range(5):
        vectors = _plain()
        embed(TEXTS)
    return vectors


def _while_encoding() -> np.ndarray:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            embed(TEXTS)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(8):
            vectors = _plain()
        return vectors
    finally:
        stop.set()
        thread.join(LIMIT)
        if thread.is_alive():
            raise RuntimeError("the parent hangs")


def _executor() -> np.ndarray:
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, mp_context=context, initializer=_limit) as pool:
        return np.concatenate(list(pool.map(embed, [TEXTS[:6], TEXTS[6:]])))


def _pool() -> np.ndarray:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return np.concatenate(pool.map_async(embed, [TEXTS[:6], TEXTS[6:]]).get(LIMIT))


def _dataset_map() -> np.ndarray:
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": TEXTS})
    mapped = data.map(embed_columns, batched=True, num_proc=2)
    return np.array(mapped["vector"], dtype=np.float32)


def _joblib() -> np.ndarray:
    import joblib

    parallel = joblib.Parallel(n_jobs=2, backend="multiprocessing", timeout=LIMIT)
    return np.concatenate(parallel(joblib.delayed(embed)(part) for part in (TEXTS[:6], TEXTS[6:])))


def _data_loader() -> np.ndarray:
    from torch.utils.data import DataLoader

    how = {"num_workers": 2, "timeout": LIMIT, "multiprocessing_context": "fork"}
    loader = DataLoader(Items(), 4, collate_fn=np.stack, **how)
    return np.concatenate(list(loader))


class Server(BaseApplication):
    """A WSGI application behind workers that are forked after it was loaded."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__()

    def load_config(self) -> None:
        settings = {"bind": f"unix:{self.address}", "workers": 2, "preload_app": True}
        for name, value in (settings | {"timeout": LIMIT, "loglevel": "error"}).items():
            self.cfg.set(name, value)

    def load(self) -> Callable[..., list[bytes]]:
        def application(environment: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [])
            return [embed(TEXTS).astype(np.float32).tobytes()]

        return application


def _ask(address: str) -> np.ndarray:
    """The answer of a server, which may still be starting."""
    for _ in range(10 * LIMIT):
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connection = http.client.HTTPConnection("localhost", timeout=LIMIT)
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(LIMIT)
            connection.sock.connect(address)
            connection.request("GET", "/")
            return np.frombuffer(connection.getresponse().read(), np.float32)
        time.sleep(0.1)
    raise RuntimeError("the server does not start")


def _gunicorn() -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        pid = os.fork()
        if pid == 0:
            # Its own session, so that no worker outlives it.
            os.setsid()
            Server(address).run()
            os._exit(0)
        try:
            return _ask(address).reshape(len(TEXTS), -1)
        finally:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


WAYS: dict[str, Callable[[], np.ndarray]] = {
    "os.fork": _plain,
    "from a thread": _from_a_thread,
    "twice deep": _twice_deep,
    "ProcessPoolExecutor": _executor,
    "Pool": _pool,
    "Dataset.map": _dataset_map,
    "joblib": _joblib,
    "DataLoader": _data_loader,
    "gunicorn": _gunicorn,
}
# Parents that encode anyway.
BUSY_WAYS = {"a fork a job": _many, "while another thread encodes": _while_encoding}
SITUATIONS = ("loaded", "encoded", "encoded in a thread")
MODELS = ("stock", "encode", "accelerate")


def cases(situation: str) -> list[tuple[str, str]]:
    """Models and ways to fork that are tried in a situation; stock promises nothing once it ran."""
    ways = ["os.fork", "Pool"] if situation == "encoded in a thread" else list(WAYS)
    ways += BUSY_WAYS if situation == "encoded" else ()
    models = MODELS if situation == "loaded" else MODELS[1:]
    return [(model, way) for model in models for way in ways]


def main(path: str, situation: str, out: str) -> None:
    """Run every case of a situation; vectors go to files in `out`, errors to `errors.json`."""
    global current
    loaded = SentenceTransformer(path, device="cpu")
    fast = FastEncoder(path, device="cpu")
    accelerated = SentenceTransformer(path, device="cpu")
    accelerate(accelerated)
    encodes = dict(zip(MODELS, (loaded.encode, fast.encode, accelerated.encode), strict=True))

    def warm_up() -> None:
        for encode in (fast.encode, accelerated.encode):
            encode(TEXTS * 8)

    if situation == "encoded":
        warm_up()
    elif situation == "encoded in a thread":
        _in_thread(warm_up)
    errors = {}
    for model, way in cases(situation):
        current = encodes[model]
        try:
            np.save(Path(out) / f"{model}, {way}.npy", (WAYS | BUSY_WAYS)[way]())
        except BaseException as error:
            errors[f"{model}, {way}"] = f"{type(error).__name__}: {error}"
        (Path(out) / "errors.json").write_text(json.dumps(errors), encoding="utf-8")
    # Workers that hang must not keep this process.
    sys.stdout.flush()
    os._exit(0)
