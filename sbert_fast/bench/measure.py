"""Encoding on a CPU: the document of one run."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sbert_fast.bench import contenders, runtimes
from sbert_fast.bench.checkpoint import Checkpoint
from sbert_fast.bench.contenders import Contender, Gates, Sizes
from sbert_fast.bench.corpora import Corpus
from sbert_fast.bench.limit import LinearLayers, linear_shapes
from sbert_fast.bench.machine import warn_if_busy
from sbert_fast.bench.memory import memory_of
from sbert_fast.bench.names import ALONE, OURS, REFERENCE, message, say
from sbert_fast.bench.systems import NotAvailable, Setting

SCOPE = "strings to L2-normalised float32 numpy rows in input order, tokenisation included"
SIZES = Sizes(first=8, reached=128, times=2)
CPU = torch.device("cpu")
MEMORY_CORPUS, MEMORY_TEXTS = "short", 100_000
LIMIT_RUNS = 5  # a round: one of them takes a tenth of a second
LATENCY_TOKENS, LATENCY_WARM_CALLS = 16, 20
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
LENGTHS = (16, 32, 64, 128, 256, 512)
_SETTINGS = ("threads", "rounds", "seed", "texts", "corpus", "sweep_texts")

# From the options, the model and the corpus to what was found of them.
Measure = Callable[[argparse.Namespace, Checkpoint, Corpus], dict[str, Any]]


def make_document(
    args: argparse.Namespace, origin: dict[str, Any], benchmark: str, measure: Measure
) -> dict[str, Any]:
    """What `measure` finds, behind where that comes from: the machine, the model, the corpus.

    Args:
        args: `model`, a folder, and `model_name`; `corpus`, `texts` and `seed`; `threads`; what
            else `measure` reads.
        origin: see :func:`machine.origin`.
        benchmark: its name.
        measure: what measures.
    """
    warn_if_busy(origin, args.threads)
    checkpoint = Checkpoint(args.model, args.threads)
    corpus = Corpus.load(args.corpus, args.texts, args.seed, checkpoint)
    return origin | {
        "benchmark": benchmark,
        "model": {"name": args.model_name, "sha256": checkpoint.weights_sha256()},
        "corpus": corpus.describe(),
        "settings": {name: getattr(args, name) for name in _SETTINGS if hasattr(args, name)},
        **measure(args, checkpoint, corpus),
    }


def build_all(
    names: Sequence[str], precisions: Sequence[str], folder: Checkpoint, onnx: Path
) -> list[Contender]:
    """Ours, the reference and `names` in every precision; those that cannot run here say why.

    Raises:
        RuntimeError: ours runs in none of them, or the reference does not run in float32.
    """
    wanted = [(n, p) for p in precisions for n in (OURS, REFERENCE, *names)]
    # Whatever is asked for, this one is what the others are checked against.
    wanted.append((REFERENCE, "float32"))
    entries = [Contender(name, precision) for name, precision in dict.fromkeys(wanted)]
    for each in entries:
        try:
            each.system = runtimes.build(each.name, each.precision, folder, onnx)
        except NotAvailable as reason:
            each.status = f"not measured ({reason})"
            others = [e for e in entries if e.name == OURS and e.status == "measured"]
            if (each.name == OURS and not others) or str(each) == f"{REFERENCE} float32":
                raise RuntimeError(f"{each} is {each.status}") from reason
    return entries


def prepare(each: Contender, corpus: Corpus, sweep_texts: int) -> None:
    """Bring a system to its best: setting found, warm on all texts, embeddings kept.

    A peer that fails is named as such and left out; ours and the reference may not fail.
    """
    say(f"preparing {each}")
    try:
        if each.running.batch_sizes:
            contenders.find_setting(each, "s1", corpus.first(sweep_texts), CPU, SIZES)
        each.embeddings = contenders.embed(each, "s1", corpus)
        computed = each.running.computed_tokens(corpus.texts, each.setting)
        share = computed and int(corpus.tokens.lengths.sum()) / computed
        each.more["real_token_share"] = share
    except Exception as error:
        if each.name in (OURS, REFERENCE):
            raise
        each.status = f"not measured (failed: {message(error)})"
        each.system = None


def row_of(
    each: Contender,
    running: list[Contender],
    truth: NDArray[np.float32],
    corpus: Corpus,
    swept: int,
    gates: Gates,
) -> dict[str, Any]:
    """The row of a system beside all that are `running`, measured or not; `truth` are float32
    embeddings of the reference, `[N, E]`, and settings were found on `swept` tokens."""
    if each.system is None:
        return each.named | {"status": each.status}
    match = contenders.cosines(each.embeddings, truth)
    rates = int(corpus.tokens.lengths.sum()) / np.array(each.seconds)
    return each.named | {
        "status": each.status,
        "batch": str(each.setting) if each.system.batch_sizes else "auto",
        "tokens_per_s": float(np.median(rates)),
        "sentences_per_s": float(len(match) / np.median(each.seconds)),
        "iqr_tokens_per_s": np.percentile(rates, (25, 75)).tolist(),
        "worst_cosine": float(match.min()),
        "mean_cosine": float(match.mean()),
        **each.more,
        "sweep_tokens_per_s": {str(s): swept / seconds for s, seconds in each.sweep.items()},
        "seconds": each.seconds,
        "ratios": contenders.ratios(OURS, each, running, gates),
    }


def latency(
    running: list[Contender], folder: Checkpoint, calls: int, shapes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Milliseconds of `calls` single calls with one short text, systems in turn with the linear
    layers of `shapes` alone."""
    say(f"one text, {calls} calls")
    short = Corpus.load("short", 200, 0, folder)
    nearest = int(np.abs(short.tokens.lengths - LATENCY_TOKENS).argmin())
    rows = int(short.tokens.lengths[nearest])
    taken: list[tuple[Contender, list[float]]] = [(each, []) for each in running]
    limits = {
        p: LinearLayers(shapes, p, rows) for p in _limited(each.precision for each in running)
    }
    for _ in range(LATENCY_WARM_CALLS + calls):
        for each, seconds in taken:
            start = time.perf_counter()
            each.running.encode([short.texts[nearest]], Setting(1))
            seconds.append(time.perf_counter() - start)
        for limit in limits.values():
            limit.measure()
    found = [(each.named, np.array(seconds)) for each, seconds in taken]
    alone = {p: rows / np.array(limit.rates) for p, limit in limits.items()}
    found += [({"system": ALONE, "precision": p}, seconds) for p, seconds in alone.items()]
    return {
        "tokens": rows,
        "calls": calls,
        "percentiles": PERCENTILES,
        "rows": [named | _percentiles(seconds[LATENCY_WARM_CALLS:]) for named, seconds in found],
    }


