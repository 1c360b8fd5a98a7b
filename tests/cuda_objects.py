"""What nvcc made of csrc/cuda: registers, shared memory and instructions of every kernel.

    python tests/cuda_objects.py

builds the objects and writes tests/cuda_resources.json, which tests/test_cuda_build.py holds later
builds to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("cuda_resources.json")
sys.path.insert(0, str(ROOT / "csrc"))
import native_build  # noqa: E402


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target: registers and stack bytes of a thread, static shared bytes."""

    source: str
    name: str
    target: str
    registers: int
    stack: int
    shared: int
    local: int


@dataclass(frozen=True)
class Objects:
    """The objects of a build: by source, with what nvcc said of it."""

    nvcc: str
    files: dict[str, Path]

    def warnings(self) -> dict[str, str]:
        """What nvcc said, by source, but for what it said of local memory: see :meth:`kernels`."""
        said = {}
        for source, path in self.files.items():
            lines = Path(f"{path}.log").read_text().splitlines()
            kept = [line for line in lines if not re.search("local memory", line, re.IGNORECASE)]
            said[source] = "\n".join(kept)
        return {source: text for source, text in said.items() if text}

    def kernels(self) -> list[Kernel]:
        return [
            kernel
            for source, path in self.files.items()
            for kernel in parse_usage(source, _dump("--dump-resource-usage", str(path)))
        ]


def build() -> Objects:
    """Bring the library up to date, for the default targets.

    Raises:
        native_build.Unavailable: there is no nvcc.
    """
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    toolchain = native_build.find_toolchain(native_build.CUDA)
    assert toolchain.nvcc
    folder = ROOT / native_build.compile_libraries({native_build.CUDA: toolchain})
    sources = [path.name for path in native_build.sources(native_build.CUDA)]
    files = {n: folder / "_C_cuda" / f"{n}.o" for n in sources if n.endswith(".cu")}
    return Objects(toolchain.nvcc.version, files)


def cuobjdump() -> str | None:
    """The program that takes objects apart: the toolkit's or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0], "backends/nvidia/bin/cuobjdump") if folders else None
    return str(path) if path and path.is_file() else None


def _dump(*arguments: str) -> str:
    program = cuobjdump()
    assert program
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    names = subprocess.run(["c++filt"], input=done.stdout, capture_output=True, text=True)
    return names.stdout


def _short(name: str) -> str:
    """`kernel<arguments>` of a demangled function."""
    plain = re.sub(r"sbert_fast::cuda::|\(anonymous namespace\)::|^void ", "", name.strip())
    return plain.partition("(")[0] if "<" not in plain else plain.rpartition(">")[0] + ">"


def parse_usage(source: str, text: str) -> list[Kernel]:
    """The kernels of a resource listing of cuobjdump, names demangled."""
    kernels, target, name = [], "", ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            target = found[1]
        elif found := re.match(r"\s*Function (.*):$", line):
            name = _short(found[1])
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            kernels.append(Kernel(source, name, target, *map(int, found.groups())))
    return kernels


def instructions(path: Path, target: str) -> dict[str, set[str]]:
    """The instructions of each kernel of an object in the machine code for one target."""
    found: dict[str, set[str]] = {}
    name = ""
    for line in _dump("-sass", "-arch", target, str(path)).splitlines():
        if function := re.match(r"\s*Function : (.*)$", line):
            name = _short(function[1])
            found[name] = set()
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]+)", line):
            found[name].add(instruction[1])
    return found


def table(nvcc: str, kernels: list[Kernel]) -> dict[str, Any]:
    """Registers and static shared bytes, by source, kernel and target."""
    sources: dict[str, dict[str, dict[str, list[int]]]] = {}
    for k in sorted(kernels, key=lambda k: (k.source, k.name, int(re.sub(r"\D", "", k.target)))):
        usage = sources.setdefault(k.source, {}).setdefault(k.name, {})
        usage[k.target] = [k.registers, k.shared]
    return {"nvcc": nvcc, "columns": ["registers", "shared bytes"], "sources": sources}


def write(document: dict[str, Any], path: Path = TABLE) -> None:
    """One line a kernel."""
    rows = json.dumps(document, indent=1)
    rows = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", rows)
    rows = re.sub(r'("sm_\w+": \[\d+, \d+\],?)\s+', r"\1 ", rows)
    path.write_text(re.sub(r'\{\s+("sm_\w+")', r"{\1", rows).replace("] }", "]}") + "\n")


if __name__ == "__main__":
    objects = build()
    write(table(objects.nvcc, objects.kernels()))
    print(f"wrote {TABLE}")
