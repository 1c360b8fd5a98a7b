"""Builds the native libraries of sbert_fast with ninja. Never imports torch: its headers are found
by path, so that a build needs no torch of its own.

Two libraries, each of which can be missing (the package then runs on its Python code):

* ``sbert_fast/_host.<python>.so``: a pybind11 module from ``csrc/host``, without torch headers.
* ``sbert_fast/_C.abi3.so``: torch ops from ``csrc/cpu`` on LibTorch's stable ABI. Not a Python
  module: ``sbert_fast/ops/extension.py`` finds it beside itself as ``_C.*so`` and loads it with
  ``torch.ops.load_library``. One binary serves every Python and every torch >= 2.11.

Environment:
    SBERT_FAST_BUILD: ``auto`` (default) builds what this machine can and reports the rest; ``cpu``
        builds both libraries or fails; ``cuda`` builds the CUDA ops too or fails; ``none`` builds
        nothing native.
    CXX: the C++20 compiler. MAX_JOBS: parallel compilations (default: ninja's choice).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("none", "cpu", "cuda", "auto")
MIN_TORCH = (2, 11)
TORCH_ABI = "0x020a000000000000"  # the 2.10 stable ABI, the first with parallel_for

HOST, CPU, CUDA = "_host", "_C", "_C_cuda"
FILENAMES = {HOST: HOST + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"), CPU: "_C.abi3.so"}
SOURCES = {HOST: "csrc/host", CPU: "csrc/cpu"}

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
COMPILE_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


class Unavailable(Exception):
    """A library that cannot be built here; the message says what is missing."""


@dataclass(frozen=True)
class Torch:
    """A torch installation, seen from outside."""

    root: Path
    version: str


@dataclass
class Plan:
    """What this build makes, with what, and why it leaves the rest out."""

    mode: str
    compiler: list[str] = field(default_factory=list)
    torch: Torch | None = None
    libraries: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def _installed_paths(python: Path) -> list[str]:
    """The import path of an interpreter as it is outside of this build's isolation."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [str(python), "-P", "-c", "import sys; print(*sys.path, sep='\\n')"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def find_torch() -> Torch:
    """Find the torch of the environment that is being installed into.

    An isolated build has its own import path (pip) or its own interpreter (build, uv), without
    torch in it. So the real import path of this interpreter is searched as well, then that of the
    active virtual or conda environment.
    """
    pythons = [Path(sys.executable)]
    pythons += [Path(p, "bin/python") for n in ("VIRTUAL_ENV", "CONDA_PREFIX") if (p := os.getenv(n))]
    searched = list(sys.path)
    for python in pythons:
        searched += _installed_paths(python) if python.is_file() else []
    for entry in dict.fromkeys(filter(None, searched)):
        root = Path(entry, "torch")
        if not (root / "include/torch/csrc/stable/library.h").is_file():
            continue
        found = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text())
        version = found[1] if found else "0"
        if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= MIN_TORCH:
            return Torch(root, version)
        minimum = ".".join(map(str, MIN_TORCH))
        raise Unavailable(f"torch {version} at {root} is too old: {minimum} or later is needed")
    raise Unavailable("no torch with headers is installed in this environment (install torch first)")


def find_compiler() -> list[str]:
    """The C++ compiler as a command, after it has compiled a few lines of C++20."""
    if platform.system() != "Linux":
        raise Unavailable(f"native code is built on Linux only, not on {platform.system()}")
    named = os.environ.get("CXX")
    compiler = shlex.split(named) if named else [shutil.which("g++") or shutil.which("clang++") or ""]
    if not shutil.which(compiler[0]):
        raise Unavailable(f"no C++ compiler found: {named or 'neither g++ nor clang++'}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <span>\nint f(std::span<const int> x) { return x[0]; }\n")
        command = [*compiler, "-std=c++20", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{shlex.join(compiler)} does not compile C++20:\n{done.stderr.strip()}")
    return compiler


def check_tools(library: str) -> None:
    """Raise :class:`Unavailable` unless the sources and build tools of a library are there."""
    if not any(ROOT.joinpath(SOURCES[library]).glob("*.cpp")):
        raise Unavailable(f"{SOURCES[library]} has no sources")
    try:
        import ninja  # noqa: F401
        import pybind11  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"the build requirement {error.name} is not installed") from error
    header = Path(sysconfig.get_path("include"), "Python.h")
    if library == HOST and not header.is_file():
        raise Unavailable(f"Python's headers are not installed: {header} is missing")


