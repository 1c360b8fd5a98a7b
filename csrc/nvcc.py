"""NVIDIA's compiler: where it is, which GPUs it compiles for, with which flags.

Environment: CUDA_HOME, CUDA_PATH, TORCH_CUDA_ARCH_LIST, NVCC_THREADS, as torch reads them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = Path("/usr/local/cuda")
MIN_VERSION = (12, 0)
MIN_CAPABILITY = (8, 0)
# The PTX of the last one is compiled by the driver of a newer GPU.
DEFAULT_TARGETS = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX")
# GPUs by the names that torch has for them.
ARCHITECTURES = {
    "Ampere": ("8.0", "8.6+PTX"),
    "Ada": ("8.9+PTX",),
    "Hopper": ("9.0+PTX",),
    "Blackwell": ("10.0", "10.3", "12.0", "12.1+PTX"),
}
# What only Hopper has is in files whose name ends so.
SM90_SUFFIX = "_sm90"
SM90, SM90_PTX = "9.0a", "9.0+PTX"
COMPILE_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
COMPILE_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
COMPILE_FLAGS += ["-Xptxas=-warn-spills,-warn-lmem-usage"]
# The CUDA runtime inside stays inside: torch has its own.
LINK_FLAGS = ["-shared", "-nodlink", "-cudart=static", "-Xlinker=--as-needed,--exclude-libs=ALL"]

_TARGET = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


class Unavailable(Exception):
    """A library that cannot be built here; the message says what is missing."""


@dataclass(frozen=True)
class Nvcc:
    """An nvcc, its version, and the targets it is to compile for: "8.0", "9.0a", "12.0+PTX"."""

    path: Path
    version: str
    targets: tuple[str, ...]

    @property
    def stamp(self) -> str:
        """What a library tells of itself, and its record in the package too."""
        return " ".join((self.version, *self.targets))

    @property
    def with_sm90(self) -> bool:
        return SM90 in self.targets

    def compiles(self, source: Path) -> bool:
        """Whether a source is for any of the targets."""
        return self.with_sm90 or not source.stem.endswith(SM90_SUFFIX)

    def code_flags(self, source: Path) -> list[str]:
        """For which targets a .cu file is compiled."""
        targets = [SM90] if source.stem.endswith(SM90_SUFFIX) else self.targets
        return [flag for target in targets for flag in _code_flags(target)]


def _code_flags(target: str) -> list[str]:
    found = _TARGET.fullmatch(target)
    assert found, target
    arch = f"{found[1]}{found[2]}{found[3]}"
    kinds = ["sm", "compute"] if found[4] else ["sm"]
    if target == SM90_PTX:  # 9.0a is always beside it
        kinds = ["compute"]
    return [f"-gencode=arch=compute_{arch},code={kind}_{arch}" for kind in kinds]


def find_nvcc(compiler: Sequence[str]) -> Nvcc:
    """The nvcc of this machine, once it has compiled a few lines with `compiler` behind it.

    Raises:
        Unavailable: there is none, it is too old, or TORCH_CUDA_ARCH_LIST asks for what it has not.
    """
    path = _path()
    version = _version(path)
    if tuple(map(int, version.split("."))) < MIN_VERSION:
        raise Unavailable(f"nvcc must be 12.0 or later, got {version} at {path}")
    targets = _targets(path, version)
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text("#include <cuda_bf16.h>\n#include <span>\n__global__ void probe() {}\n")
        command = [str(path), f"-ccbin={host_compiler(compiler)}", "-std=c++20"]
        command += [*_code_flags(targets[0])[:1], "-c", str(probe), "-o", f"{probe}.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        told = (done.stderr or done.stdout).strip()
        raise Unavailable(f"{path} must compile C++20 with {host_compiler(compiler)}, got {told}")
    return Nvcc(path, version, targets)


def host_compiler(compiler: Sequence[str]) -> str:
    """The program that nvcc is to call: the compiler, without a cache in front of it."""
    return next((word for word in compiler if "ccache" not in Path(word).name), compiler[0])


def _path() -> Path:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    candidates = [
        *(Path(root, "bin", "nvcc") for root in roots if root),
        *([Path(on_path)] if on_path else []),
        DEFAULT_ROOT / "bin" / "nvcc",
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise Unavailable(
        "there is no nvcc in CUDA_HOME/bin, on the PATH or in "
        f"{DEFAULT_ROOT}/bin: install the CUDA toolkit, or use the Triton kernels"
    )


def _ask(path: Path, option: str) -> str:
    try:
        done = subprocess.run([str(path), option], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"{path} does not run: {error}") from error
    if done.returncode != 0:
        raise Unavailable(f"{path} {option} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _version(path: Path) -> str:
    told = _ask(path, "--version")
    found = re.search(r"release (\d+\.\d+)", told)
    if found is None:
        raise Unavailable(f"{path} --version must name a release, got {told.strip()!r}")
    return found[1]


def _targets(path: Path, version: str) -> tuple[str, ...]:
    known = set(re.findall(r"compute_(\d+)", _ask(path, "--list-gpu-arch")))
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        targets = parse_targets(asked)
        unknown = [target for target in targets if _number(target) not in known]
        if unknown:
            raise Unavailable(
                f"nvcc {version} does not compile for {', '.join(unknown)} of TORCH_CUDA_ARCH_LIST"
            )
        return targets
    targets = tuple(target for target in DEFAULT_TARGETS if _number(target) in known)
    # PTX for newer GPUs; that of 9.0a runs on no other.
    has_ptx = any(target.endswith("+PTX") for target in targets)
    return targets if has_ptx else (*targets, SM90_PTX)


def _number(target: str) -> str:
    found = _TARGET.fullmatch(target)
    assert found, target
    return found[1] + found[2]


def parse_targets(text: str) -> tuple[str, ...]:
    """The targets of a TORCH_CUDA_ARCH_LIST, "8.0;9.0a+PTX" or "Ampere Hopper", in order.

    9.0 becomes 9.0a: no other GPU runs machine code for 9.0, and that for 9.0a has more
    instructions. 9.0+PTX becomes 9.0a and PTX that newer GPUs run. What is older than the kernels
    is left out.

    Raises:
        Unavailable: an entry is no target, or all of them are too old.
    """
    targets: set[str] = set()
    for word in re.split(r"[;,\s]+", text.strip("; \t")):
        for entry in ARCHITECTURES.get(word, (word,)):
            found = _TARGET.fullmatch(entry)
            if found is None:
                raise Unavailable(
                    "TORCH_CUDA_ARCH_LIST must name targets like 8.0, 9.0a or 12.0+PTX, or one of "
                    f"{', '.join(ARCHITECTURES)}, got {word!r}"
                )
            if (int(found[1]), int(found[2])) < MIN_CAPABILITY:
                continue
            hopper = (SM90, SM90_PTX) if found[4] else (SM90,)
            targets.update(hopper if _number(entry) == "90" else [entry])
    if not targets:
        raise Unavailable(f"TORCH_CUDA_ARCH_LIST must name 8.0 or later, got {text!r}")
    return tuple(sorted(targets, key=lambda target: (len(_number(target)), target)))


def threads() -> str:
    """Targets that one nvcc compiles at a time."""
    return os.environ.get("NVCC_THREADS") or str(max(1, min(4, (os.cpu_count() or 1) // 4)))
