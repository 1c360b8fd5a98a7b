"""What the GPU check builds and sanitizes, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import build_for_gpu  # noqa: E402
import gpu_check  # noqa: E402
import sanitize  # noqa: E402


def test_the_gpu_of_the_machine_is_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_CUDA_ARCH_LIST", "SBERT_FAST_BUILD"):
        monkeypatch.delenv(name, raising=False)
    assert build_for_gpu.environment((9, 0))["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "TORCH_CUDA_ARCH_LIST" not in build_for_gpu.environment(None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build_for_gpu.environment((9, 0))["TORCH_CUDA_ARCH_LIST"] == "8.0"


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