def make_plan(mode: str) -> Plan:
    """Decide what to build.

    Raises:
        SystemExit: the mode is unknown, or it names something that cannot be built here.
    """
    if mode not in MODES:
        raise SystemExit(f"SBERT_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    plan = Plan(mode)
    if mode == "none":
        plan.skipped = dict.fromkeys((HOST, CPU), "SBERT_FAST_BUILD=none")
        return plan
    if mode == "cuda" and not any(ROOT.glob("csrc/cuda/*.cu")):
        raise SystemExit("SBERT_FAST_BUILD=cuda: this version has no CUDA sources (csrc/cuda/*.cu)")
    for library in (HOST, CPU):
        try:
            check_tools(library)
            plan.compiler = plan.compiler or find_compiler()
            if library == CPU:
                plan.torch = find_torch()
            plan.libraries.append(library)
        except Unavailable as reason:
            if mode != "auto":
                raise SystemExit(f"SBERT_FAST_BUILD={mode}: {library}: {reason}") from reason
            plan.skipped[library] = str(reason)
    return plan


def sources(library: str) -> list[Path]:
    """The sources of a library in link order, relative to the root.

    Baseline code comes first and the widest instruction set last: of an inline function that
    several objects carry, the linker keeps the first copy, which must run on every CPU.
    """
    isas = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["generic"]
    folder = ROOT / SOURCES[library]
    kernels = [folder / f"kernels_{isa}.cpp" for isa in isas]
    plain = [path for path in sorted(folder.glob("*.cpp")) if not path.stem.startswith("kernels_")]
    return [path.relative_to(ROOT) for path in (*plain, *kernels) if path.is_file()]


def flags(plan: Plan, library: str) -> tuple[list[str], list[str]]:
    """Compiler flags shared by the sources of a library, and its linker flags."""
    linking = ["-shared", "-Wl,--as-needed"]
    if library == HOST:
        import pybind11

        headers = [sysconfig.get_path("include"), pybind11.get_include()]
        return [f"-isystem{path}" for path in headers], linking
    root = plan.torch.root
    headers = [root / "include", root / "include/torch/csrc/api/include"]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-Icsrc/common"]
    # No rpath: the process has loaded torch before, and the loader finds it again by its soname.
    linking += ["-Wl,-z,defs", f"-L{root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    return [*defines, *(f"-isystem{path}" for path in headers)], linking


def ninja_file(plan: Plan, folder: Path) -> str:
    """The text of build.ninja; paths are relative to the root."""

    def quoted(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def path(*parts: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(Path(*parts)))

    lines = [
        f"builddir = {path(folder)}",
        f"cxx = {quoted(plan.compiler)}",
        "rule compile",
        f"  command = $cxx {quoted(COMPILE_FLAGS)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $cxx $in $flags -o $out",
        "  description = link $out",
    ]
    for library in plan.libraries:
        compiling, linking = flags(plan, library)
        objects = []
        for source in sources(library):
            objects.append(path(folder, library, source.with_suffix(".o").name))
            isa = ISA_FLAGS.get(source.stem.removeprefix("kernels_"), [])
            lines.append(f"build {objects[-1]}: compile {path(source)}")
            lines.append(f"  flags = {quoted([*compiling, *isa])}")
        lines.append(f"build {path(folder, FILENAMES[library])}: link {' '.join(objects)}")
        lines.append(f"  flags = {quoted(linking)}")
    return "\n".join(lines) + "\n"


def build_info(plan: Plan) -> str:
    """The text of sbert_fast/_build_info.py."""
    compiler = ""
    if plan.compiler:
        command = [*plan.compiler, "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        compiler = done.stdout.partition("\n")[0]
    values = {
        "MODE": plan.mode,
        "BUILT": tuple(plan.libraries),
        "SKIPPED": plan.skipped,
        "COMPILER": compiler,
        "TORCH": plan.torch.version if plan.torch else "",
    }
    lines = ['"""Written by setup.py: what was built, with what, and why the rest was not."""', ""]
    return "\n".join([*lines, *(f"{name} = {value!r}" for name, value in values.items())]) + "\n"


class BuildPython(build_py):
    """Adds the build record, and starts from an empty folder so that no stale file is packed."""

    def run(self) -> None:
        if self.editable_mode:
            target = ROOT / "sbert_fast"
            for stale in {*target.glob("_C.*so"), *target.glob("_host.*so")}:
                if not any(stale.name == FILENAMES[library] for library in PLAN.libraries):
                    stale.unlink()
        else:
            shutil.rmtree(self.build_lib, ignore_errors=True)
            target = Path(self.build_lib, "sbert_fast")
        super().run()
        target.mkdir(parents=True, exist_ok=True)
        target.joinpath("_build_info.py").write_text(build_info(PLAN))
        for library, reason in PLAN.skipped.items():
            self.announce(f"sbert_fast: {library} is not built: {reason}", level=4)


class BuildLibraries(build_ext):
    """Compiles all libraries in one parallel ninja run, then puts them where setuptools wants them."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path("sbert_fast", FILENAMES[fullname.rpartition(".")[2]]))

    def build_extensions(self) -> None:
        import ninja

        folder = Path("build", f"native-{sys.implementation.cache_tag}-{platform.machine()}")
        script = ROOT / folder / "build.ninja"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(ninja_file(PLAN, folder))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(folder / "build.ninja"), *jobs]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise SystemExit(
                "sbert_fast: the native build failed (the compiler's message is above); "
                "SBERT_FAST_BUILD=none installs the package without native code"
            )
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / folder / target.name, target)


if __name__ == "__main__":
    PLAN = make_plan(os.environ.get("SBERT_FAST_BUILD", "auto"))
    setup(
        packages=[*find_packages(include=["sbert_fast", "sbert_fast.*"]), "sbert_fast.kernels"],
        package_dir={"sbert_fast.kernels": "kernels/triton"},
        ext_modules=[
            Extension(f"sbert_fast.{library}", [str(source) for source in sources(library)])
            for library in PLAN.libraries
        ],
        cmdclass={"build_py": BuildPython, "build_ext": BuildLibraries},
    )
