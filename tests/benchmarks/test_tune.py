"""Tuning without a GPU: which rows are chosen, what is kept in time, the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import provenance
from benchmarks.common.stopwatch import Timing
from benchmarks.tune import __main__ as tune
from benchmarks.tune import lab as tune_lab
from benchmarks.tune import table as launch_table
from benchmarks.tune.table import STEPS, Key, Step
from sbert_fast.kernels import tuning
from sbert_fast.kernels.tuning import Attention

KEY = (16, 32)
ROW = tuning._ATTENTION[KEY]
_, _, BLOCK, _, PIPELINE = STEPS


@dataclass
class Fake:
    """Rows whose speeds are known, on a machine with noise; every call takes clock time."""

    speed: Callable[[Attention, str], float] = lambda row, name: 1.0
    noise: float = 0.01
    seed: int = 0
    refused: dict[Attention, str] = field(default_factory=dict)
    refused_elsewhere: dict[Attention, str] = field(default_factory=dict)
    broken: dict[Attention, Timing] = field(default_factory=dict)
    capability: tuple[int, int] = (9, 0)
    now: float = 0.0
    timed: list[list[Attention]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def prepare(self, step: Step, rows: Sequence[Attention]) -> None:
        self.now += 10

    def refusal(self, step: Step, row: Attention) -> str | None:
        self.now += 1
        return self.refused.get(row)

    def refusal_elsewhere(self, row: Attention) -> str | None:
        self.now += 30
        return self.refused_elsewhere.get(row)

    def times(self, step: Step, rows: Sequence[Attention], samples: int) -> tune.Times:
        self.now += 20
        self.timed.append(list(rows))
        times = {}
        for name in step.inputs(ROW):
            drift = 1 + 0.5 * self.random.random(samples)  # of the clock rate, from round to round
            times[name] = [
                self.broken.get(row)
                or Timing(list(drift * self.random.lognormal(0, self.noise, samples)
                               / self.speed(row, name)))
                for row in rows
            ]  # fmt: skip
        return times

    def step(self, step: Step) -> tune.Found:
        return tune.tune_step(self, KEY, step, ROW, lambda: False)


def faster(speeds: dict[Attention, float]) -> Callable[[Attention, str], float]:
    return lambda row, name: speeds.get(row, 1.0)


CANDIDATES = BLOCK.candidates(ROW, (9, 0))


@pytest.mark.parametrize("noise", [0.001, 0.05, 0.2])
def test_noise_changes_no_row(noise: float) -> None:
    """Nor does luck in the first measurement."""
    for seed in range(60):
        found = Fake(noise=noise, seed=seed).step(PIPELINE)
        assert found.finished and found.best == ROW and found.gain == 0
        assert len(found.tried) == len(PIPELINE.candidates(ROW, (9, 0)))


@pytest.mark.parametrize(("noise", "gain"), [(0.001, 0.03), (0.01, 0.06), (0.05, 0.3)])
def test_a_real_gain_changes_the_row(noise: float, gain: float) -> None:
    for seed in range(20):
        speeds = {CANDIDATES[3]: 1 + gain, CANDIDATES[1]: 1 + gain / 3, CANDIDATES[0]: 0.8}
        fake = Fake(faster(speeds), noise, seed)
        found = fake.step(BLOCK)
        assert found.finished and found.best == CANDIDATES[3]
        assert found.gain == pytest.approx(gain, rel=0.5) and found.noise is not None
        assert found.inputs.keys() == {"64", "mixed", "passages"}
        assert fake.timed[1][:2] == [ROW, ROW]


def loses_on_one_input(row: Attention, name: str) -> float:
    if row == CANDIDATES[0]:
        return 0.95 if name == "64" else 1.3
    return 1.04 if row == CANDIDATES[5] else 1.0


@pytest.mark.parametrize(
    ("speed", "best"),
    [
        (faster({CANDIDATES[2]: 1 + 0.8 * tune.MARGIN}), ROW),
        (loses_on_one_input, CANDIDATES[5]),
    ],
    ids=["too little", "one input"],
)
def test_what_is_not_enough(speed: Callable[[Attention, str], float], best: Attention) -> None:
    found = Fake(speed, noise=0.0005).step(BLOCK)
    assert found.best == best and found.noise is not None


@pytest.mark.parametrize("where", ["refused", "refused_elsewhere"])
def test_a_refused_row_is_never_chosen(where: str) -> None:
    fastest, second, reason = CANDIDATES[1], CANDIDATES[4], "other bits"
    fake = Fake(faster({fastest: 3.0, second: 1.2}), **{where: {fastest: reason}})
    found = fake.step(BLOCK)
    assert found.best == second and found.tried[BLOCK.told(fastest)] == reason
    assert (fastest in fake.timed[0]) == (where == "refused_elsewhere")
    all_refused = {where: dict.fromkeys(CANDIDATES, reason)}
    found = Fake(faster(dict.fromkeys(CANDIDATES, 3.0)), **all_refused).step(BLOCK)
    assert found.best == ROW and found.finished


@pytest.mark.parametrize(
    "timing",
    [Timing(error="broken"), Timing([1e-9] * 31, launch_bound=True)],
    ids=["error", "slow"],
)
def test_times_that_mean_nothing_choose_nothing(timing: Timing) -> None:
    fast, second = CANDIDATES[1], CANDIDATES[2]
    found = Fake(faster({second: 1.2}), broken={fast: timing}).step(BLOCK)
    assert found.best == second and isinstance(found.tried[BLOCK.told(fast)], str)
    found = Fake(faster({second: 1.2}), broken={ROW: timing}).step(BLOCK)
    assert found.best == ROW and not found.finished


KEYS = [KEY, (16, 64)]


def run(fake: Fake, seconds: float) -> tuple[dict[Key, Attention], Any]:
    table, kept = dict.fromkeys(KEYS, ROW), []
    made = {"make": lambda key, row: fake, "keep": kept.append, "clock": lambda: fake.now}
    found = tune.tune(table, KEYS, STEPS, seconds=seconds, **made)
    assert found == kept
    return table, found


def always_better(row: Attention, name: str) -> float:
    return 1 + 0.1 * (row.block_q == 32) + 0.1 * (row.heads == 1) + 0.1 * (row.stages == 2)


def test_steps_build_on_one_another_and_those_finished_in_time_are_kept() -> None:
    whole = Fake(always_better)
    table, found = run(whole, 1e9)
    assert [f.step for f in found] == [*STEPS, *STEPS]
    assert {(row.block_q, row.heads, row.stages) for row in table.values()} == {(32, 1, 2)}
    ends = []
    for seconds in range(0, int(whole.now) + 4, 3):
        fake = Fake(always_better)
        table, cut = run(fake, seconds)
        complete = [f for f in cut if f.finished]
        assert cut[: len(complete)] == complete and len(cut) <= len(complete) + 1
        assert [f.step for f in complete] == [f.step for f in found[: len(complete)]]
        assert all(f.best == f.present for f in cut if not f.finished)
        assert table == dict.fromkeys(KEYS, ROW) | {f.key: f.best for f in complete}
        assert fake.now <= seconds + 30  # what had begun, and no more
        ends.append(len(complete))
    assert ends == sorted(ends) and ends[0] == 0 and ends[-1] == len(found)


TABLE = launch_table.TABLE.read_text(encoding="utf-8")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`main` on a machine that is not there, with a copy of the table."""
    path = tmp_path / "kernels.py"
    path.write_text(TABLE)
    monkeypatch.setattr(launch_table, "TABLE", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(provenance, "provenance", lambda threads, kind: {"device": kind})
    monkeypatch.setattr(tune_lab, "Lab", lambda key, row, device: Fake(always_better))
    return lambda *arguments: tune.main(["--out", str(tmp_path / "out"), *arguments])


def test_the_command_rewrites_the_table_unless_it_runs_dry(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--row", "16,32", "--dry-run") == 0
    assert ": block_q=32 warps=" in capsys.readouterr().out
    assert (tmp_path / "kernels.py").read_text() == TABLE and not (tmp_path / "out").exists()
    assert command("--row", "16,32") == 0
    changed = (tmp_path / "kernels.py").read_text()
    parts = [launch_table.render(*row) in changed for row in tuning._ATTENTION.items()]
    assert parts == [key != KEY for key in tuning._ATTENTION]
    assert (tmp_path / "out/tuning.py").read_text() == changed
    result = json.loads((tmp_path / "out/tune.json").read_text())
    assert result["device"] == "cuda" and len(result["steps"]) == len(STEPS)
    step = next(s for s in result["steps"] if s["step"] == "block")
    assert step["present"] == "block_q=64 warps=4" and step["best"].startswith("block_q=32 ")
    assert "16 bits, D 32: block_q=64 warps=4: block_q=32 " in capsys.readouterr().out


def test_without_a_gpu_it_says_so(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command() == 2 and "torch finds no NVIDIA GPU" in capsys.readouterr().err
