"""Encoding on a CPU: the document of one run."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.checkpoints import Checkpoint
from benchmarks.common.corpora import Corpus
from benchmarks.common.products import LinearLayers
from benchmarks.common.text import OURS, REFERENCE, message, say
from benchmarks.encode import contenders, runtimes
from benchmarks.encode.contenders import Contender, Gates, Sizes
from benchmarks.encode.memory import memory_of
from benchmarks.encode.runtimes import NotAvailable, Setting

SCOPE = "strings to L2-normalised float32 numpy rows in input order, tokenisation included"
SIZES = Sizes(first=8, reached=128, times=2)
CPU = torch.device("cpu")
MEMORY_CORPUS, MEMORY_TEXTS = "short", 100_000
# Load average per CPU above which figures are doubtful.
BUSY = 0.1
LIMIT_RUNS = 5  # a round: one of them takes a tenth of a second
LATENCY_TOKENS, LATENCY_CALLS, LATENCY_WARM_CALLS = 16, 300, 20


def build_all(
    names: list[str], precisions: list[str], folder: Checkpoint, onnx: Path
) -> list[Contender]:
    """Ours, the reference and `names` in every precision; those that cannot run here say why.

    Raises:
        RuntimeError: ours cannot run, or the reference in float32.
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
            if each.name == OURS or (each.name, each.precision) == (REFERENCE, "float32"):
                raise RuntimeError(f"{each} is {each.status}") from reason
    return entries


def prepare(each: Contender, corpus: Corpus, sweep_texts: int) -> None:
    """Bring a system to its best: setting found, warm on all texts, embeddings kept.

    A peer that fails is named as such and left out; ours and the reference may not fail.
    """
    say(f"preparing {each}")
    try:
        if each.system.batch_sizes:
            contenders.find_setting(each, "s1", corpus.first(sweep_texts), CPU, SIZES)
        each.embeddings = contenders.embed(each, "s1", corpus)
        computed = each.system.computed_tokens(corpus.texts, each.setting)
        share = computed and int(corpus.tokens.lengths.sum()) / computed
        each.more["real_token_share"] = share
    except Exception as error:
        if each.name in (OURS, REFERENCE):
            raise
        each.status = f"not measured (failed: {message(error)})"
        each.system = None


def row_of(
    each: Contender, running: list[Contender], truth: Any, corpus: Corpus, swept: int, gates: Gates
) -> dict[str, Any]:
    """The row of a system beside all that are `running`, measured or not; `truth` are float32
    embeddings of the reference, `[N, E]`, and settings were found on `swept` tokens."""
    row = {"system": each.name, "precision": each.precision, "status": each.status}
    if each.system is None:
        return row
    match = contenders.cosines(each.embeddings, truth)
    rates = int(corpus.tokens.lengths.sum()) / np.array(each.seconds)
    return row | {
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


def latency(running: list[Contender], folder: Checkpoint) -> dict[str, Any]:
    """Milliseconds of single calls with one short text, systems in turn."""
    short = Corpus.load("short", 200, 0, folder)
    nearest = int(np.abs(short.tokens.lengths - LATENCY_TOKENS).argmin())
    calls = [(each, []) for each in running if each.name in (OURS, REFERENCE)]
    for _ in range(LATENCY_WARM_CALLS + LATENCY_CALLS):
        for each, seconds in calls:
            start = time.perf_counter()
            each.system.encode([short.texts[nearest]], Setting(1))
            seconds.append(time.perf_counter() - start)
    rows = []
    for each, seconds in calls:
        p50, p95 = np.percentile(np.array(seconds[LATENCY_WARM_CALLS:]) * 1e3, (50, 95))
        row = {"system": each.name, "precision": each.precision}
        rows.append(row | {"p50_ms": float(p50), "p95_ms": float(p95)})
    return {"tokens": int(short.tokens.lengths[nearest]), "calls": LATENCY_CALLS, "rows": rows}


def memory_of_many(running: list[Contender], shared: dict[str, Any], width: int) -> dict[str, Any]:
    """Peak memory of ours and the reference over many short texts, a process each."""
    rows, many = [], {"corpus": MEMORY_CORPUS, "texts": MEMORY_TEXTS}
    for each in running:
        if each.name in (OURS, REFERENCE):
            say(f"memory of {each} over {MEMORY_TEXTS:,} texts")
            held = memory_of(each.name, each.precision, each.setting, **shared | many)
            rows.append({"system": each.name, "precision": each.precision} | held)
    return many | {"output_mb": MEMORY_TEXTS * width * 4 / 1e6, "rows": rows}


def measure(args: argparse.Namespace, folder: Checkpoint, corpus: Corpus) -> dict[str, Any]:
    """Everything the arguments ask for."""
    with tempfile.TemporaryDirectory() as scratch:
        return _measure(args, folder, corpus, Path(scratch, "model.onnx"))


def _measure(
    args: argparse.Namespace, folder: Checkpoint, corpus: Corpus, onnx: Path
) -> dict[str, Any]:
    load = os.getloadavg()[0]
    if load > BUSY * args.threads:
        say(f"this machine is busy (load average {load:.2f}): the figures will be doubtful")
    entries = build_all(args.peers, args.dtype, folder, onnx)
    for each in entries:
        if each.system is not None:
            prepare(each, corpus, args.sweep_texts)
    running = [each for each in entries if each.system is not None]
    embeddings = {(each.name, each.precision): each.embeddings for each in running}
    truth, gates = embeddings[REFERENCE, "float32"], contenders.check(embeddings)
    limits = {p: LinearLayers(folder.config, p) for p in args.dtype if LinearLayers.available(p)}

    def measure_limits() -> None:
        for limit in limits.values():
            for _ in range(LIMIT_RUNS):
                limit.measure()

    turns = [(each, contenders.runner(each, "s1", corpus)) for each in running]
    for _ in contenders.take_turns(turns, args.rounds, CPU, measure_limits):
        pass
    single_calls = latency(running, folder) if args.latency else None
    shared = {"model": args.model, "threads": args.threads, "seed": args.seed, "onnx": onnx}
    for each in running:
        say(f"memory of {each}")
        own = shared | {"corpus": args.corpus, "texts": args.texts}
        each.more |= memory_of(each.name, each.precision, each.setting, **own)
    swept = int(corpus.tokens.lengths[: args.sweep_texts].sum())
    return {
        "scope": SCOPE,
        "gates": {precision: gates[OURS, precision] for precision in args.dtype},
        "rows": [row_of(each, running, truth, corpus, swept, gates) for each in entries],
        "linear_layers_alone": {p: limit.tokens_per_s for p, limit in limits.items()},
        "latency": single_calls,
        "memory": memory_of_many(running, shared, truth.shape[1]) if args.memory else None,
    }
