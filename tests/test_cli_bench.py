"""`sbert-fast bench`: a run over a tiny model, what it stores and draws, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from families import make_sentence_transformer, make_texts
from sbert_fast.bench import machine, measure, runtimes, systems
from sbert_fast.bench.checkpoint import Checkpoint
from sbert_fast.cli import bench, main

HELD = {"loaded_rss_mb": 1.0, "peak_rss_mb": 2.0, "seconds": 1.0}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    make_sentence_transformer().save(path)
    return path


@pytest.fixture
def run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command in this process, which it does not pin, without processes for memory."""
    monkeypatch.setattr(machine, "pin", lambda threads: None)
    monkeypatch.setattr(measure, "memory_of", lambda *_, **__: HELD)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(12)), encoding="utf-8")
    few = ("--threads", "1", "--rounds", "1", "--peers", "")
    return lambda *chosen: main(["bench", model, *few, *chosen])


def test_a_run(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    assert run("--corpus", "texts.txt", "--dtype", "float32", "--json", "out.json") == 0
    told, progress = capsys.readouterr()
    document = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert document["corpus"]["name"] == "texts.txt" and document["corpus"]["texts"] == 12
    assert {row["system"] for row in document["rows"]} == {"sbert-fast", "sentence-transformers"}
    assert len(document["latency"]["rows"]) == 3 and len(document["by_length"]["rows"]) == 2
    assert document["gates"]["float32"]["green"]
    for words in ("| sbert-fast ", "correctness float32: green", "| linear layers alone", "p95"):
        assert words in told
    for words in ("busy (load average 9.00)", "round 1 of 1", "results: out.json"):
        assert words in progress


def test_what_cannot_run_here_is_told(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr("sbert_fast.bench.runtimes.importlib.util.find_spec", lambda name: None)
    chosen = ("--dtype", "float32", "--peers", "openvino", "--json", "out.json")
    assert run("--texts", "8", *chosen) == 0
    told, progress = capsys.readouterr()
    assert "not measured (not installed)" in told
    assert "none of onnxruntime, openvino, zentorch is installed: pip install" in progress


@pytest.mark.parametrize(
    ("dtypes", "code", "told"),
    [
        ("float32,int8", 0, "not measured (no instructions for int8)"),
        ("int8", 1, "sbert-fast int8 is not measured (no instructions for int8)"),
    ],
)
def test_a_dtype_that_does_not_run_is_told(
    dtypes: str,
    code: int,
    told: str,
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class WithoutInt8(systems.Packed):
        def __init__(self, folder: Checkpoint, precision: str, **how: Any) -> None:
            if precision == "int8":
                raise systems.NotAvailable("no instructions for int8")
            super().__init__(folder, precision, **how)

    monkeypatch.setattr(runtimes, "Packed", WithoutInt8)
    assert run("--texts", "8", "--dtype", dtypes) == code
    assert told in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "there is no text in it"),
        (b"\n \n", "there is no text in it"),
        (PNG, "byte 1 is not UTF-8"),
        (b"a\0b\n", "it holds NUL characters, as binary files do"),
        (None, "--corpus must be a file with one text per line, or one of short, "),
    ],
)
def test_a_bad_corpus_is_refused(
    content: bytes | None, told: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("corpus").write_bytes(content)
    assert run("--corpus", "corpus") == 1
    error = capsys.readouterr().err
    assert error.startswith("sbert-fast: error: --corpus must be ") and told in error


@pytest.mark.parametrize(
    ("chosen", "code", "told"),
    [
        (("--dtype", "fp8"), 2, "--dtype must be some of float32, bfloat16, int8, got fp8"),
        (("--peers", "tei"), 2, "--peers must be some of onnxruntime, openvino, zentorch, "),
        (("--json", "gone/out.json"), 1, "the folder gone does not exist"),
        (("--json", "-"), 1, "--json must be a file, got '-'"),
        (("--json", ""), 1, "--json must be a file, got ''"),
        (("--json", "/proc/out.json"), 1, "error: /proc/"),
        (("--plots", "texts.txt"), 1, "--plots must be a folder, got the file texts.txt"),
        (("--plots", "plots"), 1, "--plots needs matplotlib: pip install 'sbert-fast[plots]'"),
    ],
)
def test_other_bad_arguments(
    chosen: tuple[str, ...],
    code: int,
    told: str,
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert run(*chosen) == code
    assert told in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_refused(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tmp_path), "--threads", "1", "--peers", ""]) == 1
    assert "must be a folder with config.json, modules.json, tokeni" in capsys.readouterr().err


def test_pictures(run: Callable[..., int]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert run("--texts", "8", "--dtype", "float32", "--plots", "drawn") == 0
    for name in ("throughput", "latency"):
        picture = Path("drawn", f"{name}.svg").read_text(encoding="utf-8")
        assert "sentence-transformers" in picture and "<svg" in picture
