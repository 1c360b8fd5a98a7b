"""Kernels compiled ahead of time for GPUs that are not here: registers, shared memory, spills.

Nothing of the package needs this: tests hold every kernel to it, and tuning every candidate.
Compilation runs in a process of its own, without TRITON_INTERPRET, which would make every kernel of
this one an interpreted function.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

ARCHS = (80, 90, 100, 120)
REGISTERS_OF_SM = 65536
# Bytes of shared memory that one block may use.
SHARED_OF_BLOCK = {80: 166912, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration.

    Args:
        kernel: `module:function`.
        signature: type of each parameter that is no constexpr, as Triton writes it: "*fp16", "i32".
            Pointers are taken to be aligned to 16 bytes.
        constexprs: value of each constexpr parameter; JSON can write it. "float16" and the like are
            the names of Triton dtypes where `dtypes` lists the parameter.
        arch: compute capability times ten.
        maxnreg: registers a thread may have, or None.
        dtypes: constexpr parameters that are Triton dtypes.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    dtypes: tuple[str, ...] = field(default=())


# Options of a launch that are no parameters of its kernel.
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def build_of(kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], arch: int) -> Build:
    """The build that launching `kernel` with these arguments and options needs on `arch`; tensors
    may be on any device, `meta` too."""
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    launch = {name: named.pop(name) for name in _OPTIONS if name in named}
    signature = {n: _type_of(v) for n, v in named.items() if n not in options and v is not None}
    constexprs = {n: v for n, v in named.items() if n not in signature}
    fn = kernel.fn
    return Build(f"{fn.__module__}:{fn.__name__}", signature, constexprs, arch, **launch)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "fp" if value.is_floating_point() else "i"
        name = "bf16" if value.dtype == torch.bfloat16 else f"{kind}{8 * value.element_size()}"
        return f"*{name}"
    return "fp32" if isinstance(value, float) else "i32"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs: registers a thread, bytes of shared memory a block, bytes of
    stack a thread (where spilled registers go), and the warps of a block."""

    registers: int
    shared: int
    stack: int
    num_warps: int

    def blocks(self, arch: int) -> int:
        """Blocks that fit on one multiprocessor by registers and shared memory."""
        by_registers = REGISTERS_OF_SM // (-(-self.registers // 8) * 8 * 32 * self.num_warps)
        return min(by_registers, (SHARED_OF_BLOCK[arch] + 1024) // (self.shared + 1024))


def compile_all(builds: Sequence[Build], keep: str | None = None) -> list[Usage]:
    """Compile every build; `keep` names a folder for their PTX and machine code."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, *([keep] if keep else [])],
        input=json.dumps([asdict(build) for build in builds]),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Usage(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def table(builds: Sequence[Build], usages: Sequence[Usage]) -> str:
    """One line a build, for people."""
    lines = []
    for build, usage in zip(builds, usages, strict=True):
        options = " ".join(f"{k}={v}" for k, v in build.constexprs.items())
        dtype = next(iter(build.signature.values())).removeprefix("*")
        lines.append(
            f"sm_{build.arch:<3} {dtype:4} registers {usage.registers:3} shared {usage.shared:6} "
            f"stack {usage.stack:3} blocks {usage.blocks(build.arch):2} warps {usage.num_warps} "
            f"{options}"
        )
    return "\n".join(lines)


def assert_fits(builds: Sequence[Build], usages: Sequence[Usage]) -> None:
    """No build spills, and at least one block of it fits on a multiprocessor."""
    bad = [
        (build, usage)
        for build, usage in zip(builds, usages, strict=True)
        if usage.stack > 0 or usage.blocks(build.arch) < 1
    ]
    assert not bad, "\n" + table(*zip(*bad, strict=True))


def _compile(build: Build, keep: str | None) -> Usage:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    constants = {k: getattr(tl, v) if k in build.dtypes else v for k, v in build.constexprs.items()}
    names = kernel.arg_names
    signature = {n: build.signature.get(n, "constexpr") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", build.arch, 32),
        options={
            "num_warps": build.num_warps,
            "num_stages": build.num_stages,
            "maxnreg": build.maxnreg,
        },
    )
    used = _resources(compiled.asm["cubin"], keep)
    return Usage(shared=compiled.metadata.shared, num_warps=build.num_warps, **used)


def _resources(cubin: bytes, keep: str | None) -> dict[str, int]:
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin", dir=keep, delete=keep is None) as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def main() -> None:
    keep = sys.argv[1] if len(sys.argv) > 1 else None
    builds = [Build(**row) for row in json.loads(sys.stdin.read())]
    print(json.dumps([asdict(_compile(build, keep)) for build in builds]))


if __name__ == "__main__":
    main()
