"""What is built, what is packed, and how a build that cannot be complete says so."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import sbert_fast
from sbert_fast import _build_info

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(sbert_fast.__file__).parent
PACKED = ("csrc", "kernels", "sbert_fast", "tests", "examples", "requirements")
BUILD_SOURCES = ("setup.py", "csrc/driver.py", "csrc/native_build.py", "csrc/nvcc.py")
MOST_BYTES = 30 << 20
PACKED_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module; its `setup()` call is guarded."""
    spec = importlib.util.spec_from_file_location("sbert_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def native(build: ModuleType) -> ModuleType:
    """csrc/native_build.py as a module."""
    return sys.modules["native_build"]


def _run(*command: str | Path, **kwargs: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _library(name: str) -> Path:
    if name not in _build_info.BUILT:
        pytest.skip(f"{name} is not built: {_build_info.SKIPPED[name]}")
    return next(PACKAGE.glob(f"{name}.*so"))


ops_libraries = pytest.mark.parametrize("name", ["_C", "_C_cuda"])


class TestInstalled:
    """The package these tests import."""

    def test_metadata(self) -> None:
        assert metadata.version("sbert-fast") == sbert_fast.__version__
        (script,) = metadata.entry_points(group="console_scripts", name="sbert-fast")
        assert callable(script.load())
        assert (PACKAGE / "py.typed").is_file()

    def test_build_record_tells_the_truth(self) -> None:
        present = {path.name.partition(".")[0] for path in PACKAGE.glob("_*.*so")}
        assert present == set(_build_info.BUILT)
        assert present.isdisjoint(_build_info.SKIPPED)
        assert all(_build_info.SKIPPED.values())
        assert ("_C_cuda" in present) == bool(_build_info.CUDA) == bool(_build_info.CUDA_TARGETS)
        for path in PACKAGE.glob("_C_cuda.*so"):
            stamp = " ".join((_build_info.CUDA, *_build_info.CUDA_TARGETS))
            assert stamp.encode() in path.read_bytes()

    def test_kernels_do_not_shadow_hugging_face(self, tmp_path: Path) -> None:
        assert not (ROOT / "kernels/__init__.py").exists()
        code = (
            "import importlib.util as u, sbert_fast.kernels as k; s = u.find_spec('kernels'); "
            "print(k.__file__); print(s.origin if s else '')"
        )
        ours, theirs = _run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
        assert ours.endswith("__init__.py")
        assert not theirs.startswith(str(ROOT))

    @ops_libraries
    def test_ops_library_uses_only_the_stable_abi(self, name: str) -> None:
        listing = _run("nm", "-D", "--undefined-only", _library(name))
        needed = [line.split()[1] for line in listing.splitlines() if line.split()[0] == "U"]
        ours = [symbol for symbol in needed if "@" not in symbol]  # the rest is the system's
        assert any(symbol.startswith("aoti_torch_") for symbol in ours)
        assert [symbol for symbol in ours if not re.match(r"(aoti_)?torch_\w+$", symbol)] == []

    @ops_libraries
    def test_ops_library_names_no_folder_of_the_build_machine(self, name: str) -> None:
        dynamic = _run("readelf", "-d", _library(name))
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
        torch_libraries = {
            "_C": {"libtorch_cpu.so"},
            "_C_cuda": {"libtorch_cpu.so", "libtorch_cuda.so"},
        }
        assert set(re.findall(r"\[(libtorch\S*|libc10\S*)\]", dynamic)) == torch_libraries[name]

    def test_cuda_library_keeps_its_runtime_to_itself(self) -> None:
        assert "libcudart" not in _run("readelf", "-d", _library("_C_cuda"))
        listing = _run("nm", "-D", _library("_C_cuda"))
        assert re.findall(r"\bcuda[A-Z]\w+|\bcu[A-Z]\w+", listing) == []

    def test_libraries_are_small_enough_to_ship(self) -> None:
        size = sum(path.stat().st_size for path in PACKAGE.glob("_*.*so"))
        assert size <= MOST_BYTES

    def test_host_module_needs_no_torch(self) -> None:
        assert "torch" not in _run("readelf", "-d", _library("_host"))


class TestSources:
    """Rules of the build's own sources."""

    @pytest.mark.parametrize("path", BUILD_SOURCES)
    def test_build_never_imports_torch(self, path: str) -> None:
        tree = ast.parse((ROOT / path).read_text())
        names = [
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        ]
        assert [name for name in names if name and name.split(".")[0] == "torch"] == []

    def test_host_has_no_torch_headers(self) -> None:
        for path in (ROOT / "csrc/host").iterdir():
            assert not re.search(r'#include ["<](torch|ATen|c10)/', path.read_text()), path


class TestPlan:
    """SBERT_FAST_BUILD: what is built where something is missing."""

    @pytest.fixture
    def no_torch(self, native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "_import_path", lambda python: [])
        monkeypatch.setattr(sys, "path", [str(Path(os.__file__).parent)])

    def test_none_builds_nothing(self, build: ModuleType) -> None:
        plan = build.make_plan("none")
        assert plan.toolchains == {}
        assert set(plan.skipped.values()) == {"SBERT_FAST_BUILD=none"}

    def test_unknown_mode(self, build: ModuleType) -> None:
        expected = "SBERT_FAST_BUILD must be one of none, cpu, cuda, auto, got 'gpu'"
        with pytest.raises(SystemExit, match=expected):
            build.make_plan("gpu")

    def test_cpu_leaves_the_cuda_ops_out(self, build: ModuleType) -> None:
        plan = build.make_plan("cpu")
        assert set(plan.libraries) == {"_host", "_C"}
        assert plan.skipped == {build.CUDA: "SBERT_FAST_BUILD=cpu"}
        assert "CUDA: str = ''\nCUDA_TARGETS: tuple[str, ...] = ()" in build.build_info(plan)

    def test_without_nvcc(
        self, build: ModuleType, native: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def find(*_: object) -> None:
            raise native.Unavailable("there is no nvcc")

        monkeypatch.setattr(native, "find_nvcc", find)
        monkeypatch.setattr(native, "has_cuda_sources", lambda: True)
        monkeypatch.setattr(build.driver, "unavailable", lambda: None)
        plan = build.make_plan("auto")
        assert plan.skipped == {build.CUDA: "there is no nvcc"}
        with pytest.raises(SystemExit, match="=cuda cannot build _C_cuda: there is no nvcc"):
            build.make_plan("cuda")

    def test_with_nvcc(
        self, build: ModuleType, native: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nvcc = native.Nvcc(Path("/cuda/bin/nvcc"), "13.0", ("8.0", "9.0a"))
        monkeypatch.setattr(native, "find_nvcc", lambda *_: nvcc)
        monkeypatch.setattr(native, "has_cuda_sources", lambda: True)
        monkeypatch.setattr(build.driver, "unavailable", lambda: None)
        for mode in ("auto", "cuda"):
            plan = build.make_plan(mode)
            assert set(plan.libraries) == {"_host", "_C", "_C_cuda"}
            record = build.build_info(plan)
            assert "CUDA: str = '13.0'" in record and "= ('8.0', '9.0a')" in record

        monkeypatch.setattr(build.driver, "unavailable", lambda: "there is no driver")
        assert set(build.make_plan("cuda").libraries) == {"_host", "_C", "_C_cuda"}
        plan = build.make_plan("auto")
        reason = "there is no driver; SBERT_FAST_BUILD=cuda builds it all the same"
        assert plan.skipped == {build.CUDA: reason}
        assert f"SKIPPED: dict[str, str] = {{'_C_cuda': {reason!r}}}" in build.build_info(plan)

    def test_no_compiler(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler -flag")
        reason = "the C++ compiler no-such-compiler is not installed"
        plan = build.make_plan("auto")
        assert plan.toolchains == {}
        assert {why for library, why in plan.skipped.items() if library is not build.CUDA} == {
            reason
        }
        with pytest.raises(SystemExit, match=re.escape(f"=cpu cannot build _host: {reason}")):
            build.make_plan("cpu")

    def test_old_compiler(self, native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "false -flag")
        with pytest.raises(native.Unavailable, match=r"false -flag must compile C\+\+20"):
            native.find_compiler()

    @pytest.mark.usefixtures("no_torch")
    def test_no_torch(self, native: ModuleType) -> None:
        with pytest.raises(native.Unavailable, match="there is no torch to compile against"):
            native.find_torch()

    @pytest.mark.usefixtures("no_torch")
    @pytest.mark.parametrize(("version", "accepted"), [("2.10.1+cpu", False), ("2.11.0", True)])
    def test_oldest_torch(
        self, native: ModuleType, tmp_path: Path, version: str, accepted: bool
    ) -> None:
        torch = tmp_path / "torch"
        header = torch / "include/torch/csrc/stable/library.h"
        header.parent.mkdir(parents=True)
        header.touch()
        (torch / "version.py").write_text(f"__version__ = '{version}'\ncuda: str = '13.0'\n")
        sys.path.append(str(tmp_path))
        if accepted:
            assert native.find_torch() == native.Torch(torch, version, "13.0")
            return
        with pytest.raises(native.Unavailable, match=r"torch must be 2\.11 or later, got 2\.10\.1"):
            native.find_torch()

    def test_torch_is_found_from_an_isolated_build(
        self, native: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = native.find_torch()
        monkeypatch.setattr(sys, "path", [str(Path(os.__file__).parent)])
        monkeypatch.setenv("PYTHONPATH", "/an/overlay/of/pip")
        monkeypatch.setenv("PYTHONNOUSERSITE", "1")
        assert native.find_torch().version == expected.version

    @pytest.mark.skipif(
        platform.machine() != "x86_64", reason="other machines have one kernel file"
    )
    def test_instruction_sets_stay_in_their_files(self, native: ModuleType) -> None:
        toolchain = native.Toolchain(["c++"], native.Torch(Path("/torch"), "2.11.0"))
        text = native.ninja_file({native.CPU: toolchain}, Path("build"))
        flags = dict(re.findall(r"build build/_C/(\w+)\.o: .*\n  flags = (.*)", text))
        wide = {name: re.findall(r"-m(\w+)", line) for name, line in flags.items()}
        assert {name for name, found in wide.items() if found} == {
            "kernels_avx2",
            "kernels_avx_vnni",
            "kernels_avx512",
            "kernels_avx512_vnni",
            "kernels_avx512_bf16",
            "kernels_amx_bf16",
        }
        assert "avx512bf16" in wide["kernels_avx512_bf16"]
        assert "avx512bf16" not in wide["kernels_avx512_vnni"]
        assert "avx512vnni" not in wide["kernels_avx512"]
        # The linker keeps the first copy of what several objects carry: the narrowest goes first.
        order = [path.stem for path in native.sources(native.CPU)]
        kernels = [name for name in order if name.startswith("kernels_")]
        assert order[-len(kernels) :] == kernels
        assert kernels == [f"kernels_{isa}" for isa in native.ISA_FLAGS]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in which earlier builds left files."""
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
    for name in PACKED:
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in PACKED_FILES:
        shutil.copy2(ROOT / name, copy / name)
    for stale in ("sbert_fast/_C.abi3.so", "sbert_fast/_build_info.py"):
        (copy / stale).write_text("stale")
    (copy / "build/lib/sbert_fast").mkdir(parents=True)
    (copy / "build/lib/sbert_fast/removed_long_ago.py").touch()
    return copy


@pytest.mark.slow
class TestPacked:
    """Wheel and source archive."""

    def test_pure_wheel(self, checkout: Path, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
        env = {**os.environ, "SBERT_FAST_BUILD": "none"}
        _run(*command, "--wheel-dir", tmp_path, ".", cwd=checkout, env=env)
        (wheel,) = tmp_path.glob("*.whl")
        assert wheel.name == f"sbert_fast-{sbert_fast.__version__}-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            record = archive.read("sbert_fast/_build_info.py").decode()
        tops = {name.split("/")[0] for name in names}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"sbert_fast"}
        sources = {
            f"sbert_fast/{path.relative_to(ROOT / 'sbert_fast')}"
            for path in (ROOT / "sbert_fast").rglob("*")
            if path.is_file() and path.suffix not in (".so", ".pyc")
        }
        expected = sources | {"sbert_fast/_build_info.py", "sbert_fast/kernels/__init__.py"}
        assert {name for name in names if name.startswith("sbert_fast/")} >= expected
        assert "sbert_fast/removed_long_ago.py" not in names
        assert [name for name in names if name.endswith((".so", ".cpp", ".h"))] == []
        assert "MODE: str = 'none'" in record

    def test_source_archive(self, checkout: Path, tmp_path: Path) -> None:
        code = "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])"
        _run(sys.executable, "-c", code, tmp_path, cwd=checkout)
        (archive,) = tmp_path.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            names = {name.partition("/")[2] for name in tar.getnames()}
        sources = {
            str(path.relative_to(ROOT))
            for folder in ("csrc", "kernels", "sbert_fast")
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".txt", ".typed")
        }
        assert sources - {"sbert_fast/_build_info.py"} <= names
        assert {"LICENSE", "README.md", "requirements/dev.txt", "tests/test_packaging.py"} <= names
        assert [name for name in names if name.endswith((".so", ".pyc", "_build_info.py"))] == []
