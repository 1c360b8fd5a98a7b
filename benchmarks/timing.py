"""Brings systems to their best setting and times them in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
import report
from corpora import load_corpus
from gate import cosines
from limits import LinearLayers
from padded import ModelFolder, NotAvailable, Setting
from report import OURS, REFERENCE

FIRST_BATCH_SIZE, MUST_SWEEP = 8, 128
LIMIT_RUNS = 5  # a round: one of them takes a tenth of a second
LATENCY_TOKENS, LATENCY_CALLS, LATENCY_WARM_CALLS = 16, 300, 20


@dataclass
class Entry:
    """One system in one precision, and what has been measured of it."""

    name: str
    precision: str
    status: str = "measured"
    system: Any = None
    setting: Setting = Setting()
    sweep: dict[Setting, float] = field(default_factory=dict)
    embeddings: Any = None
    computed_tokens: int | None = None
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"

    def encode(self, texts: list[str]) -> Any:
        return self.system.encode(texts, self.setting)


def timed(entry: Entry, texts: list[str]) -> float:
    gc.collect()
    start = time.perf_counter()
    entry.encode(texts)
    return time.perf_counter() - start


def build_all(
    names: list[str], precisions: list[str], folder: ModelFolder, onnx: Path
) -> list[Entry]:
    """Ours, the reference and `names` in every precision; those that cannot run here say why.

    Raises:
        RuntimeError: ours or the reference cannot run.
    """
    wanted = [(n, p) for p in precisions for n in (OURS, REFERENCE, *names)]
    # Whatever is asked for, this one is what the others are checked against.
    wanted.append((REFERENCE, "float32"))
    entries = [Entry(name, precision) for name, precision in dict.fromkeys(wanted)]
    for entry in entries:
        try:
            entry.system = peers.build(entry.name, entry.precision, folder, onnx)
        except NotAvailable as reason:
            entry.status = f"not measured ({reason})"
            if entry.name in (OURS, REFERENCE):
                raise RuntimeError(f"{entry} is {entry.status}") from reason
    return entries


def find_setting(entry: Entry, texts: list[str], tokens: int) -> None:
    """Sweep batch sizes, doubling on as long as the largest is the best; best of two warm runs."""
    if not entry.system.batch_sizes:
        return
    for workers in entry.system.workers:
        swept: dict[Setting, float] = {}
        size = FIRST_BATCH_SIZE
        while size <= MUST_SWEEP or (size <= len(texts) and entry.setting.batch_size == size // 2):
            entry.setting = Setting(size, workers)
            entry.system.forget()
            entry.encode(texts)
            swept[entry.setting] = tokens / min(timed(entry, texts), timed(entry, texts))
            entry.setting = max(swept, key=swept.__getitem__)
            size *= 2
        entry.sweep |= swept
    entry.setting = max(entry.sweep, key=entry.sweep.__getitem__)
    entry.system.forget()


def prepare(entry: Entry, texts: list[str], subset: list[str], subset_tokens: int) -> None:
    """Bring a system to its best: setting found, warm on all texts, embeddings kept.

    A peer that fails is named as such and left out; ours and the reference may not fail.
    """
    report.say(f"preparing {entry}")
    try:
        find_setting(entry, subset, subset_tokens)
        entry.embeddings = entry.encode(texts)
        entry.computed_tokens = entry.system.computed_tokens(texts, entry.setting)
    except Exception as error:
        if entry.name in (OURS, REFERENCE):
            raise
        message = str(error).strip().partition("\n")[0]
        entry.status = f"not measured (failed: {type(error).__name__}: {message})"
        entry.system = None


def run_rounds(
    entries: list[Entry], texts: list[str], rounds: int, limits: Iterable[LinearLayers] = ()
) -> None:
    """Time all systems in turn, round after round, and what the machine allows between them."""
    for i in range(rounds):
        report.say(f"round {i + 1} of {rounds}")
        for limit in limits:
            for _ in range(LIMIT_RUNS):
                limit.measure()
        for entry in entries:
            entry.seconds.append(timed(entry, texts))


def rows_of(
    entries: list[Entry], truth: Any, tokens: int, gates: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of the results.

    Args:
        entries: the systems, measured or not.
        truth: float32 embeddings of the reference, `[N, E]`.
        tokens: real tokens of the texts, special tokens included.
        gates: by precision; a red one yields no ratios.
    """
    ours = {
        e.precision: e.seconds for e in entries if e.name == OURS and gates[e.precision]["green"]
    }
    rows = []
    for entry in entries:
        row = {"system": entry.name, "precision": entry.precision, "status": entry.status}
        rows.append(row)
        if entry.system is not None:
            row |= _figures(entry, truth, tokens)
            row["ratios"] = {
                precision: float(np.median(np.divide(entry.seconds, seconds)))
                for precision, seconds in ours.items()
                if entry.name != OURS
            }
    return rows


def _figures(entry: Entry, truth: Any, tokens: int) -> dict[str, Any]:
    match = cosines(entry.embeddings, truth)
    rates = tokens / np.array(entry.seconds)
    return {
        "batch": str(entry.setting) if entry.system.batch_sizes else "auto",
        "tokens_per_s": float(np.median(rates)),
        "sentences_per_s": float(len(match) / np.median(entry.seconds)),
        "iqr_tokens_per_s": np.percentile(rates, (25, 75)).tolist(),
        "worst_cosine": float(match.min()),
        "mean_cosine": float(match.mean()),
        "real_token_share": entry.computed_tokens and tokens / entry.computed_tokens,
        **entry.memory,
        "sweep_tokens_per_s": {str(setting): rate for setting, rate in entry.sweep.items()},
        "seconds": entry.seconds,
    }


def latency(entries: list[Entry], folder: ModelFolder) -> dict[str, Any]:
    """Milliseconds of single calls with one short text, systems in turn."""
    texts = load_corpus("short", 200)
    _, lengths = folder.tokenize(texts)
    nearest = int(np.abs(lengths - LATENCY_TOKENS).argmin())
    text, chosen = [texts[nearest]], [e for e in entries if e.name in (OURS, REFERENCE)]
    calls = [(e, e.system, []) for e in chosen]
    for i in range(LATENCY_WARM_CALLS + LATENCY_CALLS):
        for _, system, seconds in calls:
            start = time.perf_counter()
            system.encode(text, Setting(1))
            if i >= LATENCY_WARM_CALLS:
                seconds.append(time.perf_counter() - start)
    rows = []
    for entry, _, seconds in calls:
        p50, p95 = np.percentile(np.array(seconds) * 1e3, (50, 95))
        row = {"system": entry.name, "precision": entry.precision}
        rows.append(row | {"p50_ms": float(p50), "p95_ms": float(p95)})
    return {"tokens": int(lengths[nearest]), "calls": LATENCY_CALLS, "rows": rows}
