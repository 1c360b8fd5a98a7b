"""The table that `auto` follows on a GPU: each row is justified by a committed, green result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ROOT
from benchmarks.common import provenance
from benchmarks.common.results import write_json
from benchmarks.common.text import OURS_CUDA
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
NO_ROWS = "no green rows of varlen_attention in float16"
NO_DIM = "no rows of varlen_attention for D = 64"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"device": {"capability": "8.0"}}, ["measured on 8.0, not on 9.0"]),
        ({"kernel": "// another kernel"}, ["measured with other sources in csrc/cuda"]),
        ({"row": {"ok": False}}, [NO_ROWS]),
        ({"row": {"dtype": "bfloat16"}}, [NO_ROWS, NO_DIM]),
        ({"row": {"systems": {}}}, [NO_ROWS, NO_DIM]),
        ({"row": {"dim": 32}}, [NO_DIM]),
        ({"op": "linear"}, ["there is no CUDA op linear"]),
    ],
)
def test_a_row_without_its_result_is_found(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    """In a source tree with a result that justifies `ROW`, but for the changes."""
    assert faults(ROW, tmp_path) == ["there is no benchmarks/results/h200/ops.json"]
    source = tmp_path / "csrc" / "cuda" / "attention.cu"
    source.parent.mkdir(parents=True)
    source.write_text("// a kernel")
    op = changes.get("op", ROW.ops[0])
    row = {"op": op, "dtype": "float16", "dim": 64, "ok": True}
    row |= {"systems": {OURS_CUDA: {"us": 1.0, "wrong": None}}} | changes.get("row", {})
    document = {
        "device": {"capability": "9.0"},
        "kernels_sha256": provenance.source_hash(tmp_path, "cuda kernels"),
        "rows": [row],
    }
    source.write_text(changes.get("kernel", "// a kernel"))
    write_json(document | changes, tmp_path / "benchmarks" / "results" / ROW.result)
    assert faults(replace(ROW, ops=(op,)), tmp_path) == expected
