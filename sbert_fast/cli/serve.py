"""Serve embeddings and scores over HTTP.

The routes are those of text-embeddings-inference (/embed, /rerank, /predict, ...), OpenAI
(/v1/embeddings) and Cohere (/v2/embed, /v2/rerank); /openapi.json describes them, /metrics is for
Prometheus. Concurrent requests are merged into packed batches. SIGTERM lets what runs finish.
Needs the extra: pip install 'sbert-fast[serve]'.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path

from sbert_fast.cli.encode import auto_or_positive
from sbert_fast.cli.loading import model_path, positive
from sbert_fast.cli.streams import note
from sbert_fast.values import DTYPES

_TOKEN_VARIABLE = "SBERT_FAST_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        metavar="[NAME=]MODEL",
        nargs="*",
        help="embedding models: folders or names on the Hub; the first is the default",
    )
    parser.add_argument(
        "--reranker", metavar="[NAME=]MODEL", action="append", default=[], help="cross-encoders"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    where.add_argument("--port", type=int, default=8080, help="port (default: %(default)s)")
    where.add_argument("--token", help="bearer token that clients must send; seen in lists of "
                       "processes, unlike the next")  # fmt: skip
    where.add_argument("--token-file", type=Path, help="file that holds it")
    where.add_argument(
        "--insecure", action="store_true", help="listen beyond this machine without a token"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the best there is)")
    how.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype to compute in")
    how.add_argument("--threads", type=positive, metavar="N", help="CPU threads")
    how.add_argument(
        "--batch-tokens", type=auto_or_positive, default="auto", help="most tokens of a batch"
    )
    limits = parser.add_argument_group("limits")
    for name, kind, default, told in (
        ("--max-body", positive, 2_000_000, "bytes of a request, beyond which: 413"),
        ("--max-client-batch-size", positive, 2048, "texts of a request"),
        ("--max-concurrent-requests", positive, 512, "requests at a time, beyond which: 429"),
        ("--max-queue-tokens", positive, 65_536, "tokens that wait, beyond which: 429"),
        ("--deadline", _seconds, 10.0, "seconds until a request's last batch begins, or 503"),
        ("--read-timeout", _seconds, 10.0, "seconds for headers, then for a body, or 408"),
        ("--stop-timeout", _seconds, 30.0, "seconds that requests may take after SIGTERM"),
    ):
        limits.add_argument(
            name, type=kind, metavar="N", default=default, help=f"{told} (default: %(default)s)"
        )
    limits.add_argument(
        "--no-auto-truncate",
        dest="auto_truncate",
        action="store_false",
        help="refuse texts that are too long, unless a request says to cut them",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Serve, as the arguments of :func:`add_arguments` say, until a signal ends it.

    Raises:
        argparse.ArgumentError: the arguments do not fit together.
        SbertFastError, OSError, ValueError, ImportError: what stopped it.
    """
    token = _token(args)
    _check_reach(args.host, token, args.insecure)
    try:
        import orjson  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"serve needs {error.name}: pip install 'sbert-fast[serve]'", name=error.name
        ) from None
    import torch

    from sbert_fast.server import models, running
    from sbert_fast.server.service import Service
    from sbert_fast.server.settings import Settings

    if args.threads:
        torch.set_num_threads(args.threads)
    # What can be refused is refused before models are loaded.
    listener = running.bound(args.host, args.port)
    with listener:
        served = []
        named = args.models if args.models or args.reranker else [None]
        for reranks, given in ((False, named), (True, args.reranker)):
            for each in given:
                name, path = ("minilm", model_path(None)) if each is None else name_of(each)
                served.append(
                    models.load(
                        name,
                        model_path(path),
                        reranks=reranks,
                        device=args.device,
                        dtype=args.dtype,
                        batch_tokens=args.batch_tokens,
                    )
                )
        settings = Settings(
            token=token,
            auto_truncate=args.auto_truncate,
            max_body=args.max_body,
            max_texts=args.max_client_batch_size,
            max_requests=args.max_concurrent_requests,
            queue_tokens=args.max_queue_tokens,
            deadline=args.deadline,
            read_seconds=args.read_timeout,
            stop_seconds=args.stop_timeout,
        )
        service = Service(served, settings)
        host, port = listener.getsockname()[:2]
        note(f"serving {', '.join(service.models)} on http://{host}:{port}")
        running.serve(service, listener)
    note("stopped")
    return 0


def name_of(model: str) -> tuple[str, str]:
    """The name and the path that an argument `NAME=PATH` or `PATH` means."""
    name, equals, path = model.partition("=")
    if equals and name and not os.path.exists(model):
        return name, path
    return (os.path.basename(os.path.normpath(model)) if os.path.isdir(model) else model), model


def _token(args: argparse.Namespace) -> str | None:
    """The token that clients must send; None for none.

    Raises:
        argparse.ArgumentError: two are given, or one that cannot be sent.
    """
    given = [
        ("--token", args.token),
        ("--token-file", None if args.token_file is None else args.token_file.read_text().strip()),
        (_TOKEN_VARIABLE, os.environ.get(_TOKEN_VARIABLE)),
    ]
    found = [(name, token) for name, token in given if token is not None]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise argparse.ArgumentError(None, f"one token is enough, got {names}")
    if not found:
        return None
    name, token = found[0]
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise argparse.ArgumentError(
            None, f"{name} must be printable ASCII without spaces, and not empty"
        )
    return token


def _check_reach(host: str, token: str | None, insecure: bool) -> None:
    """Refuse to listen to other machines without a token."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not (is_local or token or insecure):
        raise argparse.ArgumentError(
            None,
            f"--host {host} lets other machines in: give a --token-file, or say --insecure",
        )
