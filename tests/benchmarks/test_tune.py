"""Tuning without a GPU: the table is rewritten, rows are chosen, candidates keep their bits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import provenance
from benchmarks.common.stopwatch import Timing
from benchmarks.tune import __main__ as tune
from benchmarks.tune import lab as tune_lab
from benchmarks.tune import table as tune_rows
from benchmarks.tune.table import BY_VALUE, STEPS, Key, Step
from sbert_fast.kernels import tuning
from sbert_fast.kernels.tuning import Attention

KEY = (16, 32)
ROW = tuning._ATTENTION[KEY]
GROUP, HEADS, BLOCK, FAR, PIPELINE = STEPS
every_row = pytest.mark.parametrize("key", BY_VALUE, ids=str)


def table_text() -> str:
    return tune_rows.TABLE.read_text(encoding="utf-8")


# The table and its text.


def test_every_row_is_in_the_order_of_value() -> None:
    assert sorted(BY_VALUE) == sorted(tuning._ATTENTION)
    assert tune_rows.read_rows(table_text()) == tuning._ATTENTION


@every_row
def test_a_row_is_written_as_it_stands(key: Key) -> None:
    assert table_text().count(tune_rows.render(key, tuning._ATTENTION[key])) == 1


@every_row
def test_a_rewritten_row_is_all_that_changes(key: Key, tmp_path: Path) -> None:
    comment = "    # Measured on nothing at all.\n"
    text = table_text().replace("    (32, 16)", f"{comment}    (32, 16)")
    other = next(k for k in BY_VALUE if k != key)
    by_hand = r"\g<1>short=\g<2>, block=\g<3>, "
    text = re.sub(rf"({re.escape(str(other))}: Attention\()(\d+), (\d+), ", by_hand, text)
    assert "short=" in text
    path = tmp_path / "tuning.py"
    path.write_text(text)
    row = replace(tuning._ATTENTION[key], group=8, heads=1, far_block_q=32, stages=4, registers=168)
    assert tune_rows.write(path, tuning._ATTENTION | {key: row})
    changed = path.read_text()
    assert max(map(len, changed.splitlines())) <= 100
    assert changed.count(comment) == 1
    before, after = (t.replace(tune_rows.render(key, r), "") for t, r in
                     ((text, tuning._ATTENTION[key]), (changed, row)))  # fmt: skip
    assert before == after != changed
    module: dict[str, Any] = {"__name__": tuning.__name__}
    exec(compile(changed, "tuning.py", "exec"), module)
    rows = {k: asdict(r) for k, r in module["_ATTENTION"].items()}
    assert rows == {k: asdict(r) for k, r in (tuning._ATTENTION | {key: row}).items()}
    assert not tune_rows.write(path, {key: row})
    assert path.read_text() == changed
    assert tune_rows.write(path, {key: tuning._ATTENTION[key]})
    assert path.read_text() == text
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# fmt: off\n", ""),
        ("    (16, 32): Attention(", "    (16, 32):  Attention("),
        ("    (16, 32): Attention(32, 64, ", "    (16, 32): Attention(32, min(64, 64), "),
        ("    (16, 32): Attention(", "    (16, 31): Attention("),
    ],
)
def test_an_unexpected_table_is_left_alone(tmp_path: Path, old: str, new: str) -> None:
    assert table_text().count(old) == 1
    path = tmp_path / "tuning.py"
    path.write_text(text := table_text().replace(old, new))
    with pytest.raises(ValueError):
        tune_rows.write(path, {KEY: replace(ROW, stages=4)})
    assert path.read_text() == text


# Candidates.


@every_row
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_candidates(key: Key, step: Step) -> None:
    present = tuning._ATTENTION[key]
    rows = step.candidates(present, (9, 0))
    assert len(rows) >= 3 and present not in rows and len(set(rows)) == len(rows)
    for row in rows:
        assert replace(row, **{name: getattr(present, name) for name in step.fields}) == present
        for name in ("group", "group_warps", "heads", "block_q", "warps", "far_block_q"):
            value = getattr(row, name)
            assert value >= 1 and value & (value - 1) == 0
        assert row.head_stages <= row.heads or row.head_stages == present.head_stages
        assert max(row.group_warps, row.warps, row.far_warps) <= 8
        assert min(row.block_q // row.warps, row.far_block_q // row.far_warps) >= 8
        for heads in (6, 12, 16):
            assert heads % tuning.heads_together(row.heads, heads, 1 << 20) == 0
    elsewhere = step.candidates(present, (8, 0))
    assert elsewhere and {row.registers for row in elsewhere} == {present.registers}


def test_fields_are_tuned_once_and_never_those_that_decide_about_bits() -> None:
    names = [name for step in STEPS for name in step.fields]
    assert sorted(names) == sorted(set(asdict(ROW)) - {"short", "block"})


def test_only_lengths_of_the_short_kernel_are_timed_for_it() -> None:
    assert GROUP.inputs(ROW) == ["short", "16", "32"]
    assert GROUP.inputs(tuning._ATTENTION[16, 128]) == ["short", "16"]
    assert BLOCK.inputs(ROW) == ["64", "mixed", "passages"]


# Selection.


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

    def step(self, step: Step, present: Attention = ROW) -> tune.Found:
        return tune.tune_step(self, KEY, step, present, lambda: False)


def faster(speeds: dict[Attention, float]) -> Callable[[Attention, str], float]:
    return lambda row, name: speeds.get(row, 1.0)


CANDIDATES = BLOCK.candidates(ROW, (9, 0))


@pytest.mark.parametrize("noise", [0.001, 0.05, 0.2])
def test_noise_changes_no_row(noise: float) -> None:
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


def test_a_gain_below_the_margin_changes_nothing() -> None:
    speeds = {CANDIDATES[2]: 1 + 0.8 * tune.MARGIN}
    found = Fake(faster(speeds), noise=0.0005).step(BLOCK)
    assert found.best == ROW and found.noise is not None


def test_no_input_may_lose() -> None:
    def speed(row: Attention, name: str) -> float:
        if row == CANDIDATES[0]:
            return 0.95 if name == "64" else 1.3
        return 1.04 if row == CANDIDATES[5] else 1.0

    assert Fake(speed, noise=0.001).step(BLOCK).best == CANDIDATES[5]


def test_luck_in_the_first_measurement_is_not_enough() -> None:
    fake = Fake(noise=0.001)
    fake.speed = lambda row, name: 1.3 if row == CANDIDATES[4] and len(fake.timed) == 1 else 1.0
    found = fake.step(BLOCK)
    assert found.best == ROW
    assert found.tried[BLOCK.told(CANDIDATES[4])] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("reason", ["other bits", "spills", "OutOfResources: shared memory"])
@pytest.mark.parametrize("where", ["refused", "refused_elsewhere"])
def test_a_refused_row_is_never_chosen(reason: str, where: str) -> None:
    fastest, second = CANDIDATES[1], CANDIDATES[4]
    fake = Fake(faster({fastest: 3.0, second: 1.2}), **{where: {fastest: reason}})
    found = fake.step(BLOCK)
    assert found.best == second
    assert found.tried[BLOCK.told(fastest)] == reason
    assert (fastest in fake.timed[0]) == (where == "refused_elsewhere")
    alone = Fake(faster({fastest: 3.0}), **{where: {fastest: reason}}).step(BLOCK)
    assert alone.best == ROW and alone.finished
    everything = dict.fromkeys(CANDIDATES, reason)
    none = Fake(faster(dict.fromkeys(CANDIDATES, 2.0)), **{where: everything}).step(BLOCK)
    assert none.best == ROW and none.finished


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


def run(fake: Fake, keys: Sequence[Key], seconds: float) -> tuple[dict[Key, Attention], Any]:
    table, kept = dict.fromkeys(keys, ROW), []
    made = {"make": lambda key, row: fake, "keep": kept.append, "clock": lambda: fake.now}
    found = tune.tune(table, keys, STEPS, seconds=seconds, **made)
    assert found == kept
    return table, found


def always_better(row: Attention, name: str) -> float:
    return 1 + 0.1 * (row.block_q == 32) + 0.1 * (row.heads == 1) + 0.1 * (row.stages == 2)


def test_steps_build_on_one_another() -> None:
    table, found = run(Fake(always_better), [KEY, (16, 64)], 1e9)
    assert [f.step for f in found] == [*STEPS, *STEPS]
    for row in table.values():
        assert (row.block_q, row.heads, row.stages) == (32, 1, 2)
        assert replace(row, block_q=64, warps=4, heads=2, head_stages=2, stages=3,
                       registers=128) == ROW  # fmt: skip


def test_what_was_finished_in_time_is_kept() -> None:
    whole = Fake(always_better)
    _, found = run(whole, [KEY, (16, 64)], 1e9)
    ends = []
    for seconds in range(0, int(whole.now) + 4, 3):
        fake = Fake(always_better)
        table, cut = run(fake, [KEY, (16, 64)], seconds)
        complete = [f for f in cut if f.finished]
        assert cut[: len(complete)] == complete and len(cut) <= len(complete) + 1
        assert [f.step for f in complete] == [f.step for f in found[: len(complete)]]
        assert all(f.best == f.present for f in cut if not f.finished)
        last = {key: ROW for key in table} | {f.key: f.best for f in complete}
        assert table == last
        assert fake.now <= seconds + 30  # what had begun, and no more
        ends.append(len(complete))
    assert ends == sorted(ends) and ends[0] == 0 and ends[-1] == len(found)


# The command.


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`main` on a machine that is not there, with a copy of the table."""
    path = tmp_path / "kernels.py"
    path.write_text(table_text())
    monkeypatch.setattr(tune_rows, "TABLE", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(provenance, "provenance", lambda threads, kind: {"device": kind})
    monkeypatch.setattr(tune_lab, "Lab", lambda key, row, device: Fake(always_better))
    return lambda *arguments: tune.main(["--out", str(tmp_path / "out"), *arguments])


def test_the_command_rewrites_the_table(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--row", "16,32") == 0
    rows = tune_rows.read_rows((tmp_path / "kernels.py").read_text())
    assert (rows[KEY].block_q, rows[KEY].heads, rows[KEY].stages) == (32, 1, 2)
    assert {k: r for k, r in rows.items() if k != KEY} == {
        k: r for k, r in tuning._ATTENTION.items() if k != KEY
    }
    assert (tmp_path / "out/tuning.py").read_text() == (tmp_path / "kernels.py").read_text()
    result = json.loads((tmp_path / "out/tune.json").read_text())
    assert result["device"] == "cuda" and len(result["steps"]) == len(STEPS)
    step = next(s for s in result["steps"] if s["step"] == "block")
    assert step["present"] == "block_q=64 warps=4" and step["best"].startswith("block_q=32 ")
    assert "| 16 bits, D 32 | block_q=64 warps=4" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--row", "16,32", "--dry-run") == 0
    assert (tmp_path / "kernels.py").read_text() == table_text()
    assert not (tmp_path / "out").exists()
    assert "| block_q=32 warps=" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command() == 2
    assert "torch finds no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Kernels, in the interpreter or on a GPU.


on_cpu = pytest.mark.parametrize("triton_device", ["cpu"], indirect=True)


@pytest.fixture
def lab(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tune_lab.Lab]:
    monkeypatch.setattr(tune_lab, "cold_sets", lambda device, size: 2)
    device = torch.device(triton_device)
    made = tune_lab.Lab(KEY, ROW, device, tokens=70, heads=2, ragged=(0, 17, 33, 0, 257))
    variants = made.variants()
    assert len(set(variants)) == 5 + (triton_device == "cuda")
    monkeypatch.setattr(made, "variants", lambda: [variants[0], variants[4]])
    monkeypatch.setattr(made, "misfit", lambda row, archs: None)
    with np.errstate(all="ignore"):
        yield made
    assert tuning._ATTENTION[KEY] == ROW


@on_cpu
def test_candidates_keep_every_bit(lab: tune_lab.Lab) -> None:
    changes = [
        (GROUP, {"group": 2, "group_warps": 2}),
        (GROUP, {"group": 8, "group_warps": 8}),
        (HEADS, {"heads": 1, "head_stages": 1}),
        (BLOCK, {"block_q": 128, "warps": 8}),
        (FAR, {"far_block_q": 64, "far_warps": 4}),
        (PIPELINE, {"stages": 2, "registers": 168}),
    ]
    for step, change in changes:
        row = replace(ROW, **change)
        assert row in step.candidates(ROW, (9, 0))
        assert lab.refusal(replace(step, lengths=step.lengths[:2]), row) is None
        assert lab.refusal_elsewhere(row) is None


@pytest.mark.parametrize(
    "triton_device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
def test_a_row_on_a_gpu(lab: tune_lab.Lab) -> None:
    row, step = replace(ROW, stages=2), replace(PIPELINE, lengths=("64",))
    lab.prepare(step, [row])
    assert lab.refusal(step, row) is None
    assert lab.refusal_elsewhere(row) is None
    assert all(len(t.seconds) == 3 for t in lab.times(step, [ROW, row], 3)["64"])
    # Half the registers; they are used on 9.0 alone.
    spilling = lab.refusal(step, replace(ROW, registers=64))
    assert spilling == ("spills" if lab.capability == (9, 0) else None)


@on_cpu
def test_other_bits_are_seen(lab: tune_lab.Lab) -> None:
    row = replace(ROW, block=32)
    assert lab.refusal(BLOCK, row) == "other bits"
    assert str(lab.refusal_elsewhere(row)).startswith("other bits with Variant(")
    assert "power of 2" in str(lab.refusal(GROUP, replace(ROW, group=3)))


@on_cpu
def test_rows_that_leave_something_unwritten_are_seen(
    lab: tune_lab.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against an original that does the same, so that the bits are equal."""
    plan = tune_lab.varlen_attention.plan
    monkeypatch.setattr(tune_lab.varlen_attention, "plan", lambda *args: list(plan(*args))[:1])
    assert lab.refusal(BLOCK, replace(ROW, stages=2)) == "other bits"


@on_cpu
def test_every_row_is_timed_on_every_input(lab: tune_lab.Lab) -> None:
    times = lab.times(GROUP, [ROW, ROW, replace(ROW, group=2), replace(ROW, group=3)], 2)
    assert list(times) == ["short", "16", "32"]
    for timings in times.values():
        assert [len(t.seconds) for t in timings] == [2, 2, 2, 0]
        assert min(s for t in timings[:3] for s in t.seconds) > 0
        assert timings[3].error


@pytest.mark.slow
def test_spills_are_seen_on_absent_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = tune_lab.Lab(KEY, ROW, torch.device("cpu"), tokens=70, heads=2)
    monkeypatch.setattr(lab, "variants", lambda: [])
    assert lab.misfit(replace(ROW, stages=2), (90,)) is None
    assert "sm_90: spills or does not fit" in str(lab.misfit(replace(ROW, registers=64), (90,)))
    assert "CompilationError" in str(lab.misfit(replace(ROW, block_q=48), (90,)))
