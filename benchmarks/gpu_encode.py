"""Times encoding on a GPU beside sentence-transformers, padded and unpadded.

Two scopes: s1, strings to numpy, and s3, prepared ids on the device to embeddings on the device.
In each, every system finds its best batch size, its embeddings are compared with those of unpatched
sentence-transformers in float32, and all take turns, round after round. Ours runs twice in half
precision: on the ops that it chooses, and on those in CUDA C++. The rows of a scope are stored
after the first round, and again after the last or when interrupted: the last row of a system
counts. A system that fails leaves its row, and the others run.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gate
import models
import numpy as np
import report
import roofline
import torch
from corpora import length_stats, load_corpus
from gpu_systems import SYSTEMS, Staged, Tokens, cuda_ops
from numpy.typing import NDArray
from padded import ModelFolder
from provenance import provenance
from report import OURS, OURS_CUDA, REFERENCE
from rows import append, latest
from stopwatch import message, synchronize

FULL = "float32"
FIRST_BATCH_SIZE, MUST_SWEEP, LARGEST_BATCH = {"s1": 128, "s3": 32}, 256, 8192
# Enough texts for the cosines, and little enough for float32.
CHECKED_TEXTS = 2000
_SAMPLE_SECONDS = 0.05


@dataclass
class Contender:
    """One system in one precision and scope, and what has been measured of it."""

    name: str
    precision: str
    system: Any = None
    batch_size: int = 0
    sweep: dict[int, float] = field(default_factory=dict)
    embeddings: Any = None
    staged: Staged | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


class Corpus:
    """Texts and their tokens; `first(n)` is the corpus of the first n texts."""

    def __init__(self, texts: list[str], tokens: Tokens) -> None:
        self.texts, self.tokens = texts, tokens

    def first(self, count: int) -> Corpus:
        lengths = self.tokens.lengths[:count]
        return Corpus(self.texts[:count], Tokens(self.tokens.ids[: lengths.sum()], lengths))


def embed(each: Contender, scope: str, corpus: Corpus) -> NDArray[np.float32]:
    """Embeddings of a corpus in its order, float32 `[N, E]` on the host."""
    if scope == "s1":
        return each.system.encode(corpus.texts, each.batch_size)
    staged = each.system.stage(corpus.tokens, each.batch_size)
    rows = staged.run().float().cpu().numpy()
    out = np.empty_like(rows)
    out[staged.order] = rows
    return out


def runner(each: Contender, scope: str, corpus: Corpus) -> Callable[[], Any]:
    """What is timed."""
    if scope == "s1":
        return lambda: each.system.encode(corpus.texts, each.batch_size)
    each.staged = each.system.stage(corpus.tokens, each.batch_size)
    return each.staged.run


def seconds_of(run: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Seconds of a run, the device done."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / times


def find_batch_size(each: Contender, scope: str, corpus: Corpus, device: torch.device) -> None:
    """Double the batch size as long as the largest is the best; what does not fit ends it."""
    size = FIRST_BATCH_SIZE[scope]
    while size <= LARGEST_BATCH:
        each.batch_size = size
        try:
            run = runner(each, scope, corpus)
            run()
            each.sweep[size] = seconds_of(run, device)
        except torch.OutOfMemoryError:
            break
        finally:
            each.staged = None
        best = min(each.sweep, key=each.sweep.__getitem__)
        if size >= len(corpus.texts) or (size >= MUST_SWEEP and best < size):
            break
        size *= 2
    each.batch_size = min(each.sweep, key=each.sweep.__getitem__)


class Benchmark:
    """One model and corpus on one device.

    Args:
        args: see encode.py.
        device: where.
        store: takes a row as soon as it is known: kind and content.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        folder: ModelFolder,
        device: torch.device,
        store: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.args, self.folder, self.device, self.store = args, folder, device, store

        def count(texts: list[str]) -> list[int]:
            return [len(e.ids) for e in folder.tokenizer.encode_batch_fast(texts)]

        texts = load_corpus(args.corpus, args.texts, args.seed, count)
        self.corpus = Corpus(texts, Tokens(*folder.tokenize(texts)))
        self.what = {"model": args.model_name, "corpus": Path(args.corpus).name}
        self.gemm: dict[tuple[str, tuple[int, ...]], float] = {}

    def run(self) -> None:
        """Every scope that is asked for."""
        lengths = self.corpus.tokens.lengths
        stats = {"texts": len(lengths), "tokens": int(lengths.sum())}
        self.what |= stats | {"lengths": length_stats(lengths)}
        for scope in self.args.scope:
            self._scope(scope)

    def _scope(self, scope: str) -> None:
        checked = self.corpus.first(CHECKED_TEXTS)
        truth = self._truth(scope, checked)
        running = []
        for precision in self.args.dtype:
            for name in self._names(scope, precision):
                each = Contender(name, precision)
                try:
                    self._prepare(each, scope, checked, running)
                except Exception as error:
                    each.error = message(error)
                    self.store("error", self._row(each, scope) | {"error": each.error})
                else:
                    running.append(each)
        runs = {id(each): runner(each, scope, self.corpus) for each in running}
        times = {
            key: max(1, round(_SAMPLE_SECONDS / seconds_of(run, self.device)))
            for key, run in runs.items()
        }
        try:
            for i in range(self.args.rounds):
                report.say(f"{scope}: round {i + 1} of {self.args.rounds}")
                for each in running:
                    key = id(each)
                    each.seconds.append(seconds_of(runs[key], self.device, times[key]))
                if i == 0 < self.args.rounds - 1:
                    self._store(scope, running, truth)
        finally:
            self._store(scope, running, truth)
        del runs, running
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _store(self, scope: str, running: list[Contender], truth: NDArray[np.float32]) -> None:
        """Store a row a system, of the rounds that all have finished."""
        rounds = min((len(each.seconds) for each in running), default=0)
        if rounds == 0:
            return
        for each in running:
            del each.seconds[rounds:]
        gates = self._gates(running, truth)
        for each in running:
            self.store("row", self._figures(each, scope, running, truth, gates))

    def _names(self, scope: str, precision: str) -> list[str]:
        """The systems that run; a row is left for ours where it cannot."""
        names = dict.fromkeys((OURS, OURS_CUDA, REFERENCE, *self.args.peers))
        if scope == "s1":
            names.pop("torch-compile", None)
        reason = cuda_ops(self.device, getattr(torch, precision))
        if reason is not None:
            del names[OURS_CUDA]
        if reason:
            row = self._row(Contender(OURS_CUDA, precision), scope)
            self.store("row", row | {"status": f"not measured: {reason}"})
        return list(names)

    def _truth(self, scope: str, checked: Corpus) -> NDArray[np.float32]:
        reference = Contender(REFERENCE, FULL, batch_size=128)
        reference.system = SYSTEMS[REFERENCE](self.folder, self.device, torch.float32)
        return embed(reference, scope, checked)

    def _prepare(
        self, each: Contender, scope: str, checked: Corpus, known: list[Contender]
    ) -> None:
        report.say(f"{scope}: preparing {each}")
        dtype = getattr(torch, each.precision)
        each.system = SYSTEMS[each.name](self.folder, self.device, dtype)
        if each.system.batch_sizes:
            # Both half precisions cost the same: what is best for one is best for the other.
            same = [
                k
                for k in known
                if k.name == each.name and FULL not in (k.precision, each.precision)
            ]
            if same:
                each.batch_size, each.sweep = same[0].batch_size, same[0].sweep
            else:
                find_batch_size(each, scope, self.corpus.first(self.args.sweep_texts), self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        each.embeddings = embed(each, scope, checked)
        if self.device.type == "cuda":
            each.peak_bytes = torch.cuda.max_memory_allocated(self.device)

    def _gates(
        self, running: list[Contender], truth: NDArray[np.float32]
    ) -> dict[tuple[str, str], dict[str, Any]]:
        """The gates of ours, by name and precision; there is none without the reference."""
        embeddings = {(each.name, each.precision): each.embeddings for each in running}
        embeddings.setdefault((REFERENCE, FULL), truth)
        return {
            (name, p): gate.check(embeddings, [p], name)[p]
            for name in (OURS, OURS_CUDA)
            for p in self.args.dtype
            if (name, p) in embeddings and (REFERENCE, p) in embeddings
        }

    def _row(self, each: Contender, scope: str) -> dict[str, Any]:
        named = {"scope": scope, "system": each.name, "precision": each.precision}
        return {"benchmark": "encode"} | self.what | named

    def _figures(
        self,
        each: Contender,
        scope: str,
        running: list[Contender],
        truth: NDArray[np.float32],
        gates: dict[tuple[str, str], dict[str, Any]],
    ) -> dict[str, Any]:
        texts, tokens = self.what["texts"], self.what["tokens"]
        median = float(np.median(each.seconds))
        row = self._row(each, scope) | {
            "batch": each.batch_size or "auto",
            "sentences_per_s": texts / median,
            "tokens_per_s": tokens / median,
            "seconds": each.seconds,
            "sweep_seconds": each.sweep,
            "loss": float((1 - gate.cosines(each.embeddings, truth)).max()),
            "gate": gates.get((each.name if each.name == OURS_CUDA else OURS, each.precision)),
            "peak_bytes": each.peak_bytes,
        }
        row["ratios"] = gate.ratios(OURS, each, running, gates)
        if any(other.name == OURS_CUDA for other in running):
            row["ratios_cuda"] = gate.ratios(OURS_CUDA, each, running, gates)
        if each.staged is not None:
            row["real_token_share"] = tokens / sum(each.staged.batch_tokens)
            try:
                row |= self._roofline(each, median)
            except Exception as error:
                row["gemm_error"] = message(error)
        return row

    def _roofline(self, each: Contender, median: float) -> dict[str, Any]:
        """What the linear layers take on the batches of ours, where ours can be asked."""
        if each.name not in (OURS, OURS_CUDA):
            return {}
        sizes, dtype = each.staged.batch_tokens, getattr(torch, each.precision)
        key = each.precision, tuple(sizes)
        if key not in self.gemm:
            config = self.folder.config
            self.gemm[key] = roofline.gemm_seconds(sizes, config, dtype, self.device)
        seconds = self.gemm[key]
        return {"gemm_seconds": seconds, "gemm_fraction": seconds / median, "batches": sizes}


def model_folder(args: argparse.Namespace, scratch: Path) -> Path:
    """The folder of the model; one with random weights is made."""
    name = str(args.model)
    if name not in models.RANDOM:
        return args.model
    target = scratch / name
    report.say(f"making {name}")
    models.make_random(name, args.tokenizer, target, models.RANDOM[name])
    return target


def main(args: argparse.Namespace) -> int:
    """Run what the arguments of encode.py ask for; 1 where a gate is red or ours failed."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        report.say("there is no GPU here that torch can use")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    bad = []

    def store(kind: str, line: dict[str, Any]) -> None:
        rows.append(line)
        append(args.rows, kind, line)
        red = not (line.get("gate") or {}).get("green", True)
        if line.get("system") in (OURS, OURS_CUDA) and (kind == "error" or red):
            bad.append(line)

    rows: list[dict[str, Any]] = []
    run = provenance(torch.get_num_threads(), device.type)
    append(args.rows, "run", run | {"benchmark": "encode"})
    with tempfile.TemporaryDirectory() as scratch:
        folder = ModelFolder(model_folder(args, Path(scratch)), torch.get_num_threads())
        Benchmark(args, folder, device, store).run()
    if args.json:
        from provenance import write_json

        write_json(run | {"benchmark": "encode", "rows": latest(rows)}, args.json)
    import gpu_report

    print("\n".join(gpu_report.encode(rows)))
    return int(bool(bad) or not rows)
