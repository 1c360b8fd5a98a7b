"""Loads the compiled ops, once, and remembers why where that is impossible.

Loading the CUDA ops starts no CUDA: what is known of the devices is asked for by
:func:`cuda_refusal`, when an op is bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from sbert_fast.ops import schemas

_PACKAGE = Path(__file__).resolve().parent.parent
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Extension:
    """A compiled library: `path` where it was found, `reason` where it cannot be used.

    Attributes:
        cuda: version of the CUDA toolkit that compiled it, "" where none did.
        targets: of the CUDA library, what it was compiled for: "9.0a", "12.0+PTX".
        emulated: of the CUDA library, whether its ops are compiled for a CPU and take CPU tensors.
    """

    name: str
    path: Path | None
    reason: str | None
    cuda: str = ""
    targets: tuple[str, ...] = ()
    emulated: bool = False

    @property
    def available(self) -> bool:
        return self.reason is None


def _find(name: str) -> Path | None:
    found = sorted(_PACKAGE.glob(f"{name}.*so")) + sorted(_PACKAGE.glob(f"{name}.pyd"))
    return found[0] if found else None


def _load(path: Path, implementation: str, key: str) -> str | None:
    """Load a library; why it cannot be used, or None."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch tells the file, and keeps what the loader said as the cause.
        return f"{path.name} does not load beside this torch: {error.__cause__ or error}"
    # A library of another version may lack a kernel, and calling it would crash the process.
    missing = [
        op
        for op in schemas.SCHEMAS
        if implementation in schemas.implementations(op)
        and not torch._C._dispatch_has_kernel_for_dispatch_key(
            f"{schemas.NAMESPACE}::{op}.{implementation}", key
        )
    ]
    if missing:
        return f"{path.name} has no kernel for {', '.join(missing)}: build it again"
    return None


def _not_built(name: str) -> str:
    """That a library is missing, and why setup.py left it out, if it did."""
    try:
        from sbert_fast import _build_info
    except ImportError:
        return f"sbert_fast/{name} was not built"
    reason = _build_info.SKIPPED.get(name)
    return f"sbert_fast/{name} was not built" + (f": {reason}" if reason else "")


def _load_cpu() -> Extension:
    path = _find("_C")
    if path is None:
        return Extension("_C", None, _not_built("_C"))
    return Extension("_C", path, _load(path, "cpu", "CPU"))


def _build_record() -> tuple[str, tuple[str, ...]]:
    """The CUDA version and the targets that setup.py wrote down; empty where it did not."""
    try:
        from sbert_fast import _build_info
    except ImportError:
        return "", ()
    return getattr(_build_info, "CUDA", ""), getattr(_build_info, "CUDA_TARGETS", ())


def _load_cuda() -> Extension:
    path, (version, targets) = _find("_C_cuda"), _build_record()
    if path is None:
        return Extension("_C_cuda", None, _not_built("_C_cuda"))
    return Extension("_C_cuda", path, _misfit(path, version, targets), version, targets)


def _misfit(path: Path, version: str, targets: tuple[str, ...]) -> str | None:
    """Why the CUDA library does not serve this torch; it is loaded where it may."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not version:
        return f"there is no record of the build of {path.name}: build it again"
    if version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        return (
            f"{path.name} was built with CUDA {version}, torch {torch.__version__} "
            f"with CUDA {torch.version.cuda}: they must have the same major version"
        )
    if (reason := _load(path, "cuda", "CUDA")) is not None:
        return reason
    recorded, built = " ".join((version, *targets)), _stamp()
    if built != recorded:
        return f"{path.name} is of another build, {built}, than the record of {recorded}"
    return None


def _stamp() -> str:
    """What the CUDA library that is loaded was built with and for."""
    if not hasattr(torch.ops.sbert_fast, "cuda_build"):
        return "an older one"
    return str(torch.ops.sbert_fast.cuda_build())


def load_emulated_cuda(path: Path) -> Extension:
    """The CUDA ops compiled for a CPU, for tests: put the result in the place of `CUDA`."""
    return Extension("_C_cuda", path, _load(path, "cuda", "CPU"), emulated=True)


# Asks the machine what a graph cannot hold, and the answer is the same every time.
@torch.compiler.assume_constant_result
def cuda_refusal(device: torch.device) -> str | None:
    """Why the CUDA ops cannot run on `device`; None where they can."""
    if CUDA.emulated and CUDA.available:
        if device.type == "cpu":
            return None
        return f"the emulated CUDA ops run on cpu, not on {device.type}"
    if device.type != "cuda":
        return f"the CUDA ops run on cuda, not on {device.type}"
    if not CUDA.available:
        return CUDA.reason
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU: there is none, or its driver is missing or too old"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _no_code_for(torch.cuda.get_device_name(index), capability_of(index), CUDA.targets)


@lru_cache
def capability_of(index: int) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


def _no_code_for(name: str, capability: tuple[int, int], targets: tuple[str, ...]) -> str | None:
    has = f"{name} has {capability[0]}.{capability[1]}"
    if capability < MIN_CAPABILITY:
        return f"the CUDA ops need compute capability 8.0 or later, {has}"
    if not any(_runs_on(target, capability) for target in targets):
        return (
            f"the CUDA ops were built for compute capability {', '.join(targets)}, {has}: "
            f"build them again with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
        )
    return None


def _runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether code for a target like "8.6", "9.0a" or "12.0+PTX" runs on a device."""
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", target)
    if found is None:
        return False
    compiled_for, variant, has_ptx = (int(found[1]), int(found[2])), found[3], bool(found[4])
    if variant == "a":
        return capability == compiled_for
    same_major = capability[0] == compiled_for[0]
    # Machine code runs on later minor versions, PTX is compiled there for any later one.
    return capability >= compiled_for and (same_major or (has_ptx and not variant))


CPU = _load_cpu()
CUDA = _load_cuda()
