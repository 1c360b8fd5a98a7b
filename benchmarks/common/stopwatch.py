"""Seconds a call takes on a device, in turn with the calls it is compared with.

On a GPU a sample is a number of calls between two events, queued behind a delay, so that the device
never waits for a launch; a sample during which it did is taken again. On a CPU it is a number of
calls between two readings of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sbert_fast.bench.contenders import synchronize
from sbert_fast.bench.names import message

# A call on one of several sets of inputs, by its number.
Call = Callable[[int], Any]

SAMPLES = 15
_SAMPLE_SECONDS = 1e-3
_MOST_CALLS = 96
_WARM_CALLS = 3
# Above what any GPU runs at, so that a delay is never shorter than asked for.
_CLOCK_HZ = 2.5e9
_LONGEST_DELAY = 0.1
_CPU_CACHE = 32 << 20


@dataclass
class Timing:
    """Seconds a call in every sample, or what went wrong."""

    seconds: list[float] = field(default_factory=list)
    launch_bound: bool = False
    error: str | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def context_of(call: Any) -> AbstractContextManager[Any]:
    """What a call says it must run inside, by an attribute `context`: entered once a sample."""
    return getattr(call, "context", nullcontext)()


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache of `device`; a common size for a CPU."""
    if device.type != "cuda":
        return _CPU_CACHE
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def cold_sets(device: torch.device, bytes_of_a_call: int) -> int:
    """Sets of inputs that together exceed the cache four times; 3 to 32 of them."""
    return min(32, max(3, -(-4 * cache_bytes(device) // max(1, bytes_of_a_call))))


class Runner:
    """One system being timed on a number of input sets."""

    def __init__(self, call: Call, sets: int, device: torch.device) -> None:
        self.call, self.sets, self.device = call, sets, device
        self.timing = Timing()
        self._kept: list[Any] = [None] * sets
        self._delay = 0.0
        self._calls = sets

    def warm_up(self) -> None:
        """Run until compiled, then learn how many calls make a sample and how long they launch."""
        self._launch(_WARM_CALLS)
        synchronize(self.device)
        start = time.perf_counter()
        self._launch(self._calls)
        launched = time.perf_counter() - start
        synchronize(self.device)
        seconds = (time.perf_counter() - start) / self._calls
        wanted = min(_MOST_CALLS, max(1, round(_SAMPLE_SECONDS / max(seconds, 1e-9))))
        rounds = -(-wanted // self.sets)
        self._delay = min(_LONGEST_DELAY, 1.5 * launched * rounds + 5e-5)
        self._calls = rounds * self.sets

    def _launch(self, calls: int) -> None:
        # Results are kept until their inputs' next turn: outputs are as cold as inputs.
        for i in range(calls):
            self._kept[i % self.sets] = self.call(i % self.sets)

    def sample(self) -> None:
        """Take one sample."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            self._launch(self._calls)
            self.timing.seconds.append((time.perf_counter() - start) / self._calls)
            return
        for _ in range(4):
            seconds, waited = self._cuda_sample()
            if waited:
                break
            self._delay = min(_LONGEST_DELAY, 2 * self._delay)
        else:
            self.timing.launch_bound = True
        self.timing.seconds.append(seconds)

    def _cuda_sample(self) -> tuple[float, bool]:
        """Seconds a call, and whether the device began after the last launch."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(int(self._delay * _CLOCK_HZ))
        start.record()
        self._launch(self._calls)
        end.record()
        waited = not start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._calls, waited

    def drop(self, error: BaseException) -> None:
        """Note a failure; the results so far mean nothing."""
        self.timing = Timing(error=message(error))
        self._kept = []


def take_turns(
    systems: dict[str, Call], sets: int, device: torch.device, samples: int = SAMPLES
) -> dict[str, Timing]:
    """Time systems sample by sample in turn; one that fails is left out and says why."""
    runners = {name: Runner(call, sets, device) for name, call in systems.items()}
    running = dict(runners)

    def step(action: Callable[[Runner], None]) -> None:
        for name, runner in list(running.items()):
            try:
                with context_of(runner.call):
                    action(runner)
                    synchronize(device)
            except Exception as error:
                runner.drop(error)
                del running[name]

    step(Runner.warm_up)
    for _ in range(samples):
        step(Runner.sample)
    return {name: runner.timing for name, runner in runners.items()}


def paired_ratio(theirs: Timing, ours: Timing) -> float:
    """Median of the ratios within the rounds: above 1 where ours is faster."""
    return float(np.median(np.divide(theirs.seconds, ours.seconds)))


def median_seconds(call: Call, sets: int, device: torch.device) -> float:
    """Seconds of one system, timed alone.

    Raises:
        RuntimeError: it fails.
    """
    timing = take_turns({"": call}, sets, device)[""]
    if timing.error:
        raise RuntimeError(timing.error)
    return timing.median


def copies(size: int, sets: int, device: torch.device) -> Call:
    """Copies `size` bytes within the memory of `device`."""
    pairs = [torch.zeros(2, size, dtype=torch.uint8, device=device) for _ in range(sets)]
    return lambda i: pairs[i][1].copy_(pairs[i][0])


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of a copy of `size` bytes, read and written ones counted."""
    return 2 * size / median_seconds(copies(size, 2, device), 2, device)
