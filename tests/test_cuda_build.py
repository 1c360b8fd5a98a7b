"""What nvcc made of the CUDA kernels: no warning, no spill, no more registers than before, and the
instructions that they are there for. No GPU is needed, only a build with SBERT_FAST_BUILD=cuda:
compiling for every target takes minutes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_objects
from cuda_objects import Kernel, Objects
from sbert_fast import _build_info

# Loads of 16 bytes, to registers or to shared memory, or the copy engine's.
WIDE_LOADS = r"LDG\.E\.128|LDGSTS\.E.*\.128|UBLKCP|UTMALDG"
# What a kernel must have: of sources, of kernels, an instruction.
REQUIRED = (
    (r".*", r".*_kernel", WIDE_LOADS),
    (r"(?!.*_sm90)attention.*", r".*_kernel", r"HMMA\.16816\.F32"),
    (r".*_sm90", r".*_kernel", r"HGMMA\."),
)
# Where instructions are looked at; disassembling all targets takes a minute.
TARGETS = ("sm_80", "sm_90a")


def missing(source: str, found: dict[str, set[str]]) -> list[str]:
    """Kernels of a source that lack an instruction they must have."""
    return [
        f"{source}: {kernel} has no {instruction}"
        for sources, kernels, instruction in REQUIRED
        if re.fullmatch(sources, Path(source).stem)
        for kernel, has in found.items()
        if re.match(kernels, kernel) and not any(re.match(instruction, i) for i in has)
    ]


def spills(kernels: list[Kernel]) -> set[tuple[str, str]]:
    return {(k.name, k.target) for k in kernels if k.stack > 0 or k.local > 0}


def grown(kernels: list[Kernel], recorded: dict[str, dict[str, dict[str, list[int]]]]) -> list[str]:
    """Kernels that need more than the table says, or are not in it."""
    wrong = []
    for k in kernels:
        row = recorded.get(k.source, {}).get(k.name, {}).get(k.target)
        if row is None:
            wrong.append(f"{k.source}: {k.name} for {k.target} is not in the table")
        elif k.registers > row[0] or k.shared > row[1]:
            wrong.append(
                f"{k.source}: {k.name} for {k.target} has {k.registers} registers and {k.shared} "
                f"shared bytes, {row[0]} and {row[1]} in the table"
            )
    return wrong


@pytest.fixture(scope="module")
def objects() -> Objects:
    if "_C_cuda" not in _build_info.BUILT:
        pytest.skip(f"_C_cuda is not built: {_build_info.SKIPPED['_C_cuda']}")
    try:
        return cuda_objects.build()
    except cuda_objects.native_build.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def kernels(objects: Objects) -> list[Kernel]:
    if cuda_objects.cuobjdump() is None:
        pytest.skip("there is no cuobjdump")
    return objects.kernels()


@pytest.mark.slow
class TestBuild:
    """The library that is built here."""

    def test_no_warnings(self, objects: Objects) -> None:
        assert objects.warnings() == {}

    def test_every_kernel_is_there_for_every_target(self, kernels: list[Kernel]) -> None:
        targets = {kernel.target for kernel in kernels}
        assert targets == {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}
        for name in {kernel.name for kernel in kernels if "_sm90" not in kernel.source}:
            assert {kernel.target for kernel in kernels if kernel.name == name} == targets, name

    def test_no_spills(self, kernels: list[Kernel]) -> None:
        assert spills(kernels) == set()

    def test_resources_are_those_of_the_table(
        self, objects: Objects, kernels: list[Kernel]
    ) -> None:
        recorded = json.loads(cuda_objects.TABLE.read_text())
        if recorded["nvcc"] != objects.nvcc:
            pytest.skip(f"the table is of nvcc {recorded['nvcc']}, this is {objects.nvcc}")
        stale = "after a look at the difference: python tests/cuda_objects.py"
        assert grown(kernels, recorded["sources"]) == [], stale
        assert set(recorded["sources"]) == {kernel.source for kernel in kernels}, stale

    def test_groups_of_warps_can_trade_registers(self, kernels: list[Kernel]) -> None:
        """Three groups of four warps start with what the register file gives each thread; with
        fewer, a group would wait forever for those that it takes."""
        at_launch = {k.registers for k in kernels if k.name.startswith("attention_sm90_kernel")}
        assert at_launch == {65536 // 384 // 8 * 8}

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.usefixtures("kernels")
    def test_instructions(self, objects: Objects, target: str) -> None:
        looked_at = 0
        for source, path in objects.files.items():
            if target != "sm_90a" and Path(source).stem.endswith("_sm90"):
                continue
            found = cuda_objects.instructions(path, target)
            assert missing(source, found) == []
            looked_at += len(found)
        assert looked_at > 0


USAGE = """
arch = sm_80
 Function void sbert_fast::cuda::(anonymous namespace)::norm_kernel<__half, 2>(int, float):
  REG:40 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function void sbert_fast::cuda::norm_kernel<__half, 2>(int, float):
  REG:42 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


