"""Times every op beside its peers.

    pytest benchmarks/ops -k attention --rows rows.jsonl

What pytest-benchmark reports are the samples of ours (on a GPU, in Triton), taken in turn with
those of the CUDA op and the peers; the rest of the row is in `extra_info`. The rows that tell most
come first: a run may be cut short. See benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import stopwatch
from benchmarks.common.pages import COPY
from benchmarks.common.stopwatch import cache_bytes, cold_sets
from benchmarks.ops.cases import Case, attention_case, lengths_of, row_case
from benchmarks.ops.peers import CUDNN, EAGER, FA3, FA4, FLEX, MMA, ROW_PEERS, SDPA, VARLEN
from sbert_fast.bench.names import OURS, OURS_CUDA, message

COLD_TOKENS = {"cuda": 65_536, "cpu": 4096}
FIXED = ("16", "32", "64", "128", "256", "512")
LONG = ("1024", "2048", "4096")
DISTRIBUTIONS = ("short", "passages", "wiki", "mixed", "uniform")
# FlexAttention is compiled anew for every mask: three lengths tell.
FLEX_LENGTHS = ("64", "512", "short")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROW_OPS = ("embed_norm", "add_norm", "bias_gelu", "segment_pool", "norm_pool")
_clock = SimpleNamespace(now=0.0)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that no unwritten result passes."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(case: Case) -> dict[str, str | None]:
    """What is wrong with the first result of each system; None where nothing is.

    A system that cannot be run is moved to the missing ones.
    """
    found: dict[str, str | None] = {}
    for name, call in list(case.systems.items()):
        if name == COPY:
            continue
        try:
            ours = name in case.ours
            with stopwatch.context_of(call), _poisoned() if ours else nullcontext():
                out = call(0)
            found[name] = case.wrong(out)
            if ours:
                out.fill_(float("nan"))  # the next result may be given this memory
        except Exception as error:
            case.missing[name] = message(error)
            del case.systems[name]
    return found


def measure(
    case: Case, device: torch.device, copy_rate: float, samples: int = stopwatch.SAMPLES
) -> dict[str, Any]:
    """Check and time a case; `copy_rate` is that of a large copy, in bytes a second.

    Returns:
        `ok`: whether every result of ours is right; `systems`: for each its figures, its `error`,
        or, of ours that this device cannot run, what is `missing`; `ratios`: how many times faster
        ours is than each other system, and `ratios_cuda`, where the CUDA op was to run, how many
        times it is. What is wrong has none.
    """
    wrong = check(case)
    timings = stopwatch.take_turns(case.systems, len(case.sets), device, samples)
    floor = case.moved_bytes / copy_rate
    systems: dict[str, Any] = {name: {"error": why} for name, why in case.missing.items()}
    systems |= {name: {"missing": why} for name, why in case.absent.items()}
    for name, timing in timings.items():
        if timing.error is not None:
            systems[name] = {"error": timing.error}
            continue
        systems[name] = {
            "us": timing.median * 1e6,
            "iqr_us": (1e6 * np.percentile(timing.seconds, (25, 75))).tolist(),
            "tokens_per_s": sum(case.lengths) / timing.median,
            "floor_fraction": floor / timing.median,
            "launch_bound": timing.launch_bound,
            "samples_us": [s * 1e6 for s in timing.seconds],
            "wrong": wrong.get(name),
        }
    ran = {name: timing for name, timing in timings.items() if timing.error is None}
    right = [n for n in case.ours if n in ran and wrong.get(n, "did not run") is None]
    # Ours that is wrong is no peer either.
    peers = {name: t for name, t in ran.items() if name in right or name not in case.ours}

    def ratios(ours: str) -> dict[str, float]:
        others = {name: timing for name, timing in peers.items() if name != ours}
        if ours not in right:
            return {}
        return {name: stopwatch.paired_ratio(t, ran[ours]) for name, t in others.items()}

    return {
        "op": case.op,
        "tokens": sum(case.lengths),
        "sequences": len(case.lengths),
        "moved_bytes": case.moved_bytes,
        "floor_us": floor * 1e6,
        "copy_bytes_per_s": copy_rate,
        "sets": len(case.sets),
        "ok": len(right) == len(case.ours),
        "systems": systems,
        "ratios": ratios(OURS),
    } | ({"ratios_cuda": ratios(OURS_CUDA)} if OURS_CUDA in case.ours else {})


def replay() -> float:
    """A clock that passes as much time in each round as the sample took."""
    return _clock.now


pytestmark = pytest.mark.benchmark(timer=replay)


class Bench:
    """Measures cases and keeps their rows; a case that fails is kept as an error."""

    def __init__(self, benchmark: Any, device: torch.device, options: Any) -> None:
        self.benchmark, self.device, self.options = benchmark, device, options

    def row(self, what: dict[str, Any], dtype: torch.dtype, make: Callable[[], Case]) -> None:
        """Measure a case, and fail where ours is wrong."""
        what |= {"dtype": str(dtype).removeprefix("torch.")}
        if self.device.type == "cpu" and dtype == torch.float16:
            pytest.skip("float16 is for GPUs")
        try:
            figures = measure(make(), self.device, self.options.copy_rate)
        except Exception as error:
            self.options.record("error", what | {"error": message(error)})
            raise
        self.options.record("row", what | figures)
        systems = figures["systems"]
        if "error" not in systems[OURS]:
            samples = systems[OURS]["samples_us"]
            left = iter(samples)
            self.benchmark.extra_info |= what | figures

            def step() -> None:
                _clock.now += next(left) / 1e6

            self.benchmark.pedantic(step, rounds=len(samples))
        ours = {name: systems[name] for name in (OURS, OURS_CUDA) if name in systems}
        faults = {name: each.get("error") or each.get("wrong") for name, each in ours.items()}
        assert figures["ok"], faults

    def size(self, state: str, bytes_of_a_token: int) -> tuple[int, int]:
        """Tokens of a set, and the number of sets."""
        tokens = COLD_TOKENS[self.device.type]
        if state == "cold":
            return tokens, cold_sets(self.device, tokens * bytes_of_a_token)
        fitting = cache_bytes(self.device) // 3 // bytes_of_a_token // 1024 * 1024
        return max(1024, min(tokens, fitting)), 1

    def attention(
        self, state: str, dtype: torch.dtype, lengths: str, dim: int, peers: tuple[str, ...]
    ) -> None:
        """Measure attention."""
        tokens, sets = self.size(state, 4 * 12 * dim * dtype.itemsize)
        drawn = lengths_of(lengths, tokens)
        what = {"lengths": lengths, "state": state, "dim": dim}
        self.row(what, dtype, lambda: attention_case(self.device, dtype, drawn, dim, sets, peers))


@pytest.fixture
def bench(benchmark: Any, device: torch.device, options: Any) -> Bench:
    return Bench(benchmark, device, options)


def _attention_rows() -> Iterator[Any]:
    """State, dtype, lengths and head dim; the rows that tell most come first."""
    for state, name in (("cold", "fp16"), ("cold", "bf16"), ("hot", "fp16")):
        for lengths in (*FIXED, *LONG, *DISTRIBUTIONS):
            for dim in (32, 64) if state == "cold" or lengths not in LONG else (32,):
                key = f"{state}-{name}-{lengths}-{dim}"
                yield pytest.param(state, HALVES[name], lengths, dim, id=key)


@pytest.mark.parametrize(("state", "dtype", "lengths", "dim"), _attention_rows())
def test_attention(bench: Bench, state: str, dtype: torch.dtype, lengths: str, dim: int) -> None:
    peers: tuple[str, ...] = (VARLEN, SDPA)
    if bench.device.type == "cuda" and state == "cold" and dtype == torch.float16:
        # cuDNN looks for a kernel for each shape: it gets those that need no mask.
        peers += (FA3, FA4) if lengths in DISTRIBUTIONS else (FA3, FA4, CUDNN)
        if max(lengths_of(lengths, 1024)) > 64:
            peers += (MMA,)
    bench.attention(state, dtype, lengths, dim, peers)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("lengths", FLEX_LENGTHS)
def test_flex(bench: Bench, lengths: str, dim: int) -> None:
    dtype = torch.float16 if bench.device.type == "cuda" else torch.bfloat16
    bench.attention("cold", dtype, lengths, dim, (FLEX,))


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("width", [384, 1024, 768])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("state", ["cold", "hot"])
def test_rows(bench: Bench, op: str, width: int, state: str, dtype: torch.dtype) -> None:
    # Compiling takes longer than all the rest.
    compiled = state == "cold" and dtype == torch.float16 and width != 768
    peers = ROW_PEERS if compiled else (EAGER,)
    per_token = {"bias_gelu": 8, "norm_pool": 2, "segment_pool": 1, "embed_norm": 2}.get(op, 3)
    tokens, sets = bench.size(state, per_token * width * dtype.itemsize)
    drawn = lengths_of("short", tokens)
    what = {"lengths": "short", "state": state, "width": width, "op": op}
    bench.row(what, dtype, lambda: row_case(op, bench.device, dtype, drawn, width, sets, peers))
