"""README: its code runs as printed, its tables agree with the sources, its figures are stored, as
are those of the benchmarks page."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import families
import support
from patched import counts
from sbert_fast import FastEncoder, cli, models, ops
from sbert_fast.data import sample_texts

ROOT = Path(__file__).resolve().parent.parent
README = ROOT.joinpath("README.md").read_text(encoding="utf-8")
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]


@pytest.fixture
def reader(tmp_path: Path, minilm_path: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder: a text file, and the model where its name, as a path, leads to it."""
    (tmp_path / MODEL).parent.mkdir()
    (tmp_path / MODEL).symlink_to(minilm_path)
    (tmp_path / "texts.txt").write_text("A text.\nAnother one.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(header: str) -> list[list[str]]:
    """The cells of the table that starts with `header`, without its head."""
    lines = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_block_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert README.count("```") == 2 * len(BLOCKS)
    # A row a family, a line a machine.
    machines = list(ROOT.glob("benchmarks/results/*/mixed.json"))
    assert len(README.splitlines()) <= 113 + len(models.FAMILIES) + len(machines)


@pytest.mark.parametrize("code", PYTHON, ids=[code.split("\n")[0] for code in PYTHON])
def test_python(code: str, reader: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    lines = [line for line in code.splitlines() if not line.startswith("sbert_fast.restore")]
    exec(compile("\n".join(lines), "README.md", "exec"), names)
    if "accelerate" in code:
        assert counts(names["model"]) == {"packed": 1}
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_the_drop_in_is_short_and_changes_nothing(reader: Path) -> None:
    from sentence_transformers import SentenceTransformer

    drop_in = PYTHON[0]
    assert len([line for line in drop_in.splitlines() if line.strip()]) <= 6
    assert f'FastEncoder("{MODEL}")' in drop_in
    ours: dict[str, object] = {}
    exec(compile(drop_in, "README.md", "exec"), ours)
    theirs: dict[str, object] = {"FastEncoder": SentenceTransformer}
    before = drop_in.replace("from sbert_fast import FastEncoder", "")
    exec(compile(before, "README.md", "exec"), theirs)
    cosine = (ours["embeddings"] * theirs["embeddings"]).sum(axis=1)
    assert 1 - cosine.min() <= 1e-6


def check_make(arguments: list[str]) -> None:
    makefile = ROOT.joinpath("Makefile").read_text(encoding="utf-8")
    for target in arguments:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"the Makefile has no {target}"


def check_pip(arguments: list[str]) -> None:
    """`pip install .` with extras that pyproject.toml defines, or one of its dependencies."""
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    verb, *options, what = arguments
    assert set(options) <= {"--no-build-isolation"}
    if what in project["dependencies"]:
        assert verb == "install"
        return
    found = re.fullmatch(r"\.(?:\[(.+)\])?", what)
    assert verb == "install" and found
    assert found[1] is None or found[1] in extras


def build_modes() -> list[str]:
    """The values of SBERT_FAST_BUILD that setup.py knows."""
    found = re.search(r"^MODES = \((.*)\)$", ROOT.joinpath("setup.py").read_text(), re.MULTILINE)
    assert found
    return re.findall(r"\w+", found[1])


def check_sbert_fast(arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    if "--output" in arguments:
        assert Path(arguments[arguments.index("--output") + 1]).stat().st_size > 0


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "sbert-fast": check_sbert_fast,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, reader: Path) -> None:
    program, *arguments = shlex.split(command, comments=True)
    if program.startswith("SBERT_FAST_BUILD="):
        assert program.partition("=")[2] in build_modes()
        program, *arguments = arguments
    CHECKS[program](arguments)


def test_the_two_commands() -> None:
    assert [c for c in COMMANDS if c.startswith("make")] == ["make demo", "make test"]


SUPPORT = table("| base model")


def test_families_are_those_of_the_registry() -> None:
    assert [row[0].strip("`") for row in SUPPORT] == list(models.FAMILIES)


@pytest.mark.skipif(not ops.extension.CPU.available, reason=str(ops.extension.CPU.reason))
@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_each_family_runs_on(name: str) -> None:
    found = support.row(name)
    assert found in SUPPORT, " | ".join(found)


def test_variables_are_those_that_are_read() -> None:
    sources = [ROOT / "setup.py", *ROOT.glob("sbert_fast/**/*.py"), *ROOT.glob("csrc/**/*.cpp")]
    reads = re.compile(r"(?:environ\.get|environ\[|getenv)\W*(SBERT_FAST_\w+)")
    read = {name for path in sources for name in reads.findall(path.read_text(encoding="utf-8"))}
    assert [row[0].strip("`") for row in table("| variable | meaning |")] == [
        name for name in ("SBERT_FAST_IMPL", "SBERT_FAST_DEBUG", "SBERT_FAST_BUILD") if name in read
    ]
    assert len(read) <= 4


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_figures_are_the_stored_ones() -> None:
    command = [sys.executable, "-m", "benchmarks.report", "--readme", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_figure_stands_outside_the_marks() -> None:
    text = re.sub(r"<!-- (\w+) -->.*?<!-- end of \1 -->", "", README, flags=re.DOTALL)
    assert re.findall(r"\d[\d.,]*\s?(?:x\b|%|ms\b|MB\b|GB\b|sentences/s|tokens/s)", text) == []


def test_gpu_kernels_are_not_measured_until_a_result_is_stored() -> None:
    stored = [json.loads(p.read_text()) for p in ROOT.glob("benchmarks/results/*/*.json")]
    measured = any(document["device"]["kind"] == "cuda" for document in stored)
    head = next(line for line in README.splitlines() if line.startswith("| base model |"))
    assert head.endswith("| Triton (1) | CUDA (1) |")
    assert ("(1) GPU kernels: **not measured yet**" in README) != measured


def test_examples_are_listed() -> None:
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\[(\w+\.py)\]\((\w+\.py)\)", page)
    assert all(name == target for name, target in listed)
    assert sorted(name for name, _ in listed) == sorted(p.name for p in ROOT.glob("examples/*.py"))


@pytest.mark.usefixtures("int8_anywhere")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_promise_of_determinism(dtype: str, minilm_path: str) -> None:
    encoder = FastEncoder(minilm_path, device="cpu", dtype=dtype)
    texts = sample_texts()[:24]
    together = encoder.encode(texts)
    np.testing.assert_array_equal(encoder.encode(texts[::-1])[::-1], together)
    np.testing.assert_array_equal([encoder.encode(text) for text in texts], together)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            np.testing.assert_array_equal(encoder.encode(texts), together)
    finally:
        torch.set_num_threads(threads)
