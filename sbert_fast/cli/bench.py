"""Time a model on this CPU: FastEncoder in every dtype beside sentence-transformers and others.

MODEL is a folder, or the name of a model. The others are ONNX Runtime, OpenVINO, zentorch and
torch.compile, where they are installed: pip install 'sbert-fast[bench]'. All take turns, each at
its best batch size; embeddings are compared with those of sentence-transformers in float32. What is
timed: all texts, texts of one length each, single calls with a short text; and peak memory.
A run with MiniLM takes about two minutes on two cores; more with what has to be compiled.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sbert_fast.bench.names import COMPILED, PEERS, PRECISIONS, REFERENCE
from sbert_fast.cli.loading import model_path, positive
from sbert_fast.cli.streams import note, standard_output

NAMED = ("short", "passages", "wiki", "mixed")
RUNTIMES = tuple(name for name in PEERS if name != REFERENCE)  # it takes part in any case
# What of a model's repository the runtimes do not read.
_IGNORED = ("*.onnx", "*.bin", "*.h5", "*.ot", "*.msgpack", "onnx/*", "openvino/*", "*.xml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="default: all-MiniLM-L6-v2, as in encode")
    add(
        "--corpus",
        default="mixed",
        metavar="FILE",
        help="file in UTF-8, one text per line, or made-up texts: " + ", ".join(NAMED),
    )
    add("--texts", type=positive, default=200, metavar="N", help="(default: %(default)s)")
    add("--rounds", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    add("--dtype", default=",".join(PRECISIONS), help="comma-separated (default: %(default)s)")
    add("--peers", default=",".join(RUNTIMES), help="as --dtype (default: %(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: all there are)")
    add("--json", metavar="FILE", help="write the results there")
    add("--plots", metavar="DIR", help="draw them there; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    """Time the systems; 1 if embeddings of FastEncoder in some dtype are not right.

    Raises:
        argparse.ArgumentError: an argument names something unknown.
        ValueError, OSError, ImportError, RuntimeError: what stopped it.
    """
    from sbert_fast.bench import machine

    args.dtype = _some_of("--dtype", args.dtype, PRECISIONS)
    args.peers = _some_of("--peers", args.peers, RUNTIMES)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    _check_corpus(args)
    _check_outputs(args)
    args.model, args.model_name = _find_model(args.model)
    packages = [name for name in RUNTIMES if name != COMPILED]
    if not any(find_spec(name) for name in packages):
        note(f"none of {', '.join(packages)} is installed: pip install 'sbert-fast[bench]'")
    # Before torch is imported.
    machine.pin(args.threads)
    with redirect_stdout(sys.stderr):
        document = _measure(args)
    with standard_output() as stream:
        from sbert_fast.bench.tables import encode_on_cpu

        stream.write(f"{encode_on_cpu(document)}\n".encode(sys.stdout.encoding, "backslashreplace"))
    _store(args, document)
    return 0 if all(gate["green"] for gate in document["gates"].values()) else 1


def _some_of(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    chosen = [name for name in text.split(",") if name]
    if unknown := set(chosen) - set(allowed):
        raise argparse.ArgumentError(
            None, f"{option} must be some of {', '.join(allowed)}, got {', '.join(sorted(unknown))}"
        )
    if not chosen and option == "--dtype":
        raise argparse.ArgumentError(None, f"--dtype must name some of {', '.join(allowed)}")
    return list(dict.fromkeys(chosen))


def _check_corpus(args: argparse.Namespace) -> None:
    """Refuse what is not a corpus; take all of one that has fewer texts than asked for."""
    from sbert_fast.bench.corpora import read_texts

    if args.corpus in NAMED:
        return
    path = Path(args.corpus)
    if not path.is_file():
        expected = f"a file with one text per line, or one of {', '.join(NAMED)}"
        raise ValueError(f"--corpus must be {expected}, got {args.corpus!r}")
    try:
        args.texts = min(args.texts, len(read_texts(path)))
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    args.corpus = str(path.resolve())


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse what could not be written, before anything is measured."""
    from sbert_fast.cli.files import check_target

    if args.json is not None:
        if args.json in ("", "-"):
            raise ValueError(f"--json must be a file, got {args.json!r}")
        check_target(Path(args.json), overwrite=True)
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(args.json))):
            pass
    if args.plots and os.path.exists(args.plots) and not os.path.isdir(args.plots):
        raise NotADirectoryError(f"--plots must be a folder, got the file {args.plots}")
    if args.plots and find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "--plots needs matplotlib: pip install 'sbert-fast[plots]'", name="matplotlib"
        )


def _find_model(model: str | None) -> tuple[Path, str]:
    """The folder of a model, from the hub where it is not one, and its name."""
    found = model_path(model)
    if not os.path.isdir(found):
        from huggingface_hub import snapshot_download

        try:
            found = snapshot_download(found, ignore_patterns=list(_IGNORED))
        except Exception as error:
            raise OSError(
                f"MODEL must be a folder or the name of a model that can be loaded, got {model!r}: "
                f"{error}"
            ) from error
    return Path(found), Path(model or "all-MiniLM-L6-v2").name


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from sbert_fast.bench import machine, measure

    vars(args).update(seed=0, sweep_texts=64, calls=100, by_length=2048, memory=False)
    origin = machine.origin(machine.describe_cpu(args.threads))
    # Exporters warn of what the model does not use.
    logging.disable(logging.WARNING)
    try:
        return measure.make_document(args, origin, "encode", measure.measure)
    finally:
        logging.disable(logging.NOTSET)


def _store(args: argparse.Namespace, document: dict[str, Any]) -> None:
    if args.json:
        import json

        from sbert_fast.cli.files import atomic_file

        with atomic_file(Path(args.json), overwrite=True) as stream:
            stream.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        note(f"results: {args.json}")
    if args.plots:
        from sbert_fast.bench import pictures

        for path in pictures.draw(document, Path(args.plots)):
            note(f"picture: {path}")
