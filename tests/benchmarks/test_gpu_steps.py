"""The stages of the check on a GPU, and what each of their commands gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.common import tree
from tools.gpu import build, sanitize
from tools.gpu import check as gpu_check
from tools.gpu.check import Step

ALLOWED_FILES = 6


def step(name: str, code: str, cap: float = 30, must: bool = True, **sets: str) -> Step:
    return Step(name, [sys.executable, "-c", code], cap, must, sets)


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
