"""Candidates of launch parameters, compiled and timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.tune import lab as tune_lab
from benchmarks.tune.table import STEPS
from sbert_fast.kernels import tuning

KEY = (16, 32)
ROW = tuning._ATTENTION[KEY]
GROUP, HEADS, BLOCK, FAR, PIPELINE = STEPS


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
