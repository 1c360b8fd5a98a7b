"""Tools for a GPU without one: what is checked, built and sanitized; caps, files, exit codes."""

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

from benchmarks import ROOT
from benchmarks.common import tree
from tools.gpu import build, sanitize
from tools.gpu import check as gpu_check
from tools.gpu.check import Stage, Step

ALLOWED_FILES = 6


def step(name: str, code: str, cap: float = 30, must: bool = True, **sets: str) -> Step:
    return Step(name, [sys.executable, "-c", code], cap, must, sets)


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "PATH_HOOK", tmp_path / "path")


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs stages; the exit code, and the folder of the results."""

    def run(table: dict[str, list[Step]], *arguments: str) -> tuple[int, Path]:
        made = {name: Stage(steps, name != "not asked for") for name, steps in table.items()}
        monkeypatch.setattr(gpu_check, "stages", lambda out, model: made)
        return gpu_check.main(["--out", str(tmp_path / "out"), *arguments]), tmp_path / "out"

    return run


def outcomes(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


def test_a_failed_stage_does_not_stop_the_next(
    check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = step("b", "print('FAILED tests/x.py::y'); print('1 failed'); raise SystemExit(3)")
    stages = {"one": [step("a", "print('fine')"), failing], "not asked for": [step("d", "")]}
    code, out = check(stages | {"two": [step("c", "print('also fine')")]})
    assert code == 1
    states = [(o["stage"], o["step"], o["returncode"]) for o in outcomes(out)]
    assert states == [("one", "a", 0), ("one", "b", 3), ("two", "c", 0)]
    log = (out / "log.txt").read_text()
    assert log.index("fine") < log.index("1 failed") < log.index("also fine")
    printed = capsys.readouterr().out
    assert "FAILED (3)" in printed and "FAILED tests/x.py::y" in printed
    assert printed.rstrip().endswith((out / "summary.txt").read_text().rstrip())
    assert check(stages, "--stage", "one,tow")[0] == 2
    assert "no such stage: tow; there are one, not asked for" in capsys.readouterr().err


def test_a_step_is_cut_short_with_all_it_started(check: Any) -> None:
    nested = "import subprocess, sys, time; print('begun', flush=True); "
    nested += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    code, out = check({"slow": [step("sleep", nested, 2)], "next": [step("runs", "print('ran')")]})
    assert code == 1
    assert time.monotonic() - start < 50
    slow, after = outcomes(out)
    assert slow["timed_out"] and after["returncode"] == 0
    assert "begun" in (out / "log.txt").read_text()
    assert "cut short" in (out / "summary.txt").read_text()


Ran = list[tuple[str, Step, float]]


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


def test_what_may_fail_does_not_count(check: Any) -> None:
    steps = [step("optional", "raise SystemExit(1)", must=False), step("needed", "")]
    code, out = check({"build": [*steps, Step("absent", ["no-such-program"], 5, must=False)]})
    assert code == 0 and [o["returncode"] for o in outcomes(out)] == [1, 0, 127]


def test_a_step_sets_its_environment(check: Any) -> None:
    told = "import os; print(os.environ['OMP_NUM_THREADS'])"
    _, out = check({"one": [step("a", told, OMP_NUM_THREADS="7")]})
    assert outcomes(out)[0]["told"] == "7"


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
    monkeypatch.setattr(gpu_check, "WIDE_MODEL", scratch / "model")
    command = ["--out", str(tmp_path / "out"), "--stage", "models", "--model", "somewhere"]
    assert gpu_check.main(command) == 0
    names = [(stage, step.name) for stage, step, _ in ran]
    assert names == [("prepare", "model in float32"), ("models", "tests")]
    assert (tmp_path / "path" / "sitecustomize.py").is_file()
    (scratch / "model").mkdir(parents=True)
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
    tree.write_path_hook()
    file = tmp_path / "test_lost.py"
    file.write_text(LOST_DEVICE)
    done = subprocess.run(
        gpu_check._pytest([str(file)], "-rA", "--rootdir", str(tmp_path), "-c", os.devnull),
        env=gpu_check.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    told_at_once = done.stdout.index("FAILED test_lost.py::test_1_fails (call)\n")
    assert told_at_once < done.stdout.index("the device is lost to this process")
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


def test_the_source_tree_can_be_imported_without_installing(tmp_path: Path) -> None:
    tree.write_path_hook()
    # -S leaves out what is installed.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sitecustomize;"
        "from importlib.util import find_spec;"
        "print(find_spec('sbert_fast').origin);"
        "print(sys.meta_path[0].find_spec('sbert_fast.kernels').origin);"
        "print(find_spec('benchmarks').origin, find_spec('kernels'))"
    )
    command = [sys.executable, "-P", "-S", "-c", code, str(tmp_path / "path")]
    bare = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    package, kernels = ROOT / "sbert_fast", ROOT / "kernels" / "triton"
    folders = (package, kernels, ROOT / "benchmarks")
    expected = [*(str(folder / "__init__.py") for folder in folders), "None"]
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
    assert made["PYTHONPATH"].split(os.pathsep)[0] == str(tree.PATH_HOOK)


def test_some_rows_of_the_op_benchmarks_can_be_chosen(tmp_path: Path, ran: Ran) -> None:
    chosen = ("--stage", "kernels", "--kernels", "attention and fp16")
    assert gpu_check.main(["--out", str(tmp_path / "out"), *chosen]) == 0
    *_, (stage, only, _) = ran
    assert stage == "kernels" and [name for name, *_ in ran].count("kernels") == 1
    assert only.command[only.command.index("-k") + 1] == "attention and fp16"
    assert str(tmp_path / "out" / "ops.jsonl") in only.command


def test_the_gpu_of_the_machine_is_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_CUDA_ARCH_LIST", "SBERT_FAST_BUILD"):
        monkeypatch.delenv(name, raising=False)
    assert build.environment((9, 0))["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "TORCH_CUDA_ARCH_LIST" not in build.environment(None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build.environment((9, 0))["TORCH_CUDA_ARCH_LIST"] == "8.0"


def test_every_tool_has_a_step_and_a_planted_mistake(tmp_path: Path) -> None:
    stage = gpu_check.stages(tmp_path, None)["sanitize"]
    assert not stage.default
    assert [step.command[-1] for step in stage.steps] == list(sanitize.TOOLS)
    assert set(sanitize.PLANTED) == set(sanitize.TOOLS)
    assert all(f"void {kernel}(" in sanitize._PROGRAM for kernel in sanitize.PLANTED.values())


class TestSanitize:
    """Its verdicts, with a tool made for the test."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        compiler = sanitize.nvcc.Nvcc(tmp_path / "nvcc", "13.0", ("8.0",))
        monkeypatch.setattr(sanitize.nvcc, "find_nvcc", lambda *_: compiler)
        monkeypatch.setattr(sanitize, "plant", lambda *_: tmp_path / "planted")
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        return tmp_path

    def make_tool(self, folder: Path, planted: int, tests: int, said: str = "3 passed") -> None:
        tool = folder / "compute-sanitizer"
        tool.write_text(
            f'#!/bin/sh\necho "$*" >> {folder}/calls\ncase "$*" in\n*planted) exit {planted};;\n'
            f'*) echo "in all {said}"; exit {tests};;\nesac\n'
        )
        tool.chmod(0o755)

    @pytest.mark.parametrize(
        ("planted", "tests", "code"),
        [(sanitize.FOUND, 0, 0), (sanitize.FOUND, sanitize.FOUND, 1), (0, 0, 2), (1, 0, 2)],
    )
    def test_verdict(self, folder: Path, planted: int, tests: int, code: int) -> None:
        self.make_tool(folder, planted, tests)
        assert sanitize.main("memcheck") == code

    @pytest.mark.parametrize("tool", sanitize.TOOLS)
    def test_the_planted_mistake_is_no_kernel_of_ours(self, folder: Path, tool: str) -> None:
        """So it must not be looked for among those."""
        self.make_tool(folder, sanitize.FOUND, 0)
        assert sanitize.main(tool) == 0
        planted, tests = (folder / "calls").read_text().splitlines()
        assert "--kernel-name" not in planted
        # What initcheck has not seen written, it takes for unwritten.
        assert ("--kernel-name kernel_substring=sbert_fast" in tests) == (tool != "initcheck")

    @pytest.mark.parametrize("said", ["3 skipped", "3 passed, 1 skipped", ""])
    def test_skipped_tests_show_nothing(self, folder: Path, said: str) -> None:
        self.make_tool(folder, sanitize.FOUND, 0, said)
        assert sanitize.main("memcheck") == 2

    def test_without_the_tool(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert sanitize.main("racecheck") == 2
        assert "racecheck: not run: there is no compute-sanitizer" in capsys.readouterr().out

    def test_without_nvcc(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def find(*_: object) -> None:
            raise sanitize.nvcc.Unavailable("there is no nvcc")

        monkeypatch.setattr(sanitize.nvcc, "find_nvcc", find)
        assert sanitize.main("memcheck") == 2
