"""The table that `auto` follows on a GPU: each row is justified by a committed, green result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ROOT
from benchmarks.common import provenance
from benchmarks.common.names import OURS_CUDA
from benchmarks.common.results import write_json
from sbert_fast.ops import schemas
from sbert_fast.ops.choices import CHOICES, Choice


def faults(choice: Choice, root: Path = ROOT) -> list[str]:
    """What is wrong with a row.

    Its result must be of this GPU and of these kernels; of each op and dtype it must hold rows of
    the CUDA kernel, every one of them correct.
    """
    path = root / "benchmarks" / "results" / choice.result
    if not path.is_file():
        return [f"there is no benchmarks/results/{choice.result}"]
    document: dict[str, Any] = json.loads(path.read_text())
    wrong = [f"there is no CUDA op {op}" for op in choice.ops if not _has_kernel(op)]
    capability = ".".join(map(str, choice.capability))
    if document["device"].get("capability") != capability:
        wrong.append(f"measured on {document['device'].get('capability')}, not on {capability}")
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


def _has_kernel(op: str) -> bool:
    return op in schemas.SCHEMAS and "cuda" in schemas.implementations(op)


def test_every_row_is_justified() -> None:
    assert {choice: found for choice in CHOICES if (found := faults(choice))} == {}


ROW = Choice(("varlen_attention",), (9, 0), (torch.float16,), "h200/ops.json", (64,))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with a result that justifies `ROW`."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "attention.cu").write_text("// a kernel")
    row = {"op": "varlen_attention", "dtype": "float16", "dim": 64}
    row |= {"systems": {OURS_CUDA: {"us": 1.0, "wrong": None}}}
    document = {
        "device": {"capability": "9.0"},
        "kernels_sha256": provenance.source_hash(tmp_path, "cuda kernels"),
        "rows": [row | {"ok": True}],
    }
    write_json(document, tmp_path / "benchmarks" / "results" / "h200" / "ops.json")
    return tmp_path


def change(tree: Path, **changes: Any) -> None:
    path = tree / "benchmarks" / "results" / "h200" / "ops.json"
    document = json.loads(path.read_text())
    document["rows"][0] |= changes.pop("row", {})
    write_json(document | changes, path)


def test_a_planted_row_passes(tree: Path) -> None:
    assert faults(ROW, tree) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"device": {"capability": "8.0"}}, "measured on 8.0, not on 9.0"),
        ({"kernels_sha256": "0"}, "measured with other sources in csrc/cuda"),
        ({"row": {"ok": False}}, "no green rows of varlen_attention in float16"),
        ({"row": {"dtype": "bfloat16"}}, "no green rows of varlen_attention in float16"),
        ({"row": {"systems": {}}}, "no green rows of varlen_attention in float16"),
        ({"row": {"dim": 32}}, "no rows of varlen_attention for D = 64"),
    ],
)
def test_a_row_without_its_result_is_found(tree: Path, changes: dict[str, Any], fault: str) -> None:
    change(tree, **changes)
    assert fault in faults(ROW, tree)


def test_a_changed_kernel_is_found(tree: Path) -> None:
    (tree / "csrc" / "cuda" / "attention.cu").write_text("// another kernel")
    assert faults(ROW, tree) == ["measured with other sources in csrc/cuda"]


def test_a_missing_result_is_found(tmp_path: Path) -> None:
    assert faults(ROW, tmp_path) == ["there is no benchmarks/results/h200/ops.json"]


def test_an_op_without_a_kernel_is_found(tree: Path) -> None:
    row = Choice(("linear",), (9, 0), (torch.float16,), "h200/ops.json")
    assert "there is no CUDA op linear" in faults(row, tree)
