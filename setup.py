"""Packages sbert_fast and its native libraries, each of which may be missing: the package then runs
on its Python code.

* ``sbert_fast/_host.<python>.so``: a pybind11 module from ``csrc/host``, without torch headers.
* ``sbert_fast/_C.abi3.so``: torch ops from ``csrc/cpu`` on LibTorch's stable ABI. It is not a
  Python module: ``sbert_fast/ops/extension.py`` finds it as ``_C.*so`` in the package's folder and
  loads it with ``torch.ops.load_library``. One file serves every Python and every torch >= 2.11.
* ``sbert_fast/_C_cuda.abi3.so``: the CUDA ops, from ``csrc/cuda``, in the same way. It is compiled
  beside any torch, and loaded beside one of the same major version of CUDA.

Environment:
    SBERT_FAST_BUILD: ``auto`` (default) builds what this machine can build and run, and records why
        the rest is missing: the CUDA ops want an NVIDIA driver that answers; ``cpu`` builds all but
        the CUDA ops or fails; ``cuda`` builds all or fails; ``none`` builds nothing native.
    CXX: the C++20 compiler, by default g++, else clang++.
    MAX_JOBS: compilations at a time, by default ninja's choice.
    CUDA_HOME, CUDA_PATH: the CUDA toolkit, by default that of the nvcc on the PATH, else
        /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST: what the CUDA ops are compiled for, as torch has it ("8.0;9.0a+PTX").
    NVCC_THREADS: targets that one nvcc compiles at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import driver  # noqa: E402
from native_build import (  # noqa: E402
    CUDA,
    LIBRARIES,
    Library,
    Toolchain,
    Unavailable,
    compile_libraries,
    find_toolchain,
    sources,
)

MODES = ("none", "cpu", "cuda", "auto")
MIN_SETUPTOOLS = 77  # as in pyproject.toml, which an older one cannot read


@dataclass
class Plan:
    """What this build makes, with what, and why it leaves the rest out."""

    mode: str
    toolchains: dict[Library, Toolchain] = field(default_factory=dict)
    skipped: dict[Library, str] = field(default_factory=dict)

    @property
    def libraries(self) -> dict[str, Library]:
        """The libraries to build, by name."""
        return {library.name: library for library in self.toolchains}


def make_plan(mode: str) -> Plan:
    """Decide what to build.

    Raises:
        SystemExit: the mode is unknown, or it asks for what cannot be built here.
    """
    if mode not in MODES:
        raise SystemExit(f"SBERT_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    plan = Plan(mode)
    for library in LIBRARIES:
        if mode == "none" or (mode == "cpu" and library is CUDA):
            plan.skipped[library] = f"SBERT_FAST_BUILD={mode}"
            continue
        if mode == "auto" and library is CUDA and (why := driver.unavailable()) is not None:
            plan.skipped[library] = f"{why}; SBERT_FAST_BUILD=cuda builds it all the same"
            continue
        try:
            plan.toolchains[library] = find_toolchain(library)
        except Unavailable as reason:
            if mode in ("cpu", "cuda"):
                message = f"SBERT_FAST_BUILD={mode} cannot build {library.name}: {reason}"
                raise SystemExit(message) from reason
            plan.skipped[library] = str(reason)
    return plan


def build_info(plan: Plan) -> str:
    """The text of sbert_fast/_build_info.py, which `sbert-fast doctor` reads."""
    compiler, torch, cuda, targets = "", "", "", ()
    for toolchain in plan.toolchains.values():
        command = [*toolchain.compiler, "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        compiler = done.stdout.partition("\n")[0]
        torch = toolchain.torch.version if toolchain.torch else torch
        if toolchain.nvcc:
            cuda, targets = toolchain.nvcc.version, toolchain.nvcc.targets
    skipped = {library.name: reason for library, reason in plan.skipped.items()}
    return f'''"""Written by setup.py: what was built, with what, and why the rest was not."""

MODE: str = {plan.mode!r}
BUILT: tuple[str, ...] = {tuple(plan.libraries)!r}
SKIPPED: dict[str, str] = {skipped!r}
COMPILER: str = {compiler!r}
TORCH: str = {torch!r}
CUDA: str = {cuda!r}
CUDA_TARGETS: tuple[str, ...] = {targets!r}
'''


def write_build_info(package: Path) -> None:
    """Put the record into a folder of the package."""
    package.mkdir(parents=True, exist_ok=True)
    package.joinpath("_build_info.py").write_text(build_info(plan))


class BuildPython(build_py):
    """Adds the build record; leaves no file of an earlier build."""

    def run(self) -> None:
        if self.editable_mode:
            package = ROOT / "sbert_fast"
            kept = {library.filename for library in plan.toolchains}
            for path in (*package.glob("_C*.*so"), *package.glob("_host.*so")):
                if path.name not in kept:
                    path.unlink()
        else:
            package = Path(self.build_lib, "sbert_fast")
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        write_build_info(package)


class BuildLibraries(build_ext):
    """Compiles everything in one parallel run, then copies it to where setuptools expects it."""

    def get_ext_filename(self, fullname: str) -> str:
        *packages, name = fullname.split(".")
        return str(Path(*packages, plan.libraries[name].filename))

    def run(self) -> None:
        super().run()
        if self.inplace:
            write_build_info(ROOT / "sbert_fast")

    def build_extensions(self) -> None:
        folder = ROOT / compile_libraries(plan.toolchains)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A process that has the old library mapped must keep it: no writing in place.
            fresh = target.with_name(f".{target.name}.new")
            shutil.copy2(folder / target.name, fresh)
            os.replace(fresh, target)


if __name__ == "__main__":
    if int(setuptools.__version__.partition(".")[0]) < MIN_SETUPTOOLS:
        raise SystemExit(
            f"setuptools must be {MIN_SETUPTOOLS} or later, got {setuptools.__version__}: "
            "upgrade it, or install without --no-build-isolation"
        )
    plan = make_plan(os.environ.get("SBERT_FAST_BUILD", "auto"))
    distribution = setup(
        packages=[*find_packages(include=["sbert_fast", "sbert_fast.*"]), "sbert_fast.kernels"],
        package_dir={"sbert_fast.kernels": "kernels/triton"},
        ext_modules=[
            Extension(f"sbert_fast.{library.name}", [str(path) for path in sources(library)])
            for library in plan.toolchains
        ],
        cmdclass={"build_py": BuildPython, "build_ext": BuildLibraries},
    )
    if distribution.have_run.get("build_py") or distribution.have_run.get("build_ext"):
        for library, reason in plan.skipped.items():
            print(f"sbert_fast: {library.name} was not built: {reason}", file=sys.stderr)
