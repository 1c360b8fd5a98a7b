"""Stored results: shown, quoted, made of the rows of a GPU check, and followed by `auto`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ROOT, report
from benchmarks.common import provenance
from benchmarks.common.storage import append, write_json
from benchmarks.report import load, main, readme_figures, render
from sbert_fast.bench.names import OURS, OURS_CUDA, REFERENCE
from sbert_fast.ops import schemas
from sbert_fast.ops.choices import CHOICES, Choice


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


def test_pictures_of_stored_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from benchmarks import plots

    assert plots.draw(tmp_path) == []
    shutil.copy(report.RESULTS / "cpu-zen4" / "mixed_lengths.json", tmp_path)
    pictures = [path.read_text(encoding="utf-8") for path in plots.draw(tmp_path)]
    assert len(pictures) == 2
    for text in pictures:
        assert all(words in text for words in (OURS, REFERENCE, "linear layers alone"))


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
    int8 = ROW | {"system": OURS, "precision": "int8", "ratios": {}}
    int8 |= {"worst_cosine": 0.9912, "mean_cosine": 0.99871}
    another = DOCUMENT | {"model": {"name": "another"}, "rows": [int8, *DOCUMENT["rows"]]}
    write_json(another, tmp_path / "cpu" / "another.json")
    (tmp_path / "a-gpu" / "mixed.json").unlink()
    pages = readme_figures(tmp_path)
    assert ["a cpu; another;" in pages, "a cpu; a model;" in pages] == [True, True]
    assert "cosine of int8 with float32, mixed: 0.9912 and 0.9987 sbert-fast." in pages
    assert pages.count("mixed (30 tokens), float32 |") == 2
    bare = [row | {"ratios": {}} for row in DOCUMENT["rows"]]
    write_json(DOCUMENT | {"rows": bare}, tmp_path / "cpu" / "mixed.json")
    assert report.headline(tmp_path) == report.NOT_MEASURED
    assert "x)" not in report.headline_table(tmp_path)


def test_rows_become_stored_documents(tmp_path: Path) -> None:
    run = {"date": DOCUMENT["date"], "commit": None, "source_sha256": "old"}
    run |= {"device": {"name": "a GPU", "kind": "cuda"}, "versions": {"torch": "2", "onnx": None}}
    ours = {"us": 2.0, "floor_fraction": 0.5, "launch_bound": False, "wrong": None}
    op = {"op": "add_norm", "lengths": "short", "state": "cold", "dtype": "float16", "width": 64}
    op |= {"ok": True, "systems": {OURS: ours}, "ratios": {}}
    encoded = {"model": "base", "corpus": "wiki", "scope": "s3", "system": OURS}
    encoded |= {"precision": "bfloat16", "batch": "auto", "sentences_per_s": 9, "tokens_per_s": 1e6}
    now = provenance.source_hash(kind="cuda")
    for file, lines in (("ops", [op]), ("encode", [encoded | {"tokens_per_s": 1.0}, encoded])):
        path = tmp_path / f"{file}.jsonl"
        append(path, "run", run)
        append(path, "row", lines[0] | {"lengths": "of old sources"})
        append(path, "run", run | {"source_sha256": now})
        for line in lines:
            append(path, "row", line)
    stored = tmp_path / "results" / "gpu"
    assert main(["--collect", str(tmp_path), str(stored)]) == 0
    documents: dict[str, Any] = {path.stem: load(path) for path in stored.glob("*.json")}
    rows = {name: document["rows"] for name, document in documents.items()}
    assert rows == {"ops": [op], "encode-base-wiki": [encoded]}, "the last row counts"
    for document in documents.values():
        assert document["commit"] == provenance.commit() and "a GPU" in render(document)
    text = readme_figures(stored.parent)
    assert "add_norm" in text and "base" in text and "benchmarks/results/gpu" in text


def faults(choice: Choice, root: Path = ROOT) -> list[str]:
    """What is wrong with a choice: each is justified by a committed, green result.

    Its result must be of this GPU and of these kernels; of each op and dtype it must hold rows of
    the CUDA kernel, every one of them correct.
    """
    path = root / "benchmarks" / "results" / choice.result
    if not path.is_file():
        return [f"there is no benchmarks/results/{choice.result}"]
    document = load(path)
    kernels = {op for op in schemas.SCHEMAS if "cuda" in schemas.implementations(op)}
    wrong = [f"there is no CUDA op {op}" for op in choice.ops if op not in kernels]
    capability, measured = ".".join(map(str, choice.capability)), document["device"]["capability"]
    if measured != capability:
        wrong.append(f"measured on {measured}, not on {capability}")
    if document.get("kernels_sha256") != provenance.source_hash(root, "cuda kernels"):
        wrong.append("measured with other sources in csrc/cuda")
    for op in choice.ops:
        for dtype in choice.dtypes:
            name = str(dtype).removeprefix("torch.")
            rows = [r for r in document["rows"] if (r.get("op"), r.get("dtype")) == (op, name)]
            rows = [r for r in rows if "us" in r.get("systems", {}).get(OURS_CUDA, {})]
            if not rows or not all(row.get("ok") is True for row in rows):
                wrong.append(f"no green rows of {op} in {name}")
            dims = {row.get("dim") for row in rows}
            wrong += [f"no rows of {op} for D = {d}" for d in choice.head_dims if d not in dims]
    return wrong


def test_every_choice_is_justified() -> None:
    assert {choice: found for choice in CHOICES if (found := faults(choice))} == {}


CHOICE = Choice(("varlen_attention",), (9, 0), (torch.float16,), "h200/ops.json", (64,))
NO_ROWS = "no green rows of varlen_attention in float16"
NO_DIM = "no rows of varlen_attention for D = 64"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"device": {"capability": "8.0"}}, ["measured on 8.0, not on 9.0"]),
        ({"kernels_sha256": "other"}, ["measured with other sources in csrc/cuda"]),
        ({"ok": False}, [NO_ROWS]),
        ({"systems": {}}, [NO_ROWS, NO_DIM]),
        ({"dim": 32}, [NO_DIM]),
    ],
)
def test_a_choice_without_its_result_is_found(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    """Beside a result that justifies `CHOICE`, but for the changes."""
    assert faults(CHOICE, tmp_path) == ["there is no benchmarks/results/h200/ops.json"]
    row = {"op": CHOICE.ops[0], "dtype": "float16", "dim": 64, "ok": True}
    row |= {"systems": {OURS_CUDA: {"us": 1.0, "wrong": None}}} | changes
    kernels = provenance.source_hash(tmp_path, "cuda kernels")
    document = {"device": {"capability": "9.0"}, "kernels_sha256": kernels, "rows": [row]}
    write_json(document | changes, tmp_path / "benchmarks" / "results" / CHOICE.result)
    assert faults(CHOICE, tmp_path) == expected
    unknown = faults(replace(CHOICE, ops=("linear",)), tmp_path)
    assert "there is no CUDA op linear" in unknown
