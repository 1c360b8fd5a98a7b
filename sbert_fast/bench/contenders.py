"""Systems side by side on any device: each at its best setting, timed in turn, and behind a gate:
the correctness that stands before every figure, of the worst text beside unpatched float32."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sbert_fast.bench.corpora import Corpus
from sbert_fast.bench.names import OURS, OURS_CUDA, REFERENCE, say
from sbert_fast.bench.systems import Setting, System

FLOAT32_LOSS = 1e-6
WORST_LOSS = 5e-4
INT8_LOSS = 1e-2

# By name and precision of a system.
Embeddings = dict[tuple[str, str], NDArray[np.float32]]
Gates = dict[tuple[str, str], dict[str, Any]]


@dataclass
class Contender:
    """One system in one precision, and what has been measured of it.

    Attributes:
        sweep: seconds of each setting that was tried.
        staged: prepared ids, where those are what it is timed on.
        seconds: of a run, one a round.
        times: runs that make a sample.
        more: other figures of its row.
    """

    name: str
    precision: str
    status: str = "measured"
    system: System | None = None
    setting: Setting = Setting()
    sweep: dict[Setting, float] = field(default_factory=dict)
    embeddings: Any = None
    staged: Any = None
    seconds: list[float] = field(default_factory=list)
    times: int = 1
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"

    @property
    def named(self) -> dict[str, Any]:
        """What its rows begin with."""
        return {"system": self.name, "precision": self.precision}

    @property
    def running(self) -> System:
        """The system, which was built."""
        assert self.system is not None
        return self.system


class Sizes(NamedTuple):
    """The batch sizes of a sweep: the first, the one that it reaches in any case, the largest, and
    how often each is timed."""

    first: int
    reached: int
    largest: int = 1 << 20
    times: int = 1


def runner(each: Contender, scope: str, corpus: Corpus) -> Callable[[], Any]:
    """What is timed: strings to numpy (s1), or prepared ids to embeddings on the device (s3)."""
    if scope == "s1":
        return lambda: each.running.encode(corpus.texts, each.setting)
    each.staged = each.running.stage(corpus.tokens, each.setting.batch_size)
    return each.staged.run


def embed(each: Contender, scope: str, corpus: Corpus) -> NDArray[np.float32]:
    """Embeddings of a corpus in its order, float32 `[N, E]` on the host."""
    if scope == "s1":
        return each.running.encode(corpus.texts, each.setting)
    staged = each.running.stage(corpus.tokens, each.setting.batch_size)
    rows = staged.run().float().cpu().numpy()
    out = np.empty_like(rows)
    out[staged.order] = rows
    return out


def synchronize(device: torch.device) -> None:
    """Wait for everything launched on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Seconds of a run, the device done."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / times


def find_setting(
    each: Contender, scope: str, corpus: Corpus, device: torch.device, sizes: Sizes
) -> None:
    """Double the batch size as long as the largest is the best, for every number of workers; what
    does not fit into memory ends it."""
    for workers in each.running.workers:
        swept: dict[Setting, float] = {}
        size = sizes.first
        while size <= sizes.largest:
            each.setting = Setting(size, workers)
            each.running.forget()
            try:
                run = runner(each, scope, corpus)
                run()
                swept[each.setting] = min(seconds_of(run, device) for _ in range(sizes.times))
            except torch.OutOfMemoryError:
                break
            finally:
                each.staged = None
            best = min(swept, key=swept.__getitem__).batch_size
            if size >= len(corpus.texts) or (size >= sizes.reached and best < size):
                break
            size *= 2
        each.sweep |= swept
    each.setting = min(each.sweep, key=each.sweep.__getitem__)
    each.running.forget()


def take_turns(
    running: Sequence[tuple[Contender, Callable[[], Any]]],
    rounds: int,
    device: torch.device,
    before: Callable[[], Any] = lambda: None,
) -> Iterator[int]:
    """Time all systems in turn, round after round, `before` ahead of each; yields the rounds that
    are complete."""
    for done in range(1, rounds + 1):
        say(f"round {done} of {rounds}")
        before()
        for each, run in running:
            each.seconds.append(seconds_of(run, device, each.times))
        yield done


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of every row of `a` with the same row of `b`, both `[N, E]`, in float64.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"embeddings must have the reference's shape {b.shape}, got {a.shape}")
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    return (a64 * b64).sum(1) / (np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1))


def check(embeddings: Embeddings) -> Gates:
    """The gates of ours: the worst 1 - cosine, its limit, and whether it is green.

    Args:
        embeddings: `[N, E]`; among them the reference in float32. Ours in a precision without the
            reference has no gate, but for int8, which the reference does not have.
    """
    truth = embeddings[REFERENCE, "float32"]

    def loss(name: str, precision: str) -> float:
        return float((1 - cosines(embeddings[name, precision], truth)).max())

    gates = {}
    for name, precision in embeddings:
        if name not in (OURS, OURS_CUDA):
            continue
        limit, rule = {"int8": INT8_LOSS}.get(precision, FLOAT32_LOSS), "fixed"
        if precision not in ("float32", "int8"):
            if (REFERENCE, precision) not in embeddings:
                continue
            limit = min(2 * loss(REFERENCE, precision), WORST_LOSS)
            rule = f"twice what {REFERENCE} loses, at most {WORST_LOSS:.0e}"
        ours = loss(name, precision)
        # Written so that NaN, which compares false, is never green.
        green = ours <= limit
        gates[name, precision] = {"green": green, "loss": ours, "limit": limit, "rule": rule}
    return gates


def ratios(ours: str, each: Any, running: Sequence[Any], gates: Gates) -> dict[str, float]:
    """How many times faster ours is than `each`, by the precision of ours.

    Args:
        ours: name of the one of ours.
        each: a system with `name`, `precision` and `seconds`, one a round.
        running: all systems that took their turns.
        gates: of ours; what has no green one has no ratios.
    """

    def trusted(system: Any) -> bool:
        gate = gates.get((system.name, system.precision))
        return system.name not in (OURS, OURS_CUDA) or (gate is not None and gate["green"])

    return {
        other.precision: float(np.median(np.divide(each.seconds, other.seconds)))
        for other in running
        if other.name == ours != each.name and trusted(other) and trusted(each)
    }
