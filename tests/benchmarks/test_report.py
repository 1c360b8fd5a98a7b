"""Stored results: shown, quoted by README, and made of the rows of a GPU check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.common import provenance
from benchmarks.common.names import OURS, REFERENCE
from benchmarks.common.results import append, write_json
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


def test_figures_of_results(tmp_path: Path) -> None:
    """What the benchmarks page shows: a row a system, absent peers named, and asides."""
    folder = tmp_path / "cpu-2core"
    assert readme_figures(tmp_path) == report.NOT_MEASURED
    write_json(DOCUMENT, folder / "mixed.json")
    first, _, *lines = readme_figures(tmp_path).splitlines()
    told = "a cpu; a model; torch 2.13.0; 2026-01-02; commit 012345678"
    assert first == f"{told} (benchmarks/results/cpu-2core)"
    assert cells(lines) == [
        ["sentences/s", "mixed (30 tokens), float32"],
        [OURS, "3,000"],
        [REFERENCE, "1,200 (2.50x)"],
        ["openvino", "not measured (absent)"],
    ]

    ours = ROW | {"system": OURS, "ratios": {}, "tokens_per_s": 15_000.0, "p50_ms": 4.25}
    measured = DOCUMENT | {"linear_layers_alone": {"float32": 20_000.0}, "rows": [ours]}
    measured |= {"latency": {"tokens": 16, "rows": [ours]}}
    held = {"texts": 100_000, "corpus": "short", "rows": [ours | {"peak_rss_mb": 1_017.0}]}
    for name, memory in (("mixed", None), ("passages", held)):
        corpus = {"name": name, "lengths": {"mean": 30.0}}
        write_json(measured | {"corpus": corpus, "memory": memory}, folder / f"{name}.json")
    reached = "20,000 tokens/s in float32 (sbert-fast: 15,000, 75%)"
    call = "4.25 ms sbert-fast float32"
    assert readme_figures(tmp_path).splitlines()[-3:] == [
        f"The linear layers alone, mixed: {reached}; passages: {reached}.",
        f"One text of 16 tokens, median call: {call}; another run: {call}.",
        "Peak memory over 100,000 short texts: 1,017 MB sbert-fast float32.",
    ]
    shares = {"linear layers": 0.896, "attention": 0.074, "pooling": 0.004}
    speed = {"fma_peak_gflops": 200.0, "linear_gflops": 180.0, "fma_peak_tokens_per_s": 9_000.0}
    bare = dict.fromkeys(speed) | {"linear_gflops": 180.0}
    rows = [{"precision": "float32", "shares": shares} | speed]
    rows += [{"precision": "bfloat16", "shares": shares} | bare]
    found = {"benchmark": "breakdown", "commit": "fedcba9876543210", "rows": rows}
    write_json(DOCUMENT | found, folder / "breakdown.json")
    first, *_, last = readme_figures(tmp_path).splitlines()
    assert "; commit 012345678, fedcba987 (" in first
    assert last == (
        "Where the time goes, mixed: float32: linear layers 90%, attention 7%; linear layers at "
        "90% of the multiply-add peak, which is 9,000 tokens/s. bfloat16: linear layers 90%, "
        "attention 7%."
    )


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
