"""Times what may stand in the rows of kernels/triton/tuning.py, and rewrites those that gain.

    python -m benchmarks.tune --out results-tmp/tune [--dry-run] [--row 16,32] [--seconds 480]

On a GPU, with the python3 that has torch and triton for it. The fields of a row are tuned a few at
a time, rows in order of value; what a step has found is written at once. See benchmarks/README.md.
"""

from __future__ import annotations

import ast
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import provenance, storage, tree
from benchmarks.common.options import plain_parser

if TYPE_CHECKING:
    from benchmarks.common.stopwatch import Timing
    from benchmarks.tune.lab import Lab
    from benchmarks.tune.table import Key, Step
    from sbert_fast.kernels.tuning import Attention

# A smaller gain is not worth a change, and no input may lose more than LOSS.
MARGIN, LOSS = 0.02, 0.01
SCREENING_SAMPLES, FINAL_SAMPLES, FINALISTS = 9, 31, 3
SECONDS = 480.0

# Timings of each row on each input, in the order of the rows.
Times = dict[str, "list[Timing]"]


@dataclass
class Found:
    """What a step has found.

    Attributes:
        best: the row that is to be used; the present one where nothing is better.
        gain: of the best row over the present one, as a share.
        noise: how far the present row was from itself, as a share.
        inputs: the gain on each input.
        tried: of every candidate, its gain at first sight, or why it was refused.
        finished: whether the time was enough.
    """

    key: Key
    step: Step
    present: Attention
    best: Attention
    gain: float = 0.0
    noise: float | None = None
    inputs: dict[str, float] = field(default_factory=dict)
    tried: dict[str, float | str] = field(default_factory=dict)
    finished: bool = False

    def json(self) -> dict[str, Any]:
        """For a file of results."""
        told = {"present": self.step.told(self.present), "best": self.step.told(self.best)}
        made = {"row": list(self.key), "step": self.step.name} | told
        figures = ("gain", "noise", "inputs", "tried", "finished")
        return made | {name: getattr(self, name) for name in figures}

    def __str__(self) -> str:
        bits, width = self.key
        told = "no gain" if self.finished else "no time left"
        if self.best != self.present:
            told = f"{self.step.told(self.best)} gains {self.gain:.1%} (noise {self.noise:.1%})"
        refused = sum(isinstance(result, str) for result in self.tried.values())
        tried = f"{len(self.tried)} candidates, {refused} refused"
        return f"{bits} bits, D {width}: {self.step.told(self.present)}: {told}; {tried}"


def valid(timings: Sequence[Timing]) -> bool:
    """Whether timings tell how long kernels take: no failure, none launched more slowly."""
    return not any(t.error or t.launch_bound for t in timings)


def ratios(times: Times, base: int, row: int) -> NDArray[np.float64]:
    """How much faster `row` is than `base` in every round: the geometric mean over the inputs."""
    logs = [np.log(np.divide(t[base].seconds, t[row].seconds)) for t in times.values()]
    return np.exp(np.mean(logs, axis=0))


def promising(found: Found, times: Times, rows: Sequence[Attention]) -> list[Attention]:
    """The few rows that look best at first sight; `times` begin with the present row."""
    gains = {}
    for i, row in enumerate(rows, 1):
        if not valid([t[i] for t in times.values()]):
            found.tried[found.step.told(row)] = "failed while it was timed, or launched too slowly"
            continue
        gains[i] = float(np.median(ratios(times, 0, i))) - 1
        found.tried[found.step.told(row)] = gains[i]
    best = sorted(gains, key=lambda i: -gains[i])[:FINALISTS]
    return [rows[i - 1] for i in best if gains[i] > MARGIN / 2]


