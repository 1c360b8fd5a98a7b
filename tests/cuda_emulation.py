"""The CUDA kernels compiled for a CPU, where tests/cuda_emulator runs them thread by thread.

Ninja keeps the libraries in build/cuda-emulated up to date: what has not changed is not compiled
again.
"""

from __future__ import annotations

import ctypes
import fcntl
import platform
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from sbert_fast.ops import schemas

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests/cuda_emulator"
FOLDER = Path("build", f"cuda-emulated-{platform.machine()}")

COMPILE_FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Kernels unroll with nvcc's pragma, and read memory through words of other types.
    *("-Wno-unknown-pragmas", "-fno-strict-aliasing"),
    *("-DSBF_EMULATED", "-DSBF_WITH_SM90=1"),
    *("-Itests/cuda_emulator", "-Icsrc/cuda", "-Icsrc/common"),
]


class BuildError(Exception):
    """A library that does not compile; the message is the compiler's."""


def _native_build() -> ModuleType:
    """csrc/native_build.py, which is in no package."""
    if "native_build" not in sys.modules:
        sys.path.insert(0, str(ROOT / "csrc"))
        try:
            import native_build  # noqa: F401
        finally:
            sys.path.remove(str(ROOT / "csrc"))
    return sys.modules["native_build"]


@cache
def unavailable() -> str | None:
    """Why nothing can be emulated here; None where it can."""
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"kernels are emulated on x86_64 and aarch64, not on {platform.machine()}"
    native = _native_build()
    try:
        native.find_compiler()
    except native.Unavailable as error:
        return str(error)
    return None


def _ninja_file(name: str, sources: list[Path]) -> str:
    native = _native_build()
    headers = [Path(torch.__file__).parent / "include"]
    headers.append(headers[0] / "torch/csrc/api/include")
    flags = [*COMPILE_FLAGS, f"-DTORCH_TARGET_VERSION={native.TORCH_ABI}"]
    flags += [f"-isystem{path}" for path in headers]
    libraries = Path(torch.__file__).parent / "lib"
    linking = ["-shared", "-Wl,--as-needed", "-Wl,-z,defs", f"-L{libraries}", "-ltorch_cpu"]
    lines = [
        f"builddir = {FOLDER / name}",
        f"cxx = {shlex.join(native.find_compiler())}",
        "rule compile",
        f"  command = $cxx {shlex.join(flags)} -MMD -MF $out.d -c -x c++ $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx $in {shlex.join(linking)} -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        objects.append(str(FOLDER / name / f"{source.name}.o"))
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {FOLDER / name}.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build(name: str, sources: list[Path]) -> Path:
    """Compile `sources` and the emulator into a shared library, in parallel; its path.

    Raises:
        BuildError: it does not compile.
    """
    import ninja

    folder = ROOT / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{name}.ninja"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may be testing
        script.write_text(_ninja_file(name, [*sorted(EMULATOR.glob("*.cpp")), *sources]))
        command = [str(Path(ninja.BIN_DIR, "ninja")), "--quiet", "-f", str(script)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{name} does not compile for the emulator:\n{done.stdout}{done.stderr}")
    return folder / f"{name}.so"


@cache
def library() -> Path:
    """The library of the CUDA ops, compiled for the emulator.

    `sbert_fast.ops.extension.load_emulated_cuda` takes it, for tests of what chooses ops.

    Raises:
        BuildError: it does not compile.
    """
    folder = ROOT / "csrc/cuda"
    return build("ops", sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")]))


@cache
def load() -> frozenset[str]:
    """Load the emulated CUDA ops, once; the names of the ops they have a kernel for.

    `torch.ops.sbert_fast.<op>.cuda` takes CPU tensors from then on.

    Raises:
        BuildError: they do not compile.
    """
    torch.ops.load_library(str(library()))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(
        op
        for op in schemas.SCHEMAS
        if "cuda" in schemas.implementations(op)
        and has_kernel(f"{schemas.NAMESPACE}::{op}.cuda", "CPU")
    )


def set_order(seed: int) -> None:
    """Choose the order in which the threads of the ops' kernels run from now on.

    Args:
        seed: of a random order; 0 takes the threads by their numbers. It is 1 at first.
    """
    ctypes.CDLL(str(library())).sbf_emulation_set_order(ctypes.c_uint64(seed))
