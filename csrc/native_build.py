"""How the native libraries are compiled: what is needed, with which flags, in which ninja file.

`setup.py` decides what to build and where the result goes; everything about compilers is here, and
about NVIDIA's in `nvcc.py`. None of them imports torch: its headers are found by path, so that an
isolated build needs no torch of its own.
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
from dataclasses import dataclass
from pathlib import Path

import nvcc
from nvcc import Nvcc, Unavailable

ROOT = Path(__file__).resolve().parent.parent
MIN_TORCH = (2, 11)
TORCH_ABI = "0x020a000000000000"  # the 2.10 stable ABI, the first with parallel_for

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# GCC warns of uninitialised values inside its own AVX-512 headers.
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
VNNI = [*AVX512, "-mavx512vnni"]
# One source per instruction set, narrowest first.
GENERIC_ISAS = ("generic", "generic_tiles")
ISA_FLAGS: dict[str, list[str]] = {
    "generic": [],
    # For tests alone, and slow to compile: -O3 takes four times as long, for a third of the build.
    "generic_tiles": ["-O1"],
    "avx2": AVX2,
    "avx_vnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx512_vnni": VNNI,
    "avx512_bf16": [*VNNI, "-mavx512bf16"],
    # The instructions of AMX are written in assembly, which needs no flag.
    "amx_bf16": [*VNNI, "-mavx512bf16"],
}
COMPILE_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


@dataclass(frozen=True)
class Library:
    """A shared library: its name, its file beside `sbert_fast/__init__.py`, and its sources."""

    name: str
    filename: str
    folder: str
    uses_torch: bool


HOST = Library("_host", f"_host{sysconfig.get_config_var('EXT_SUFFIX')}", "csrc/host", False)
CPU = Library("_C", "_C.abi3.so", "csrc/cpu", True)
CUDA = Library("_C_cuda", "_C_cuda.abi3.so", "csrc/cuda", True)
LIBRARIES = (HOST, CPU, CUDA)


@dataclass(frozen=True)
class Torch:
    """A torch installation, seen from outside; `cuda` is "" where it has none."""

    root: Path
    version: str
    cuda: str = ""


@dataclass(frozen=True)
class Toolchain:
    """What compiles: the compiler as a command, and torch and nvcc where a library needs them."""

    compiler: list[str]
    torch: Torch | None = None
    nvcc: Nvcc | None = None


def _import_path(python: Path) -> list[str]:
    """Where `python` finds modules, outside of this build's isolation."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [str(python), "-P", "-c", "import sys; print(*sys.path, sep='\\n')"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def find_torch() -> Torch:
    """Find the torch of the environment that is being installed into.

    An isolated build has an import path of its own (pip) or even its own interpreter (build, uv),
    without torch. So the true import path of this interpreter is searched as well, then that of the
    active virtual or conda environment.

    Raises:
        Unavailable: there is none, or it is too old.
    """
    active = [os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")]
    pythons = [Path(sys.executable), *(Path(prefix, "bin/python") for prefix in active if prefix)]
    searched = [*sys.path, *(entry for python in pythons for entry in _import_path(python))]
    for entry in dict.fromkeys(filter(None, searched)):
        root = Path(entry, "torch")
        if not (root / "include/torch/csrc/stable/library.h").is_file():
            continue
        text = (root / "version.py").read_text()
        found = re.search(r"__version__ = '([^']+)'", text)
        version = found[1] if found else "unknown"
        cuda = re.search(r"^cuda\b.*= '([^']+)'", text, re.MULTILINE)
        if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= MIN_TORCH:
            return Torch(root, version, cuda[1] if cuda else "")
        minimum = ".".join(map(str, MIN_TORCH))
        raise Unavailable(f"torch must be {minimum} or later, got {version} at {root}")
    raise Unavailable("there is no torch to compile against: install torch, then build again")


def find_compiler() -> list[str]:
    """The C++ compiler as a command, once it has compiled a few lines of C++20.

    Raises:
        Unavailable: there is none, or it is too old.
    """
    if platform.system() != "Linux":
        raise Unavailable(f"native code is built on Linux only, got {platform.system()}")
    default = shutil.which("g++") or shutil.which("clang++") or "g++"
    compiler = shlex.split(os.environ.get("CXX") or default)
    if not shutil.which(compiler[0]):
        raise Unavailable(f"the C++ compiler {compiler[0]} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <span>\nint first(std::span<const int> x) { return x[0]; }\n")
        command = [*compiler, "-std=c++20", "-fsyntax-only", str(probe)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{shlex.join(compiler)} must compile C++20, got {done.stderr.strip()}")
    return compiler


def has_cuda_sources() -> bool:
    """Whether this version has CUDA kernels."""
    return any(ROOT.glob(f"{CUDA.folder}/*.cu"))


def find_toolchain(library: Library) -> Toolchain:
    """Everything that `library` needs to be built.

    Raises:
        Unavailable: something is missing.
    """
    try:
        import ninja  # noqa: F401
        import pybind11  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"the build requirement {error.name} is not installed") from error
    header = Path(sysconfig.get_path("include"), "Python.h")
    if library is HOST and not header.is_file():
        raise Unavailable(f"Python's headers are not installed: {header} is missing")
    if library is CUDA and not has_cuda_sources():
        raise Unavailable("this version has no CUDA sources (csrc/cuda/*.cu)")
    compiler, torch = find_compiler(), find_torch() if library.uses_torch else None
    return Toolchain(compiler, torch, find_nvcc(compiler, torch) if library is CUDA else None)


def find_nvcc(compiler: list[str], torch: Torch | None) -> Nvcc:
    """The nvcc that compiles CUDA ops for `torch`.

    Raises:
        Unavailable: there is none, or it is of another CUDA than torch.
    """
    found = nvcc.find_nvcc(compiler)
    # A torch without CUDA has the headers, too: what is built is for another torch.
    if torch and torch.cuda and torch.cuda.split(".")[0] != found.version.split(".")[0]:
        raise Unavailable(
            f"nvcc must be of the major version of torch's CUDA, {torch.cuda}, got "
            f"{found.version} at {found.path}"
        )
    return found


def sources(library: Library) -> list[Path]:
    """The sources of a library in link order, relative to the root.

    Baseline code comes first and the widest instruction set last: of an inline function that
    several objects carry, the linker keeps the first copy, which must run on every CPU.
    """
    isas = ISA_FLAGS if platform.machine() == "x86_64" else GENERIC_ISAS
    folder = ROOT / library.folder
    kernels = [folder / f"kernels_{isa}.cpp" for isa in isas]
    plain = [path for path in sorted(folder.glob("*.cpp")) if not path.stem.startswith("kernels_")]
    plain += sorted(folder.glob("*.cu"))
    return [path.relative_to(ROOT) for path in (*plain, *kernels) if path.is_file()]


def _build_folder() -> Path:
    return Path("build", f"native-{sys.implementation.cache_tag}-{platform.machine()}")


# What is linked for its name alone: torch's CUDA library, which may not be here.
STUBS = _build_folder() / "stubs"
STUB_SOURCE = Path("csrc/cuda/stub/torch_cuda.cpp")


def _stub_lines(toolchain: Toolchain) -> list[str]:
    flags = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    return [
        f"build {_path(STUBS, 'libtorch_cuda.so')}: link {_path(STUB_SOURCE)}",
        f"  flags = {_quoted(flags)}",
        f"  program = {_quoted(toolchain.compiler)}",
    ]


def _flags(library: Library, toolchain: Toolchain) -> tuple[list[str], list[str]]:
    """Compiler flags shared by the sources of a library, and its linker flags."""
    if toolchain.torch is None:
        import pybind11

        headers = [sysconfig.get_path("include"), pybind11.get_include()]
        return [f"-isystem{path}" for path in headers], ["-shared"]
    root = toolchain.torch.root
    headers = [root / "include", root / "include/torch/csrc/api/include"]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-Icsrc/common"]
    # No rpath: the process has loaded torch before, and the loader knows it again by its soname.
    linking = [f"-L{root / 'lib'}", "-ltorch_cpu"]
    if toolchain.nvcc:
        defines += ["-DUSE_CUDA", *_sm90_flags(toolchain.nvcc)]
        defines.append(f'-DSBF_CUDA_BUILD="{toolchain.nvcc.stamp}"')
        linking = [f"-ccbin={nvcc.host_compiler(toolchain.compiler)}", *nvcc.LINK_FLAGS, *linking]
        linking += [f"-L{STUBS}", "-ltorch_cuda"]
    else:
        linking = ["-shared", "-Wl,--as-needed", "-Wl,-z,defs", *linking]
    return [*defines, *(f"-isystem{path}" for path in headers)], linking


def _sm90_flags(compiler: Nvcc) -> list[str]:
    return ["-DSBF_WITH_SM90=1"] if compiler.with_sm90 else []


def _nvcc_flags(toolchain: Toolchain, source: Path) -> list[str]:
    """Flags of a .cu file."""
    assert toolchain.nvcc
    shared = [f"-ccbin={nvcc.host_compiler(toolchain.compiler)}", "-Icsrc/common"]
    shared += [*_sm90_flags(toolchain.nvcc), f"--threads={nvcc.threads()}"]
    return [*shared, *toolchain.nvcc.code_flags(source)]


def _quoted(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(*parts: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(Path(*parts)))


def ninja_file(toolchains: dict[Library, Toolchain], folder: Path) -> str:
    """The text of a build.ninja that makes the libraries in `folder`, relative to the root."""
    lines = [
        f"builddir = {_path(folder)}",
        "rule compile",
        f"  command = $program {_quoted(COMPILE_FLAGS)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        # What nvcc says is kept beside the object, for the tests to read.
        "rule compile_cuda",
        f"  command = $program {_quoted(nvcc.COMPILE_FLAGS)} $flags -MMD -MF $out.d -c $in -o $out"
        " > $out.log 2>&1; status=$$?; cat $out.log; exit $$status",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $program $in $flags -o $out",
        "  description = link $out",
    ]
    for library, toolchain in toolchains.items():
        compiling, linking = _flags(library, toolchain)
        linker = [str(toolchain.nvcc.path)] if toolchain.nvcc else toolchain.compiler
        objects = []
        for source in sources(library):
            if toolchain.nvcc and not toolchain.nvcc.compiles(source):
                continue
            rule, program = "compile", toolchain.compiler
            isa = ISA_FLAGS.get(source.stem.removeprefix("kernels_"), [])
            stem, flags = source.stem, [*compiling, *isa]
            if source.suffix == ".cu":
                rule, program = "compile_cuda", linker
                stem, flags = source.name, _nvcc_flags(toolchain, source)
            objects.append(_path(folder, library.name, f"{stem}.o"))
            lines += [
                f"build {objects[-1]}: {rule} {_path(source)}",
                f"  flags = {_quoted(flags)}",
                f"  program = {_quoted(program)}",
            ]
        stubs = ""
        if toolchain.nvcc:
            lines += _stub_lines(toolchain)
            stubs = f" | {_path(STUBS, 'libtorch_cuda.so')}"
        lines += [
            f"build {_path(folder, library.filename)}: link {' '.join(objects)}{stubs}",
            f"  flags = {_quoted(linking)}",
            f"  program = {_quoted(linker)}",
        ]
    return "\n".join(lines) + "\n"


def compile_libraries(toolchains: dict[Library, Toolchain]) -> Path:
    """Bring the libraries up to date, in parallel; the folder, relative to the root, that has them.

    Raises:
        SystemExit: a compilation failed.
    """
    import ninja

    folder = _build_folder()
    script = folder / "build.ninja"
    ROOT.joinpath(folder).mkdir(parents=True, exist_ok=True)
    ROOT.joinpath(script).write_text(ninja_file(toolchains, folder))
    command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(script)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise SystemExit(
            "sbert_fast: the native build failed, the compiler's message is above; "
            "SBERT_FAST_BUILD=cpu leaves the CUDA ops out, SBERT_FAST_BUILD=none all native code"
        )
    return folder