def _percentiles(seconds: NDArray[np.float64]) -> dict[str, Any]:
    found = np.percentile(seconds * 1e3, PERCENTILES).tolist()
    named = {f"p{p}_ms": found[PERCENTILES.index(p)] for p in (50, 95)}
    return named | {"percentiles_ms": found}


def _limited(precisions: Iterable[str]) -> list[str]:
    """Those whose linear layers can be measured alone."""
    return [p for p in dict.fromkeys(precisions) if LinearLayers.available(p)]


def by_length(
    running: list[Contender], folder: Checkpoint, tokens: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second on texts that all have one length, `tokens` in all."""
    lengths = [length for length in LENGTHS if length <= folder.max_length]
    rates: list[list[float]] = [[] for _ in running]
    for length in lengths:
        say(f"texts of {length} tokens")
        corpus = Corpus.load(str(length), max(1, tokens // length), 0, folder)
        counted = int(corpus.tokens.lengths.sum())
        timed = [replace(each, seconds=[]) for each in running]
        turns = [(each, contenders.runner(each, "s1", corpus)) for each in timed]
        for _, run in turns:
            run()
        for _ in contenders.take_turns(turns, rounds, CPU):
            pass
        for each, found in zip(timed, rates, strict=True):
            found.append(counted / float(np.median(each.seconds)))
    rows = [each.named | {"tokens_per_s": r} for each, r in zip(running, rates, strict=True)]
    return {"lengths": lengths, "rows": rows}


def memory_of_many(running: list[Contender], shared: dict[str, Any], width: int) -> dict[str, Any]:
    """Peak memory of ours and the reference over many short texts, a process each."""
    rows, many = [], {"corpus": MEMORY_CORPUS, "texts": MEMORY_TEXTS}
    for each in running:
        if each.name in (OURS, REFERENCE):
            say(f"memory of {each} over {MEMORY_TEXTS:,} texts")
            rows.append(each.named | memory_of(each, **shared | many))
    return many | {"output_mb": MEMORY_TEXTS * width * 4 / 1e6, "rows": rows}


def measure(args: argparse.Namespace, folder: Checkpoint, corpus: Corpus) -> dict[str, Any]:
    """Everything the arguments ask for.

    Args:
        args: `peers` and `dtype`, names; `sweep_texts`, `rounds`; `calls` of one text, `by_length`,
            tokens of each length, and `memory`, of many texts too: each may be 0.
        folder: the model.
        corpus: the texts.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _measure(args, folder, corpus, Path(scratch, "model.onnx"))


def _measure(
    args: argparse.Namespace, folder: Checkpoint, corpus: Corpus, onnx: Path
) -> dict[str, Any]:
    entries = build_all(args.peers, args.dtype, folder, onnx)
    for each in entries:
        if each.system is not None:
            prepare(each, corpus, args.sweep_texts)
    running = [each for each in entries if each.system is not None]
    embeddings = {(each.name, each.precision): each.embeddings for each in running}
    truth, gates = embeddings[REFERENCE, "float32"], contenders.check(embeddings)
    (reference,) = (each for each in running if str(each) == f"{REFERENCE} float32")
    shapes = linear_shapes(lambda: reference.running.encode(corpus.texts[:1], Setting(1)))
    limits = {p: LinearLayers(shapes, p) for p in _limited(args.dtype)}

    def measure_limits() -> None:
        for limit in limits.values():
            for _ in range(LIMIT_RUNS):
                limit.measure()

    turns = [(each, contenders.runner(each, "s1", corpus)) for each in running]
    for _ in contenders.take_turns(turns, args.rounds, CPU, measure_limits):
        pass
    found = {
        "latency": args.calls and latency(running, folder, args.calls, shapes),
        "by_length": args.by_length and by_length(running, folder, args.by_length, args.rounds),
    }
    shared = {"model": args.model, "threads": args.threads, "seed": args.seed, "onnx": onnx}
    for each in running:
        say(f"memory of {each}")
        how = shared | {"corpus": args.corpus, "texts": args.texts}
        each.more |= memory_of(each, **how)
        if each.name == OURS:
            each.more["low_memory"] = memory_of(each, **how, low_memory=True)
    swept = int(corpus.tokens.lengths[: args.sweep_texts].sum())
    return found | {
        "scope": SCOPE,
        "gates": {p: gates[OURS, p] for p in args.dtype if (OURS, p) in gates},
        "rows": [row_of(each, running, truth, corpus, swept, gates) for each in entries],
        "linear_layers_alone": {p: limit.tokens_per_s for p, limit in limits.items()},
        "memory": memory_of_many(running, shared, truth.shape[1]) if args.memory else None,
    }
