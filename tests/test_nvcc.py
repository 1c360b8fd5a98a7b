"""How the CUDA library is built: which nvcc, for which GPUs, and what is said without one."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import native_build as native  # noqa: E402
import nvcc  # noqa: E402

ALL = "80 86 87 89 90 100 103 110 120 121"
VARIABLES = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "NVCC_THREADS", "CXX")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc, "DEFAULT_ROOT", tmp_path / "default")
    # Before the nvcc that this machine may have.
    monkeypatch.setenv("PATH", f"{nvcc.DEFAULT_ROOT / 'bin'}:/usr/bin:/bin")


def make_nvcc(root: Path, version: str = "13.0", archs: str = ALL, compiles: bool = True) -> Path:
    """A program that answers as nvcc does; it fails to compile where told so."""
    path = root / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    listed = "\\n".join(f"compute_{arch}" for arch in archs.split())
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.88';;\n"
        f"--list-gpu-arch) printf '{listed}\\n';;\n"
        f"*) echo 'unsupported GNU version' >&2; exit {0 if compiles else 1};;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return path


def found(root: Path, **arguments: object) -> nvcc.Nvcc:
    make_nvcc(root, **arguments)
    return nvcc.find_nvcc(["g++"])


class TestTargets:
    """TORCH_CUDA_ARCH_LIST and what it becomes."""

    @pytest.mark.parametrize(
        ("text", "targets"),
        [
            ("8.0", ("8.0",)),
            ("8.0;8.6", ("8.0", "8.6")),
            ("8.6 8.0", ("8.0", "8.6")),
            ("8.0;9.0a+PTX", ("8.0", "9.0+PTX", "9.0a")),
            ("9.0", ("9.0a",)),
            ("12.0+PTX;8.0", ("8.0", "12.0+PTX")),
            ("7.0;7.5;8.0+PTX;", ("8.0+PTX",)),
            ("Hopper", ("9.0+PTX", "9.0a")),
            ("Ampere Ada", ("8.0", "8.6+PTX", "8.9+PTX")),
            ("10.0f", ("10.0f",)),
        ],
    )
    def test_syntax(self, text: str, targets: tuple[str, ...]) -> None:
        assert nvcc.parse_targets(text) == targets

    @pytest.mark.parametrize("text", ["8", "sm_80", "9.0b", "Hoper", "8.0+ptx"])
    def test_what_is_no_target(self, text: str) -> None:
        with pytest.raises(nvcc.Unavailable, match=f"one of Ampere.*got '{re.escape(text)}'"):
            nvcc.parse_targets(f"8.0;{text}")

    def test_too_old(self) -> None:
        with pytest.raises(nvcc.Unavailable, match=r"must name 8\.0 or later, got '7\.0;7\.5'"):
            nvcc.parse_targets("7.0;7.5")

    def test_default(self, tmp_path: Path) -> None:
        assert found(nvcc.DEFAULT_ROOT).targets == nvcc.DEFAULT_TARGETS

    def test_an_older_nvcc_leaves_out_what_it_does_not_know(self) -> None:
        old = found(nvcc.DEFAULT_ROOT, version="12.4", archs="80 86 89 90")
        assert old.targets == ("8.0", "8.6", "8.9", "9.0a", "9.0+PTX")

    def test_what_was_asked_for_is_not_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;10.0;12.0")
        with pytest.raises(nvcc.Unavailable, match=r"12\.4 does not compile for 10\.0, 12\.0 of"):
            found(nvcc.DEFAULT_ROOT, version="12.4", archs="80 86 89 90")

    def test_flags(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX;12.0+PTX")
        compiler = found(nvcc.DEFAULT_ROOT)
        codes = ["80,code=sm_80", "90,code=compute_90", "90a,code=sm_90a", "120,code=sm_120"]
        codes.append("120,code=compute_120")
        assert compiler.code_flags(Path("a.cu")) == [f"-gencode=arch=compute_{c}" for c in codes]
        only = ["-gencode=arch=compute_90a,code=sm_90a"]
        assert compiler.code_flags(Path("a_sm90.cu")) == only


class TestSearch:
    """Which nvcc is used, and why it may not be."""

    def test_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", f"{tmp_path / 'path' / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
        for name in ("default", "path", "cuda", "home"):
            path = make_nvcc(tmp_path / name)
            assert nvcc.find_nvcc(["g++"]).path == path

    def test_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(nvcc.Unavailable, match="there is no nvcc in CUDA_HOME/bin, on the"):
            nvcc.find_nvcc(["g++"])

    def test_too_old(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(nvcc.Unavailable, match=r"nvcc must be 12\.0 or later, got 11\.8 at"):
            found(tmp_path, version="11.8")

    def test_compiler_that_nvcc_refuses(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        message = r"must compile C\+\+20 with g\+\+, got unsupported GNU version"
        with pytest.raises(nvcc.Unavailable, match=message):
            found(tmp_path, compiles=False)

    def test_cache_in_front_of_the_compiler(self) -> None:
        assert nvcc.host_compiler(["ccache", "/usr/bin/g++-12"]) == "/usr/bin/g++-12"
        assert nvcc.host_compiler(["clang++", "-flag"]) == "clang++"

    @pytest.mark.parametrize(("cuda", "fits"), [("", True), ("13.1", True), ("12.8", False)])
    def test_cuda_of_torch(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str, fits: bool
    ) -> None:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        make_nvcc(tmp_path)
        torch = native.Torch(Path("/torch"), "2.13.0", cuda)
        if fits:
            assert native.find_nvcc(["g++"], torch).version == "13.0"
            return
        with pytest.raises(native.Unavailable, match=r"torch's CUDA, 12\.8, got 13\.0 at"):
            native.find_nvcc(["g++"], torch)


class TestNinja:
    """The build file."""

    @pytest.fixture
    def tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        folder = tmp_path / "csrc" / "cuda"
        folder.mkdir(parents=True)
        for name in ("ops.cpp", "attention.cu", "attention_sm90.cu"):
            (folder / name).touch()
        monkeypatch.setattr(native, "ROOT", tmp_path)
        return native

    def text(self, tree: ModuleType, targets: tuple[str, ...]) -> str:
        torch = tree.Torch(Path("/torch"), "2.13.0")
        compiler = nvcc.Nvcc(Path("/cuda/bin/nvcc"), "13.0", targets)
        toolchain = tree.Toolchain(["ccache", "g++"], torch, compiler)
        return tree.ninja_file({tree.CUDA: toolchain}, Path("build"))

    def edges(self, text: str) -> dict[str, list[str]]:
        pattern = r"build build/(\S+): (\w+) .*\n  flags = (.*)\n  program = (.*)"
        return {
            name: (rule, flags, program) for name, rule, flags, program in re.findall(pattern, text)
        }

    def test_who_compiles_what(self, tree: ModuleType) -> None:
        edges = self.edges(self.text(tree, ("8.0", "9.0a")))
        rule, flags, program = edges["_C_cuda/ops.o"]
        assert (rule, program) == ("compile", "ccache g++")
        assert "-DUSE_CUDA" in flags and "-DSBF_WITH_SM90=1" in flags and "-gencode" not in flags
        rule, flags, program = edges["_C_cuda/attention.cu.o"]
        assert (rule, program) == ("compile_cuda", "/cuda/bin/nvcc")
        assert "-ccbin=g++" in flags and "-DSBF_WITH_SM90=1" in flags
        assert flags.count("-gencode") == 2
        assert edges["_C_cuda/attention_sm90.cu.o"][1].count("-gencode") == 1
        rule, flags, program = edges["_C_cuda.abi3.so"]
        assert (rule, program) == ("link", "/cuda/bin/nvcc")
        assert "-cudart=static" in flags and "-z,defs" not in flags

    def test_hopper_is_left_out_where_it_is_no_target(self, tree: ModuleType) -> None:
        text = self.text(tree, ("8.0", "12.0+PTX"))
        assert "attention_sm90" not in text and "SBF_WITH_SM90" not in text

    def test_numbers_are_not_approximated(self, tree: ModuleType) -> None:
        assert "fast_math" not in self.text(tree, nvcc.DEFAULT_TARGETS)

    def test_threads(self, tree: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NVCC_THREADS", "7")
        assert "--threads=7" in self.text(tree, ("8.0",))

    def test_no_sources(self, tree: ModuleType, tmp_path: Path) -> None:
        for path in tmp_path.glob("csrc/cuda/*.cu"):
            path.unlink()
        with pytest.raises(native.Unavailable, match="this version has no CUDA sources"):
            native.find_toolchain(native.CUDA)
