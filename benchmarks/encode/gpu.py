"""Encoding on a GPU beside sentence-transformers, padded and unpadded: see benchmarks/README.md.

The rows of a scope are stored after the first round, and again after the last or when interrupted:
the last row of a system counts. A system that fails leaves its row, and the others run.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import checkpoints, pages, products
from benchmarks.common.provenance import provenance
from benchmarks.common.storage import Record, append, latest, write_json
from benchmarks.encode.gpu_systems import SYSTEMS, cuda_ops
from sbert_fast.bench import contenders
from sbert_fast.bench.checkpoint import Checkpoint
from sbert_fast.bench.contenders import Contender, Gates, Sizes
from sbert_fast.bench.corpora import Corpus
from sbert_fast.bench.names import COMPILED, OURS, OURS_CUDA, REFERENCE, message, say
from sbert_fast.bench.systems import Setting

FULL = "float32"
SIZES = {"s1": Sizes(128, 256, 8192), "s3": Sizes(32, 256, 8192)}
# Enough texts for the cosines, and little enough for float32.
CHECKED_TEXTS = 2000
_SAMPLE_SECONDS = 0.05


class Benchmark:
    """One model and corpus on one device; `store` takes every row at once: kind and content."""

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Checkpoint,
        device: torch.device,
        store: Callable[[str, Record], None],
    ) -> None:
        self.args, self.folder, self.device, self.store = args, folder, device, store
        self.corpus = Corpus.load(args.corpus, args.texts, args.seed, folder)
        self.what = {"benchmark": "encode", "model": args.model_name, **self.corpus.describe()}
        self.what["corpus"] = self.what.pop("name")
        self.running: list[Contender] = []
        self.gemm: dict[tuple[str, tuple[int, ...]], float] = {}

    def run(self, scope: str) -> None:
        """Measure every system in a scope."""
        checked = self.corpus.first(CHECKED_TEXTS)
        reference = Contender(REFERENCE, FULL, setting=Setting(128))
        reference.system = SYSTEMS[REFERENCE](self.folder, FULL, str(self.device))
        self.truth = contenders.embed(reference, scope, checked)
        del reference
        running = self.running = []
        for precision in self.args.dtype:
            for name in self._names(scope, precision):
                each = Contender(name, precision)
                try:
                    self._prepare(each, scope, checked)
                except Exception as error:
                    self.store("error", self._row(each, scope) | {"error": message(error)})
                else:
                    running.append(each)
        turns = [(each, contenders.runner(each, scope, self.corpus)) for each in running]
        for each, run in turns:
            seconds = contenders.seconds_of(run, self.device)
            each.times = max(1, round(_SAMPLE_SECONDS / seconds))
        try:
            for done in contenders.take_turns(turns, self.args.rounds, self.device):
                if done == 1 < self.args.rounds:
                    self._store(scope)
        finally:
            self._store(scope)
        del turns, running
        self.running = []
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _store(self, scope: str) -> None:
        """Store a row a system, of the rounds that all have finished."""
        rounds = min((len(each.seconds) for each in self.running), default=0)
        if rounds == 0:
            return
        for each in self.running:
            del each.seconds[rounds:]
        embeddings = {(each.name, each.precision): each.embeddings for each in self.running}
        gates = contenders.check({(REFERENCE, FULL): self.truth} | embeddings)
        for each in self.running:
            self.store("row", self._figures(each, scope, gates))

    def _names(self, scope: str, precision: str) -> list[str]:
        """The systems that run; a row is left for ours where it cannot."""
        names = dict.fromkeys((OURS, OURS_CUDA, REFERENCE, *self.args.peers))
        if scope == "s1":
            names.pop(COMPILED, None)
        reason = cuda_ops(self.device, precision)
        if reason is not None:
            del names[OURS_CUDA]
        if reason:
            row = self._row(Contender(OURS_CUDA, precision), scope)
            self.store("row", row | {"status": f"not measured: {reason}"})
        return list(names)

    def _prepare(self, each: Contender, scope: str, checked: Corpus) -> None:
        say(f"{scope}: preparing {each}")
        each.system = SYSTEMS[each.name](self.folder, each.precision, str(self.device))
        if each.system.batch_sizes:
            # Both half precisions cost the same: what is best for one is best for the other.
            halves = [k for k in self.running if k.name == each.name and k.precision != FULL]
            if halves and each.precision != FULL:
                each.setting, each.sweep = halves[0].setting, halves[0].sweep
            else:
                few = self.corpus.first(self.args.sweep_texts)
                contenders.find_setting(each, scope, few, self.device, SIZES[scope])
        if on_gpu := self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        each.embeddings = contenders.embed(each, scope, checked)
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        each.more["peak_bytes"] = peak

    def _row(self, each: Contender, scope: str) -> Record:
        return self.what | {"scope": scope} | each.named

    def _figures(self, each: Contender, scope: str, gates: Gates) -> Record:
        texts, tokens = self.what["texts"], self.what["tokens"]
        median = float(np.median(each.seconds))
        row = self._row(each, scope) | {
            "batch": each.setting.batch_size or "auto",
            "sentences_per_s": texts / median,
            "tokens_per_s": tokens / median,
            "seconds": each.seconds,
            "sweep_seconds": {s.batch_size: seconds for s, seconds in each.sweep.items()},
            "loss": float((1 - contenders.cosines(each.embeddings, self.truth)).max()),
            # What a peer is compared with first.
            "gate": gates.get((each.name if each.name == OURS_CUDA else OURS, each.precision)),
            **each.more,
            "ratios": contenders.ratios(OURS, each, self.running, gates),
        }
        if any(other.name == OURS_CUDA for other in self.running):
            row["ratios_cuda"] = contenders.ratios(OURS_CUDA, each, self.running, gates)
        if each.staged is not None:
            row["real_token_share"] = tokens / sum(each.staged.batch_tokens)
            if each.name in (OURS, OURS_CUDA):
                row |= self._roofline(each, median)
        return row

    def _roofline(self, each: Contender, median: float) -> Record:
        """What the linear layers take on the batches of ours."""
        sizes, dtype = each.staged.batch_tokens, getattr(torch, each.precision)
        key = each.precision, tuple(sizes)
        try:
            if key not in self.gemm:
                config = self.folder.config
                self.gemm[key] = products.gemm_seconds(sizes, config, dtype, self.device)
        except Exception as error:
            return {"gemm_error": message(error)}
        seconds = self.gemm[key]
        return {"gemm_seconds": seconds, "gemm_fraction": seconds / median, "batches": sizes}


def main(args: argparse.Namespace) -> int:
    """Run what the arguments ask for; 1 where a gate is red or ours failed."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        say("there is no GPU here that torch can use")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[Record] = []
    bad = []

    def store(kind: str, line: Record) -> None:
        rows.append(line)
        append(args.rows, kind, line)
        red = not (line.get("gate") or {}).get("green", True)
        if line["system"] in (OURS, OURS_CUDA) and (kind == "error" or red):
            bad.append(line)

    threads = torch.get_num_threads()
    run = provenance(threads, device.type) | {"benchmark": "encode"}
    append(args.rows, "run", run)
    with tempfile.TemporaryDirectory() as scratch:
        path, sizes = args.model, checkpoints.RANDOM.get(str(args.model))
        if sizes is not None:
            say(f"making {args.model}")
            path = Path(scratch)
            checkpoints.make_random(str(args.model), args.tokenizer, path, sizes)
        benchmark = Benchmark(args, Checkpoint(path, threads), device, store)
        for scope in args.scope:
            benchmark.run(scope)
    if args.json:
        write_json(run | {"rows": latest(rows)}, args.json)
    print("\n".join(pages.encode_on_gpu(rows)))
    return int(bool(bad) or not rows)