def winners(
    found: Found, times: Times, rows: Sequence[Attention]
) -> list[tuple[Attention, float, dict[str, float]]]:
    """Rows that are surely faster, the fastest first, each with its gain and that on each input.

    `times` begin with the present row, twice: three rounds in four of a winner are above three in
    four of the present row beside itself.
    """
    if not valid([timing for t in times.values() for timing in t[:2]]):
        return []
    itself = ratios(times, 0, 1)
    found.noise = float(np.abs(np.percentile(itself, (25, 75)) - 1).max())
    won = []
    for i, row in enumerate(rows, 2):
        if not valid([t[i] for t in times.values()]):
            continue
        gained = ratios(times, 0, i)
        gain = float(np.median(gained)) - 1
        each = {name: float(np.median(ratios({name: t}, 0, i))) - 1 for name, t in times.items()}
        sure = np.percentile(gained, 25) > np.percentile(itself, 75)
        if gain >= MARGIN and sure and min(each.values()) >= -LOSS:
            won.append((row, gain, each))
    return sorted(won, key=lambda each: -each[1])


def tune_step(
    rows: Lab, key: Key, step: Step, present: Attention, over: Callable[[], bool]
) -> Found:
    """Try the candidates of one step in place of the `present` row, until the time is `over`."""
    found = Found(key, step, present, present)
    candidates = step.candidates(present, rows.capability)
    rows.prepare(step, candidates)
    usable = []
    for row in candidates:
        if over():
            return found
        if reason := rows.refusal(step, row):
            found.tried[step.told(row)] = reason
        else:
            usable.append(row)
    times = rows.times(step, [present, *usable], SCREENING_SAMPLES)
    if not valid([t[0] for t in times.values()]):
        found.tried[step.told(present)] = "failed while it was timed, or launched too slowly"
        return found
    finalists = promising(found, times, usable)
    if finalists and over():
        return found
    if finalists:
        times = rows.times(step, [present, present, *finalists], FINAL_SAMPLES)
        for row, gain, each in winners(found, times, finalists):
            if over():
                return found
            if reason := rows.refusal_elsewhere(row):
                found.tried[step.told(row)] = reason
                continue
            found.best, found.gain, found.inputs = row, gain, each
            break
    found.finished = True
    return found


def tune(
    table: dict[Key, Attention],
    keys: Sequence[Key],
    steps: Sequence[Step],
    make: Callable[[Key, Attention], Lab],
    keep: Callable[[Found], None],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Found]:
    """Tune rows as long as there is time; `table` holds the best rows, step by step.

    Args:
        table: rows by key, changed in place.
        keys: which, the most valuable first.
        steps: of each row, in this order.
        make: the device's side for a key and its original row.
        keep: called after every step.
        seconds: no candidate is begun after them.
        clock: seconds from any point.
    """
    end = clock() + seconds
    found = []
    for key in keys:
        if clock() >= end:
            break
        rows = make(key, table[key])
        for step in steps:
            if clock() >= end:
                break
            found.append(tune_step(rows, key, step, table[key], lambda: clock() >= end))
            table[key] = found[-1].best
            keep(found[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--dry-run", action="store_true", help="only print what would change")
    add("--row", type=ast.literal_eval, action="append", metavar="BITS,WIDTH", help="only this one")
    add("--seconds", type=float, default=SECONDS, help="for everything (%(default)s)")
    args = parser.parse_args(argv)
    import torch

    from benchmarks.tune import lab
    from benchmarks.tune import table as launch_table
    from sbert_fast.kernels import tuning

    if not torch.cuda.is_available():
        print("torch finds no NVIDIA GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    table = dict(tuning._ATTENTION)
    origin = provenance.provenance(torch.get_num_threads(), "cuda")
    steps: list[dict[str, Any]] = []

    def keep(found: Found) -> None:
        steps.append(found.json())
        print(found, flush=True)
        if args.dry_run:
            return
        launch_table.write(launch_table.TABLE, table)
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(launch_table.TABLE, args.out / "tuning.py")
        document = origin | {"benchmark": "tune", "seconds": args.seconds, "steps": steps}
        storage.write_json(document, args.out / "tune.json")

    keys = args.row or launch_table.BY_VALUE
    make = partial(lab.Lab, device=device)
    tune(table, keys, launch_table.STEPS, make, keep, args.seconds)
    return 0


if __name__ == "__main__":
    tree.use()
    raise SystemExit(main())
