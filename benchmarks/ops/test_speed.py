"""Times every op beside its peers.

    pytest benchmarks/ops -k attention --rows rows.jsonl

A cold row has at least 64k tokens on a GPU, in sets of inputs that together exceed its L2 cache
four times; a hot row has one set that fits. What pytest-benchmark reports are the samples of ours
(on a GPU, in Triton), taken in turn with those of the CUDA op and the peers; the rest of the row is
in `extra_info`. The rows that tell most come first: a run may be cut short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common.stopwatch import cache_bytes, cold_sets
from benchmarks.common.text import OURS, OURS_CUDA, message
from benchmarks.ops.cases import Case, attention_case, lengths_of, row_case
from benchmarks.ops.peers import CUDNN, EAGER, FA3, FA4, FLEX, MMA, ROW_PEERS, SDPA, VARLEN
from benchmarks.ops.rows import measure
from sbert_fast.transfer import device_error

COLD_TOKENS = {"cuda": 65_536, "cpu": 4096}
FIXED = ("16", "32", "64", "128", "256", "512")
LONG = ("1024", "2048", "4096")
DISTRIBUTIONS = ("short", "passages", "wiki", "mixed", "uniform")
# FlexAttention is compiled anew for every mask: three lengths tell.
FLEX_LENGTHS = ("64", "512", "short")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROW_OPS = ("embed_norm", "add_norm", "bias_gelu", "segment_pool", "norm_pool")
_clock = SimpleNamespace(now=0.0)


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
            self._stop_if_lost()
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
        self._stop_if_lost()
        ours = {name: systems[name] for name in (OURS, OURS_CUDA) if name in systems}
        faults = {name: each.get("error") or each.get("wrong") for name, each in ours.items()}
        assert figures["ok"], faults

    def _stop_if_lost(self) -> None:
        """After some errors nothing runs on a GPU until its process ends."""
        if (why := device_error(self.device)) is not None:
            pytest.exit(f"the device is lost: {why}", returncode=3)

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
