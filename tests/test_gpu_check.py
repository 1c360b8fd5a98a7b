"""The GPU check without a GPU: caps, appended files, exit codes, the summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402

ALLOWED_FILES = 6


def step(name: str, code: str, cap: float = 30, must: bool = True) -> dict[str, Any]:
    command = [sys.executable, "-c", code]
    return {"name": name, "command": command, "cap": cap, "must": must}


def check(tmp_path: Path, table: dict[str, Any], *arguments: str) -> tuple[int, Path]:
    file, out = tmp_path / "table.json", tmp_path / "out"
    file.write_text(json.dumps(table))
    return gpu_check.main(["--out", str(out), "--table", str(file), *arguments]), out


def outcomes(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


def test_a_failed_stage_does_not_stop_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = step("b", "print('FAILED tests/x.py::y'); print('1 failed'); raise SystemExit(3)")
    table = {
        "one": {"steps": [step("a", "print('fine')"), failing]},
        "two": {"steps": [step("c", "print('also fine')")]},
        "three": {"steps": [step("d", "")], "default": False},
    }
    code, out = check(tmp_path, table)
    assert code == 1
    states = [(o["stage"], o["step"], o["returncode"]) for o in outcomes(out)]
    assert states == [("one", "a", 0), ("one", "b", 3), ("two", "c", 0)]
    log = (out / "log.txt").read_text()
    assert log.index("fine") < log.index("1 failed") < log.index("also fine")
    printed = capsys.readouterr().out
    assert "FAILED (3)" in printed and "FAILED tests/x.py::y" in printed
    assert printed.rstrip().endswith((out / "summary.txt").read_text().rstrip())


def test_a_step_is_cut_short_with_all_it_started(tmp_path: Path) -> None:
    nested = "import subprocess, sys, time; print('begun', flush=True); "
    nested += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    table = {
        "slow": {"steps": [step("sleep", nested, cap=2)]},
        "next": {"steps": [step("runs", "print('ran')")]},
    }
    start = time.monotonic()
    code, out = check(tmp_path, table)
    assert code == 1
    assert time.monotonic() - start < 50
    slow, after = outcomes(out)
    assert slow["timed_out"] and after["returncode"] == 0
    assert "begun" in (out / "log.txt").read_text()
    assert "cut short" in (out / "summary.txt").read_text()


Ran = list[tuple[str, gpu_check.Step, float]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """What would have run: stage, step and seconds; "slow" ones take all of theirs, on a clock of
    their own."""
    seen: Ran = []
    now = [1000.0]

    def run_step(stage: str, step: gpu_check.Step, cap: float, log: Path) -> gpu_check.Outcome:
        seen.append((stage, step, cap))
        now[0] += cap if "slow" in step.name else 1
        return gpu_check.Outcome(stage, step.name, 0, 1.0)

    monkeypatch.setattr(gpu_check, "run_step", run_step)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    return seen


def seconds(ran: Ran) -> dict[str, int]:
    return {step.name: round(cap) for _, step, cap in ran}


def test_no_step_takes_the_share_of_a_later_one(tmp_path: Path, ran: Ran) -> None:
    table = {
        "one": {"steps": [step("slow a", "", cap=20), step("b", "", cap=10)]},
        "two": {"steps": [step("slow c", "", cap=10), step("d", "", cap=5)]},
    }
    check(tmp_path, table, "--seconds", "45")
    assert seconds(ran) == {"slow a": 20, "b": 10, "slow c": 19, "d": 5}
    ran.clear()
    code, out = check(tmp_path, table, "--seconds", "24")
    assert seconds(ran) == {"slow a": 20, "b": 4, "slow c": 3}, "those that come first have theirs"
    assert code == 1 and outcomes(out)[-1]["told"] == "no time left"


def test_chosen_stages_have_the_time_of_all(tmp_path: Path, ran: Ran) -> None:
    table = {
        "one": {"steps": [step("slow a", "", cap=20), step("slow b", "", cap=10)]},
        "two": {"steps": [step("slow c", "", cap=10), step("d", "", cap=5)]},
    }
    check(tmp_path, table, "--seconds", "90")
    assert seconds(ran) == {"slow a": 40, "slow b": 20, "slow c": 20, "d": 10}
    ran.clear()
    check(tmp_path, table, "--stage", "one", "--seconds", "90")
    assert seconds(ran) == {"slow a": 60, "slow b": 30}
    ran.clear()
    check(tmp_path, table, "--stage", "two", "--seconds", "90")
    assert seconds(ran) == {"slow c": 40, "d": 20}, "what takes four times its share hangs"


def test_a_command_is_interrupted_even_in_the_background(tmp_path: Path) -> None:
    code = "import time; print('begun', flush=True)\n"
    code += "try: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, out = check(tmp_path, {"one": {"steps": [step("a", code, cap=2)]}}, "--seconds", "2")
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcomes(out)[0]["told"] == "kept"


def test_what_may_fail_does_not_count(tmp_path: Path) -> None:
    steps = [step("optional", "raise SystemExit(1)", must=False), step("needed", "")]
    code, out = check(tmp_path, {"build": {"steps": steps}})
    assert code == 0
    assert outcomes(out)[0]["returncode"] == 1
    absent = {"name": "absent", "command": ["no-such-program"], "cap": 5, "must": False}
    code, out = check(tmp_path, {"build": {"steps": [absent]}})
    assert code == 0 and outcomes(out)[-1]["returncode"] == 127


def test_unknown_stages_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = check(tmp_path, {"one": {"steps": []}}, "--stage", "one,tow")
    assert code == 2
    assert "no such stage: tow; there are one" in capsys.readouterr().err


def test_rows_cut_short_are_left_out_of_the_summary(tmp_path: Path) -> None:
    rows = [
        {"kind": "run", "benchmark": "ops"},
        {"kind": "error", "lengths": "16", "state": "cold", "dtype": "float16", "error": "no"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "ops.jsonl").write_text(lines + '{"kind": "row", "op": "add_')
    text = gpu_check.summary([], tmp_path)
    assert "ERROR no" in text and "add_" not in text


def test_stages_of_a_gpu_fit_into_nine_minutes(tmp_path: Path) -> None:
    stages = gpu_check.stages(tmp_path, "somewhere")
    default = [name for name, stage in stages.items() if stage.default]
    assert default == ["build", "ops", "models", "kernels", "encode"]
    caps = [stages[name].cap for name in (gpu_check.PREPARE, *default)]
    assert sum(caps) <= gpu_check.MOST_SECONDS < 9 * 60
    files = {"log.txt", "stages.jsonl", "summary.txt"}
    words = [w for stage in stages.values() for step in stage.steps for w in step.command]
    files |= {Path(w).name for w in words if w.endswith(".jsonl")}
    assert len(files) <= ALLOWED_FILES
    assert {str(tmp_path)} == {str(Path(w).parent) for w in words if w.endswith(".jsonl")}


def test_every_stage_can_be_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: Ran
) -> None:
    scratch = tmp_path / "scratch"
    monkeypatch.setattr(gpu_check, "PATH_HOOK", scratch / "path")
    monkeypatch.setattr(gpu_check, "WIDE_MODEL", scratch / "model")
    command = ["--out", str(tmp_path / "out"), "--stage", "models", "--model", "somewhere"]
    assert gpu_check.main(command) == 0
    names = [(stage, step.name) for stage, step, _ in ran]
    assert names == [("prepare", "model in float32"), ("models", "tests")]
    assert (scratch / "path" / "sitecustomize.py").is_file()
    (scratch / "model").mkdir()
    (scratch / "model" / "model.safetensors").touch()
    assert gpu_check.main(command) == 0
    assert [stage for stage, _, _ in ran[2:]] == ["models"]


LOST_DEVICE = """
import torch

