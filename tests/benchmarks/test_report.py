"""Stored results: shown, quoted by README, and made of the rows of a GPU check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.common import provenance
from benchmarks.common.results import append, write_json
from benchmarks.common.text import OURS, REFERENCE
from benchmarks.report import load, main, readme_figures, render


def test_stored_results_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(report.RESULTS.glob("*/*.json"))
    assert main([*map(str, files)]) == 0
    shown = capsys.readouterr().out.split("## ")[1:]
    assert len(shown) == len(files) and all(OURS in text for text in shown)
    with pytest.raises(SystemExit):
        main([])


def test_pages_are_rewritten_between_their_marks(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for page, parts in report.PAGES.items():
        marks = [f"<!-- {name} -->\nold\n<!-- end of {name} -->" for name in parts]
        (tmp_path / page).write_text("before\n" + "\nbetween\n".join(marks) + "\nafter\n")
    assert not report.write_pages(tmp_path, check=True)
    assert "old" in (tmp_path / "README.md").read_text()
    report.write_pages(tmp_path)
    assert report.write_pages(tmp_path, check=True)
    for page in report.PAGES:
        text = (tmp_path / page).read_text()
        assert report.NOT_MEASURED in text and "old" not in text
        assert text.startswith("before\n") and text.endswith("\nafter\n")
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match=r"README.md must hold the marks <!-- headline -->"):
        report.write_pages(tmp_path)


ROW = {"precision": "float32", "status": "measured", "sentences_per_s": 3000.0}
ABSENT = {"system": "openvino", "precision": "float32", "status": "not measured (absent)"}
DOCUMENT = {
    "gates": {},
    "device": {"name": "a cpu", "kind": "cpu"},
    "model": {"name": "a model"},
    "versions": {"torch": "2.13.0"},
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "corpus": {"name": "mixed", "lengths": {"mean": 30.1}},
    "rows": [
        ROW | {"system": OURS, "ratios": {}},
        ROW | {"system": REFERENCE, "sentences_per_s": 1200.0, "ratios": {"float32": 2.5}},
        ABSENT,
    ],
}


def cells(lines: list[str]) -> list[list[str]]:
    """Of a Markdown table, without the line below its header."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def test_headline_of_results(tmp_path: Path) -> None:
    """One sentence and one table: red gates bare, absent systems named, GPUs elsewhere."""
    assert report.headline(tmp_path) == report.headline_table(tmp_path) == report.NOT_MEASURED
    assert readme_figures(tmp_path) == report.NOT_MEASURED
    write_json(DOCUMENT, tmp_path / "cpu" / "mixed.json")
    on_gpu = {"device": {"name": "a GPU", "kind": "cuda"}}
    write_json(DOCUMENT | on_gpu, tmp_path / "a-gpu" / "mixed.json")
    assert report.headline(tmp_path).startswith(
        "3,000 sentences/s against 1,200 in float32 (**2.50x**): all-MiniLM-L6-v2 on a cpu, "
    )
    lines = report.headline_table(tmp_path).splitlines()
    assert cells(lines[:5]) == [
        ["sentences/s", "float32 (1)"],
        [OURS, "3,000"],
        [REFERENCE, "1,200 (2.50x)"],
        ["openvino", "not measured"],
    ]
    assert lines[-1] == "(1) a cpu; torch 2.13.0; 2026-01-02; commit 012345678."
    bare = [row | {"ratios": {}} for row in DOCUMENT["rows"]]
    write_json(DOCUMENT | {"rows": bare}, tmp_path / "cpu" / "mixed.json")
    assert report.headline(tmp_path) == report.NOT_MEASURED
    assert "x)" not in report.headline_table(tmp_path)


def test_rows_become_stored_documents(tmp_path: Path) -> None:
    run = {"date": DOCUMENT["date"], "commit": None, "source_sha256": "old"}
    run |= {"device": {"name": "a GPU", "kind": "cuda"}, "versions": {"torch": "2", "onnx": None}}
    ours = {"us": 2.0, "floor_fraction": 0.5, "tokens_per_s": 1e6, "launch_bound": False}
    op = {"op": "add_norm", "lengths": "short", "state": "cold", "dtype": "float16", "width": 64}
    op |= {"ok": True, "systems": {OURS: ours | {"wrong": None}}, "ratios": {}}
    encoded = {"model": "base", "corpus": "wiki", "scope": "s3", "system": OURS}
    encoded |= {"precision": "bfloat16", "batch": "auto", "sentences_per_s": 9, "tokens_per_s": 1e6}
    now = provenance.source_hash(kind="cuda")
    for file, line in (("ops", op), ("encode", encoded)):
        path = tmp_path / f"{file}.jsonl"
        append(path, "run", run | {"benchmark": file})
        append(path, "row", line | {"benchmark": file, "lengths": "of old sources"})
        append(path, "run", run | {"benchmark": file, "source_sha256": now})
        if file == "encode":
            append(path, "row", line | {"benchmark": file, "tokens_per_s": 1.0})
        append(path, "row", line | {"benchmark": file})
    stored = tmp_path / "results" / "gpu"
    assert main(["--collect", str(tmp_path), str(stored)]) == 0
    documents: dict[str, Any] = {path.stem: load(path) for path in stored.glob("*.json")}
    assert set(documents) == {"ops", "encode-base-wiki"}
    for document in documents.values():
        assert len(document["rows"]) == 1 and document["commit"] == provenance.commit()
        assert "a GPU" in render(document)
    assert documents["encode-base-wiki"]["rows"][0]["tokens_per_s"] == 1e6, "the last one counts"
    text = readme_figures(stored.parent)
    assert "add_norm" in text and "base" in text and "benchmarks/results/gpu" in text
