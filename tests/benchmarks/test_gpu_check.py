"""The GPU check without a GPU: what runs, for how long, what is kept of it, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import tree
from tools.gpu import check as gpu_check
from tools.gpu import stages
from tools.gpu.stages import Step

Ran = list[tuple[str, Step, float]]


def step(name: str, code: str, cap: float = 30, must: bool = True, **sets: str) -> Step:
    return Step(name, [sys.executable, "-c", code], cap, must, sets)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs stages; the exit code, and the folder of the results."""

    def run(table: dict[str, list[Step]], *arguments: str) -> tuple[int, Path]:
        monkeypatch.setattr(stages, "make_stages", lambda out, model: dict(table))
        return gpu_check.main(["--out", str(tmp_path / "out"), *arguments]), tmp_path / "out"

    return run


def outcomes(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


def test_a_failed_stage_does_not_stop_the_next(
    check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = step("b", "print('FAILED tests/x.py::y'); print('1 failed'); raise SystemExit(3)")
    fine = step("a", "import os; print(os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS="fine")
    table = {"one": [fine, failing], "ground": [step("only where asked", "")]}
    code, out = check(table | {"two": [step("c", "print('also fine')")]})
    assert code == 1
    states = [(o["stage"], o["step"], o["returncode"], o["told"]) for o in outcomes(out)]
    assert states[:2] == [("one", "a", 0, "fine"), ("one", "b", 3, "1 failed")]
    assert states[2:] == [("two", "c", 0, "also fine")]
    log = (out / "log.txt").read_text()
    assert log.index("fine") < log.index("1 failed") < log.index("also fine")
    printed = capsys.readouterr().out
    assert "FAILED (3)" in printed and "FAILED tests/x.py::y" in printed
    assert printed.rstrip().endswith((out / "summary.txt").read_text().rstrip())
    assert check(table, "--stage", "one,tow")[0] == 2
    assert "no such stage: tow; there are one, ground" in capsys.readouterr().err


def test_a_step_is_cut_short_with_all_it_started(check: Any) -> None:
    nested = "import subprocess, sys, time; print('begun', flush=True); "
    nested += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    optional = [step("fails", "raise SystemExit(1)", must=False)]
    optional += [Step("absent", ["no-such-program"], 5, must=False)]
    code, out = check({"slow": [step("sleep", nested, 2)], "next": optional})
    assert code == 1 and time.monotonic() - start < 50
    slow, *after = outcomes(out)
    assert slow["timed_out"] and [o["returncode"] for o in after] == [1, 127]
    assert "begun" in (out / "log.txt").read_text()
    assert "cut short" in (out / "summary.txt").read_text()
    assert check({"next": optional})[0] == 0, "what may fail does not count"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """What would have run: stage, step and seconds; "slow" ones take all of theirs, on a clock of
    their own."""
    seen: Ran = []
    now = [1000.0]

    def run_step(stage: str, step: Step, cap: float, log: Path) -> gpu_check.Outcome:
        seen.append((stage, step, cap))
        now[0] += cap if "slow" in step.name else 1
        return gpu_check.Outcome(stage, step.name, 0, 1.0)

    monkeypatch.setattr(gpu_check, "run_step", run_step)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    return seen


SHARES = {
    "one": [step("slow a", "", cap=20), step("b", "", cap=10)],
    "two": [step("slow c", "", cap=10), step("d", "", cap=5)],
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--seconds", "45"), {"slow a": 20, "b": 10, "slow c": 19, "d": 5}),
        # Those that come first have theirs.
        (("--seconds", "24"), {"slow a": 20, "b": 4, "slow c": 3}),
        # Chosen stages have the time of all, but what takes four times its share hangs.
        (("--seconds", "90", "--stage", "one"), {"slow a": 60, "b": 30}),
        (("--seconds", "90", "--stage", "two"), {"slow c": 40, "d": 20}),
    ],
)
def test_no_step_takes_the_share_of_a_later_one(
    arguments: tuple[str, ...], expected: dict[str, int], check: Any, ran: Ran
) -> None:
    code, out = check(SHARES, *arguments)
    assert {step.name: round(cap) for _, step, cap in ran} == expected
    assert code == ("24" in arguments)
    assert (outcomes(out)[-1:] or [{}])[0].get("told") == ("no time left" if code else "")


def test_a_command_is_interrupted_even_in_the_background(check: Any) -> None:
    code = "import time; print('begun', flush=True)\n"
    code += "try: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, out = check({"one": [step("a", code, cap=2)]}, "--seconds", "2")
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcomes(out)[0]["told"] == "kept"


def test_every_stage_can_be_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: Ran
) -> None:
    model = tmp_path / "scratch" / "model"
    monkeypatch.setattr(stages, "WIDE_MODEL", model)
    monkeypatch.delenv("SBERT_FAST_TEST_MODEL", raising=False)
    command = ["--out", str(tmp_path / "out"), "--stage", "models", "--model", "somewhere"]
    assert gpu_check.main(command) == 0
    names = [(stage, step.name) for stage, step, _ in ran]
    assert names == [("prepare", "model in float32"), ("models", "tests")]
    assert (tmp_path / "path" / "sitecustomize.py").is_file()
    made = gpu_check.environment()
    assert made["PYTHONPATH"].split(os.pathsep)[0] == str(tree.PATH_HOOK)
    assert "SBERT_FAST_TEST_MODEL" not in made
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    assert gpu_check.main(command) == 0
    assert [stage for stage, _, _ in ran[2:]] == ["models"]
    assert gpu_check.environment()["SBERT_FAST_TEST_MODEL"] == str(model)


def test_some_rows_of_the_op_benchmarks_can_be_chosen(tmp_path: Path, ran: Ran) -> None:
    chosen = ("--stage", "kernels", "--kernels", "attention and fp16")
    assert gpu_check.main(["--out", str(tmp_path), *chosen]) == 0
    (command,) = [step.command for stage, step, _ in ran if stage == "kernels"]
    assert command[command.index("-k") + 1] == "attention and fp16"
    assert str(tmp_path / "ops.jsonl") in command