lost = False
torch.cuda.is_initialized = lambda: True

def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access\\nmore")

torch.cuda.synchronize = synchronize

def test_1_fails(): assert False
def test_2_runs(): pass
def test_3_loses_the_device():
    global lost
    lost = True
    assert False
def test_4_does_not_run(): print("it ran")
"""


def test_nothing_runs_on_a_device_that_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "test_lost.py"
    file.write_text(LOST_DEVICE)
    done = subprocess.run(
        gpu_check._pytest([str(file)], "-rA", "--rootdir", str(tmp_path)),
        env=os.environ | {"PYTHONPATH": str(gpu_check.BENCHMARKS)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "the device is lost to this process: an illegal memory access\n" in done.stdout
    assert "2 failed, 1 passed" in done.stdout
    assert "the device is lost: an illegal memory access" in done.stdout


def test_kernels_that_never_ran_come_last(tmp_path: Path) -> None:
    """They may lose the device to all that shares a process with them."""
    steps = gpu_check.stages(tmp_path, None)["ops"].steps
    files = [[Path(w).stem for w in s.command if w.endswith(".py")] for s in steps]
    kinds = [{f.split("_")[1] for f in group} for group in files]
    assert kinds[0] == {"triton"} and {"cuda"} in kinds and all(files)
    of_ops, _ = gpu_check._gpu_tests()
    assert sorted(f for group in files for f in group) == sorted(Path(p).stem for p in of_ops)


@pytest.mark.parametrize(
    ("files", "steps"),
    [
        ([], {}),
        (["test_gpu_ops"], {"all": ["test_gpu_ops"]}),
        (
            ["test_cuda_attention_more", "test_cuda_rows", "test_new", "test_triton_pool"],
            {
                "Triton": ["test_triton_pool"],
                "CUDA, rows and pooling": ["test_cuda_rows"],
                "CUDA, attention": ["test_cuda_attention_more"],
                "all": ["test_new"],
            },
        ),
    ],
    ids=len,
)
def test_every_file_is_in_one_step_and_none_is_empty(
    files: list[str], steps: dict[str, list[str]]
) -> None:
    made = gpu_check._op_steps([f"tests/{name}.py" for name in files])
    found = {s.name: [Path(w).stem for w in s.command if w.endswith(".py")] for s in made}
    assert found == steps


@pytest.mark.parametrize(("cpus", "workers"), [(1, "1"), (2, "1"), (8, "6"), (16, "12")])
def test_op_tests_share_the_processors(
    cpus: int, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: name)
    (made,) = gpu_check._op_steps(["tests/test_triton_pool.py"])
    assert made.command[made.command.index("-n") + 1] == workers
    assert made.sets["OMP_NUM_THREADS"] == "1"


def test_benchmarks_have_the_environment_of_users(tmp_path: Path) -> None:
    """But for tests in torch's deterministic mode, which needs one of cuBLAS's settings."""
    stages = gpu_check.stages(tmp_path, None)
    sets = {name: [step.sets for step in stage.steps] for name, stage in stages.items()}
    assert all("CUBLAS_WORKSPACE_CONFIG" in each for each in sets.pop("ops"))
    assert not any(each for steps in sets.values() for each in steps)
    assert gpu_check.environment().get("CUBLAS_WORKSPACE_CONFIG") == os.environ.get(
        "CUBLAS_WORKSPACE_CONFIG"
    )


def test_a_step_sets_its_environment(tmp_path: Path) -> None:
    one = step("a", "import os; print(os.environ['OMP_NUM_THREADS'])") | {
        "sets": {"OMP_NUM_THREADS": "7"}
    }
    _, out = check(tmp_path, {"one": {"steps": [one]}})
    assert outcomes(out)[0]["told"] == "7"


def test_every_model_has_its_share(tmp_path: Path) -> None:
    """Both scopes of MiniLM in steps of their own: one cut short keeps what it has."""
    commands = [step.command for step in gpu_check.stages(tmp_path, None)["encode"].steps]
    chosen = [(c[c.index("--model") + 1], c[c.index("--scope") + 1]) for c in commands]
    minilm = str(gpu_check.WIDE_MODEL)
    models = [(minilm, "s3"), (minilm, "s1"), ("random-base", "s3"), ("random-large", "s3")]
    assert chosen == models


def test_tests_for_a_gpu_are_found() -> None:
    of_ops, of_models = gpu_check._gpu_tests()
    assert {"test_triton_norms.py", "test_triton_pool.py"} <= {Path(p).name for p in of_ops}
    assert [Path(p).name for p in of_models] == ["test_gpu_engine.py"]


def test_the_source_tree_can_be_imported_without_installing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "PATH_HOOK", tmp_path / "path")
    gpu_check.write_path_hook()
    # -S leaves out what is installed.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sitecustomize;"
        "from importlib.util import find_spec;"
        "print(find_spec('sbert_fast').origin);"
        "print(sys.meta_path[0].find_spec('sbert_fast.kernels').origin);"
        "print(find_spec('kernels'))"
    )
    command = [sys.executable, "-P", "-S", "-c", code, str(tmp_path / "path")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    package, kernels = ROOT / "sbert_fast", ROOT / "kernels" / "triton"
    expected = [str(package / "__init__.py"), str(kernels / "__init__.py"), "None"]
    assert done.stdout.split() == expected


def test_every_command_gets_the_model_and_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "WIDE_MODEL", tmp_path)
    monkeypatch.delenv("SBERT_FAST_TEST_MODEL", raising=False)
    assert "SBERT_FAST_TEST_MODEL" not in gpu_check.environment()
    (tmp_path / "model.safetensors").touch()
    made = gpu_check.environment()
    assert made["SBERT_FAST_TEST_MODEL"] == str(tmp_path)
    assert made["PYTHONPATH"].split(os.pathsep)[0] == str(gpu_check.PATH_HOOK)


def test_failures_are_printed_at_once(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert 1 == 2\n")
    command = [sys.executable, "-m", "pytest", "-p", "fail_at_once", "--noconftest", "--tb=no"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        cwd=tmp_path,
    )
    assert "FAILED test_it.py::test_it (call)\n" in done.stdout


def test_some_rows_of_the_op_benchmarks_can_be_chosen(tmp_path: Path) -> None:
    kernels = gpu_check.stages(tmp_path, None)["kernels"]
    chosen = gpu_check.chosen_kernels(kernels, "attention and fp16")
    (only,) = chosen.steps
    assert only.command[only.command.index("-k") + 1] == "attention and fp16"
    assert str(tmp_path / "ops.jsonl") in only.command
    assert only.cap == chosen.cap == kernels.cap