class TestTheChecks:
    """They can fail."""

    @pytest.fixture
    def usage(self) -> list[Kernel]:
        return cuda_objects.parse_usage("norm.cu", USAGE)

    def test_usage_is_read(self, usage: list[Kernel]) -> None:
        assert usage == [
            Kernel("norm.cu", "norm_kernel<__half, 2>", "sm_80", 40, 0, 16, 0),
            Kernel("norm.cu", "norm_kernel<__half, 2>", "sm_90a", 42, 8, 16, 0),
        ]
        assert spills(usage) == {("norm_kernel<__half, 2>", "sm_90a")}

    def test_growth_is_seen(self, usage: list[Kernel], tmp_path: Path) -> None:
        document = cuda_objects.table("13.0", usage)
        cuda_objects.write(document, tmp_path / "table.json")
        recorded = json.loads((tmp_path / "table.json").read_text())
        assert recorded == document
        assert grown(usage, recorded["sources"]) == []
        row = recorded["sources"]["norm.cu"]["norm_kernel<__half, 2>"]
        row["sm_80"][0] = 39
        assert (
            "has 40 registers and 16 shared bytes, 39 and 16"
            in grown(usage, recorded["sources"])[0]
        )
        del row["sm_80"]
        assert "is not in the table" in grown(usage, recorded["sources"])[0]

    @pytest.mark.parametrize(
        ("source", "has", "lacks"),
        [
            ("attention_f16.cu", {"LDG.E.128.CONSTANT", "HMMA.16816.F32"}, 0),
            ("attention_f16.cu", {"LDGSTS.E.BYPASS.LTC128B.128", "HMMA.16816.F32.BF16"}, 0),
            ("attention_f16.cu", {"LDG.E.64.CONSTANT", "HMMA.16816.F32"}, 1),
            ("attention_f16.cu", {"LDG.E.128", "FFMA"}, 1),
            ("attention_sm90.cu", {"UTMALDG.3D", "HGMMA.64x64x16.F32"}, 0),
            ("attention_sm90.cu", {"UTMALDG.3D", "HMMA.16816.F32"}, 1),
            ("add_norm.cu", {"LDG.E.128"}, 0),
            ("add_norm.cu", {"LDG.E"}, 1),
        ],
    )
    def test_instructions_are_missed(self, source: str, has: set[str], lacks: int) -> None:
        assert len(missing(source, {"the_kernel<__half>": has})) == lacks

    @pytest.mark.parametrize(
        ("said", "counts"),
        [
            ("", False),
            ("a.cu(3): warning #177-D: variable x was declared but never referenced\n", True),
            ("ptxas warning : Local memory used for function 'f'\n", False),
        ],
    )
    def test_warnings_are_read(self, tmp_path: Path, said: str, counts: bool) -> None:
        (tmp_path / "a.cu.o.log").write_text(said)
        warnings = Objects("13.0", {"a.cu": tmp_path / "a.cu.o"}).warnings()
        assert set(warnings) == ({"a.cu"} if counts else set())


def test_the_library_finds_torch_in_a_scope_of_its_own(objects: Objects) -> None:
    """torch keeps its symbols out of the global scope: the library names where they come from."""
    code = """
import ctypes, sys
import torch
from sbert_fast.ops import schemas
library, beside = sys.argv[1:]
if beside:
    ctypes.CDLL(beside, ctypes.RTLD_LOCAL)
torch.ops.load_library(library)
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
names = [op for op in schemas.SCHEMAS if "cuda" in schemas.implementations(op)]
assert all(has_kernel(f"{schemas.NAMESPACE}::{op}.cuda", "CUDA") for op in names)
"""
    folder = next(iter(objects.files.values())).parent.parent
    stub = folder / "stubs/libtorch_cuda.so"
    command = [sys.executable, "-P", "-c", code, str(folder / "_C_cuda.abi3.so")]
    alone = subprocess.run([*command, ""], capture_output=True, text=True)
    assert alone.returncode != 0 and "libtorch_cuda.so: cannot open shared object" in alone.stderr
    beside = subprocess.run([*command, str(stub)], capture_output=True, text=True)
    assert beside.returncode == 0, beside.stderr
