"""What the GPU check consists of, and its tools: build, sanitizer, lost devices, imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import ROOT
from benchmarks.common import tree
from tools.gpu import check as gpu_check
from tools.gpu import sanitize, stages

ALLOWED_FILES = 6


def test_stages_of_a_gpu_fit_into_nine_minutes(tmp_path: Path) -> None:
    table = stages.make_stages(tmp_path, "somewhere")
    default = [name for name in table if name not in stages.ONLY_WHERE_ASKED]
    assert default == ["build", "ops", "models", "kernels", "encode"]
    caps = [step.cap for name in (stages.PREPARE, *default) for step in table[name]]
    assert sum(caps) <= gpu_check.MOST_SECONDS < 9 * 60
    words = [w for steps in table.values() for step in steps for w in step.command]
    rows = {Path(w) for w in words if w.endswith(".jsonl")}
    assert {path.parent for path in rows} == {tmp_path}
    files = {"log.txt", "stages.jsonl", "summary.txt"} | {path.name for path in rows}
    assert len(files) <= ALLOWED_FILES
    # But for tests in torch's deterministic mode, commands have the environment of users.
    assert all("CUBLAS_WORKSPACE_CONFIG" in step.sets for step in table.pop("ops"))
    assert not any(step.sets for steps in table.values() for step in steps)


def test_tests_for_a_gpu_are_found(tmp_path: Path) -> None:
    of_ops, of_models = stages.gpu_tests()
    assert {"test_triton_norms.py", "test_triton_pool.py"} <= {Path(p).name for p in of_ops}
    assert [Path(p).name for p in of_models] == ["test_gpu_engine.py"]
    table = stages.make_stages(tmp_path, None)
    for name, files in (("ops", of_ops), ("models", of_models)):
        words = [w for step in table[name] for w in step.command]
        assert sorted(w for w in words if w.endswith(".py")) == files


def test_every_file_is_in_one_step_and_none_is_empty() -> None:
    """Those that are of no kind come last: they may lose the device to their whole process."""

    def made(*names: str) -> dict[str, list[str]]:
        steps = stages.op_steps([f"tests/{name}.py" for name in names])
        return {s.name: [Path(w).stem for w in s.command if w.endswith(".py")] for s in steps}

    found = made("test_cuda_attention_more", "test_cuda_rows", "test_new", "test_triton_pool")
    assert list(found.items()) == [
        ("Triton", ["test_triton_pool"]),
        ("CUDA, rows and pooling", ["test_cuda_rows"]),
        ("CUDA, attention", ["test_cuda_attention_more"]),
        ("all", ["test_new"]),
    ]
    assert made() == {}


LOST_DEVICE = """
import torch

lost = False
torch.cuda.is_initialized = lambda: True

def synchronize(device):
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
    # This test may itself run in a worker of xdist; what it starts does not.
    alone = {k: v for k, v in gpu_check.environment().items() if k != "PYTEST_XDIST_WORKER"}
    command = stages.pytest_command([str(file)], "--rootdir", str(tmp_path), "-c", os.devnull)
    done = subprocess.run(command, env=alone, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3, done.stdout + done.stderr
    told_at_once = done.stdout.index("FAILED test_lost.py::test_1_fails (call)\n")
    lost = "the device is lost to this process: an illegal memory access\n"
    assert told_at_once < done.stdout.index(lost) and "2 failed, 1 passed" in done.stdout
    assert "the device is lost: an illegal memory access" in done.stdout


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
    told = subprocess.check_output(command, env=bare, text=True, cwd=ROOT)
    folders = ("sbert_fast", "kernels/triton", "benchmarks")
    assert told.split() == [*(str(ROOT / name / "__init__.py") for name in folders), "None"]


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compute-sanitizer is looked for; what it is called with goes to the file calls."""
    compiler = sanitize.nvcc.Nvcc(tmp_path / "nvcc", "13.0", ("8.0",))
    monkeypatch.setattr(sanitize.nvcc, "find_nvcc", lambda *_: compiler)
    monkeypatch.setattr(sanitize, "plant", lambda *_: tmp_path / "planted")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path / "compute-sanitizer"


def make_tool(path: Path, planted: int, tests: int, said: str) -> None:
    path.write_text(
        f'#!/bin/sh\necho "$*" >> {path.parent}/calls\ncase "$*" in\n*planted) exit {planted};;\n'
        f'*) echo "in all {said}"; exit {tests};;\nesac\n'
    )
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("planted", "tests", "said", "code"),
    [
        (sanitize.FOUND, 0, "3 passed", 0),
        (sanitize.FOUND, sanitize.FOUND, "3 passed", 1),
        (0, 0, "3 passed", 2),
        # Skipped tests show nothing.
        (sanitize.FOUND, 0, "3 passed, 1 skipped", 2),
        (sanitize.FOUND, 0, "", 2),
    ],
)
def test_the_verdict_of_a_sanitizer(
    sanitizer: Path, planted: int, tests: int, said: str, code: int
) -> None:
    make_tool(sanitizer, planted, tests, said)
    assert sanitize.main("memcheck") == code


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_the_planted_mistake_is_no_kernel_of_ours(sanitizer: Path, tool: str) -> None:
    """So it must not be looked for among those."""
    assert f"void {sanitize.PLANTED[tool]}(" in sanitize._PROGRAM
    make_tool(sanitizer, sanitize.FOUND, 0, "3 passed")
    assert sanitize.main(tool) == 0
    planted, tests = (sanitizer.parent / "calls").read_text().splitlines()
    assert "--kernel-name" not in planted
    # What initcheck has not seen written, it takes for unwritten.
    assert ("--kernel-name kernel_substring=sbert_fast" in tests) == (tool != "initcheck")


@pytest.mark.usefixtures("sanitizer")
def test_what_a_sanitizer_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanitize.main("racecheck") == 2
    assert "racecheck: not run: there is no compute-sanitizer" in capsys.readouterr().out
    missing = mock.Mock(side_effect=sanitize.nvcc.Unavailable("there is no nvcc"))
    monkeypatch.setattr(sanitize.nvcc, "find_nvcc", missing)
    assert sanitize.main("memcheck") == 2
