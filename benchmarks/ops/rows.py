"""One row of the op benchmarks: a case checked, timed, and put into figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from benchmarks.common import stopwatch
from benchmarks.common.stopwatch import Timing
from benchmarks.common.text import COPY, OURS, OURS_CUDA, message
from benchmarks.ops.cases import Case
from benchmarks.ops.peers import as_packed


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
            found[name] = case.wrong(as_packed(out))
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
    systems: dict[str, dict[str, Any]] = {
        name: {"error": why} for name, why in case.missing.items()
    } | {name: {"missing": why} for name, why in case.absent.items()}
    for name, timing in timings.items():
        if timing.error is not None:
            systems[name] = {"error": timing.error}
            continue
        systems[name] = _figures(timing, case, floor) | {"wrong": wrong.get(name)}
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
        "tokens": case.tokens,
        "sequences": case.sequences,
        "moved_bytes": case.moved_bytes,
        "floor_us": floor * 1e6,
        "copy_bytes_per_s": copy_rate,
        "sets": len(case.sets),
        "ok": len(right) == len(case.ours),
        "systems": systems,
        "ratios": ratios(OURS),
    } | ({"ratios_cuda": ratios(OURS_CUDA)} if OURS_CUDA in case.ours else {})


def _figures(timing: Timing, case: Case, floor: float) -> dict[str, Any]:
    return {
        "us": timing.median * 1e6,
        "iqr_us": [q * 1e6 for q in timing.quartiles()],
        "tokens_per_s": case.tokens / timing.median,
        "floor_fraction": floor / timing.median,
        "launch_bound": timing.launch_bound,
        "samples_us": [s * 1e6 for s in timing.seconds],
    }
