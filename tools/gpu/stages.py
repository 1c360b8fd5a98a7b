"""The stages of a check on a GPU: their commands, each with a share of the time."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT
from benchmarks.common import tree
from tools.gpu.sanitize import TOOLS

WIDE_MODEL = tree.SCRATCH / "all-MiniLM-L6-v2"
# What every other stage needs on a fresh machine.
PREPARE = "prepare"
ONLY_WHERE_ASKED = (PREPARE, "sanitize", "ground")


@dataclass
class Step:
    """A command: its name, its words, its seconds, whether its failure counts, and what is set in
    its environment."""

    name: str
    command: list[str]
    cap: float
    must: bool = True
    sets: dict[str, str] = field(default_factory=dict)


# By name, in order of value.
Stages = dict[str, list[Step]]


def _python(module: str, *arguments: str | Path | int) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def pytest_command(files: Sequence[str], *arguments: str) -> list[str]:
    """pytest over `files`, told about a device that is lost."""
    plugin = ("-p", "no:cacheprovider", "-p", "tools.gpu.fail_at_once")
    # -P: the folder kernels of the source tree is not to be found by its name.
    command = [sys.executable, "-P", "-m", "pytest", *plugin, "-q", "--tb=short", "-rfE"]
    return [*command, *arguments, *files]


def gpu_tests() -> tuple[list[str], list[str]]:
    """Files with tests for a GPU: those of the ops, and those of models.

    Found by their text: importing the others may need packages that are not there.
    """
    marked = re.compile(r"mark\.gpu\b|\btriton_device\b")
    found = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if marked.search(p.read_text()))
    models = [str(p) for p in found if "FastEncoder" in p.read_text()]
    return [str(p) for p in found if str(p) not in models], models


# The kinds of op tests and their seconds: a process of their own for kernels that may lose it the
# device, the others first. The last takes the files that are of no kind.
_OP_KINDS = (
    ("Triton", r"test_triton_.*", 48),
    ("CUDA, rows and pooling", r"test_cuda_(?!attention).*", 20),
    ("CUDA, attention", r"test_cuda_attention.*", 22),
    ("all", r".*", 15),
)


def op_steps(files: Sequence[str]) -> list[Step]:
    """A step for each kind of which there are files; pytest without files would run everything."""
    parallel = []
    if find_spec("xdist"):
        # Most of the time goes into compiling kernels, a process each.
        workers = max(1, min(12, (os.cpu_count() or 1) - 2))
        parallel = ["-n", str(workers), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):
        # A kernel that hangs cannot be interrupted: its process is ended.
        parallel += ["--timeout=40", "--timeout-method=thread"]
    # Tests poison memory in torch's deterministic mode, which refuses matrix products without the
    # second.
    sets = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    steps, left = [], list(files)
    for name, kind, cap in _OP_KINDS:
        chosen = [file for file in left if re.fullmatch(kind, Path(file).stem)]
        left = [file for file in left if file not in chosen]
        if chosen:
            command = pytest_command(chosen, "-m", "gpu", *parallel)
            steps.append(Step(name, command, cap, sets=sets))
    return steps


def op_benchmarks(out: Path, chosen: str) -> list[str]:
    """The rows of the op benchmarks that pytest's `-k chosen` selects."""
    measured = ("--rows", str(out / "ops.jsonl"), "--benchmark-columns=median,iqr")
    folder = str(ROOT / "benchmarks" / "ops")
    return pytest_command([folder], "-k", chosen, *measured, "--benchmark-disable-gc")


def make_stages(out: Path, model: str | None) -> Stages:
    """What there is to do; results go into the folder `out`, and `model` is a folder of MiniLM,
    with weights in any precision, or None."""
    op_tests, model_tests = gpu_tests()
    found = "import torch; assert torch.cuda.is_available(), 'torch finds no GPU';"
    found += "import sbert_fast.kernels, sbert_fast.ops; print(sbert_fast.ops.explain_ops())"
    widen = _python("benchmarks.common.checkpoints", "widen", str(model), WIDE_MODEL)
    ground = _python("benchmarks.ops.ground", "--rows", out / "ground.jsonl")
    models = pytest_command(model_tests, "-m", "gpu")
    return {
        PREPARE: [Step("model in float32", widen, 15)] if model else [],
        "build": [
            Step("machine", ["nvidia-smi"], 10, must=False),
            Step("import", [sys.executable, "-P", "-c", found], 30),
            # Triton needs no native libraries; they make the planner faster and hold the CUDA ops.
            # Where they can be built a failure counts: tests of missing ops are skipped.
            Step("native libraries", _python("tools.gpu.build"), 50, bool(shutil.which("nvcc"))),
        ],
        "ops": op_steps(op_tests),
        "models": [Step("tests", models, 70)] if model_tests else [],
        "kernels": [
            Step("attention", op_benchmarks(out, "attention"), 52),
            Step("rows", op_benchmarks(out, "rows"), 40),
            # Compiled for each shape, which takes longer than all the rest.
            Step("flex", op_benchmarks(out, "flex and short-64"), 23, must=False),
        ],
        "encode": _encode_steps(out, model is not None),
        "sanitize": [Step(tool, _python("tools.gpu.sanitize", tool), 140) for tool in TOOLS],
        "ground": [Step("ground", ground, 240)],
    }


def _encode_steps(out: Path, has_model: bool) -> list[Step]:
    """Both scopes of MiniLM are steps of their own: one that is cut short keeps what it has, for
    rows are stored after one round already."""
    minilm, halves = str(WIDE_MODEL), "bfloat16,float16"

    def step(name: str, cap: float, model: str, corpus: str, texts: int, *rest: str) -> Step:
        command = _python("benchmarks.encode", "--device", "cuda", "--model", model)
        command += ["--corpus", corpus, "--texts", str(texts)]
        command += ["--sweep-texts", str(max(400, texts // 4)), "--rows", str(out / "encode.jsonl")]
        names = ("--scope", "--dtype", "--rounds")
        command += [word for pair in zip(names, rest, strict=True) for word in pair]
        return Step(name, [*command, *(["--tokenizer", minilm] if has_model else [])], cap)

    return [
        step("MiniLM, short, s3", 40, minilm, "short", 8000, "s3", halves, "4"),
        step("MiniLM, short, s1", 30, minilm, "short", 3000, "s1", "float16", "3"),
        step("base, passages", 30, "random-base", "passages", 2000, "s3", halves, "4"),
        step("large, wiki", 35, "random-large", "wiki", 600, "s3", "bfloat16", "3"),
    ]
