"""Rows of launch parameters: how they are written, what is tried, and what they compute."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.tune import lab as tune_lab
from benchmarks.tune import table
from benchmarks.tune.table import BY_VALUE, STEPS, Key, Step
from sbert_fast.kernels import tuning

KEY = (16, 32)
ROW = tuning._ATTENTION[KEY]
GROUP, HEADS, BLOCK, FAR, PIPELINE = STEPS
every_row = pytest.mark.parametrize("key", BY_VALUE, ids=str)
on_cpu = pytest.mark.parametrize("triton_device", ["cpu"], indirect=True)


@every_row
def test_a_changed_row_is_all_that_changes(key: Key, tmp_path: Path) -> None:
    assert sorted(BY_VALUE) == sorted(tuning._ATTENTION)
    path, present = tmp_path / "tuning.py", tuning._ATTENTION[key]
    path.write_text(text := table.TABLE.read_text(encoding="utf-8"))
    table.write(path, tuning._ATTENTION)
    assert path.read_text() == text
    row = replace(present, group=8, heads=1, far_block_q=32, stages=4, registers=168)
    table.write(path, tuning._ATTENTION | {key: row})
    assert path.read_text() == text.replace(table.render(key, present), table.render(key, row))
    made = runpy.run_path(str(path))["_ATTENTION"][key]
    assert asdict(made) == asdict(row)


def test_an_unexpected_table_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tuning.py"
    path.write_text(text := table.TABLE.read_text(encoding="utf-8").replace("# fmt: off\n", ""))
    with pytest.raises(ValueError, match="must have a table _ATTENTION"):
        table.write(path, tuning._ATTENTION)
    assert path.read_text() == text


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
    # Only lengths of the short kernel are timed for it.
    assert GROUP.inputs(ROW) == ["short", "16", "32"]
    assert GROUP.inputs(tuning._ATTENTION[16, 128]) == ["short", "16"]
    assert BLOCK.inputs(ROW) == ["64", "mixed", "passages"]


@pytest.fixture
def lab(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tune_lab.Lab]:
    monkeypatch.setattr(tune_lab, "cold_sets", lambda device, size: 2)
    device = torch.device(triton_device)
    made = tune_lab.Lab(KEY, ROW, device, tokens=70, heads=2, ragged=(0, 17, 33, 0, 257))
    variants = made.variants()
    assert len(set(variants)) == 7 + (triton_device == "cuda")
    monkeypatch.setattr(made, "variants", lambda: [variants[0], *variants[4:7]])
    monkeypatch.setattr(made, "misfit", lambda row, archs: None)
    with np.errstate(all="ignore"):
        yield made
    assert tuning._ATTENTION[KEY] == ROW


@on_cpu
def test_candidates_keep_every_bit(lab: tune_lab.Lab) -> None:
    changes = [
        (GROUP, {"group": 8, "group_warps": 8}),
        (HEADS, {"heads": 1, "head_stages": 1}),
        (BLOCK, {"block_q": 128, "warps": 8}),
        (FAR, {"far_block_q": 64, "far_warps": 4}),
        (PIPELINE, {"stages": 2, "registers": 168}),
    ]
    whole = ROW
    for step, change in changes:
        row, whole = replace(ROW, **change), replace(whole, **change)
        assert row in step.candidates(ROW, (9, 0))
        assert lab.refusal(replace(step, lengths=step.lengths[:2]), row) is None
    assert lab.refusal_elsewhere(whole) is None


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
