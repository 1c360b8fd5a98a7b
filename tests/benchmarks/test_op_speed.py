"""The op benchmarks, run on a CPU with tiny inputs: what they compute, check and show.

Some run on the emulated CUDA ops; where only their place counts, other ops stand in for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import pages, stopwatch, storage
from benchmarks.common.pages import COPY
from benchmarks.ops import cases, ground, peers
from benchmarks.ops.peers import CUDNN, EAGER, FA3, FLEX, SDPA, VARLEN
from benchmarks.ops.test_speed import ROW_OPS, check, measure
from sbert_fast.bench.names import OURS, OURS_CUDA

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = [5, 40, 1, 16, 33, 130, 17]
ATTENTION = {"lengths": "16", "state": "cold", "dtype": "bfloat16", "dim": 32}


def add_norm(*others: str) -> cases.Case:
    return cases.row_case("add_norm", CPU, torch.float32, LENGTHS, 64, 1, others)


def shown(row: dict[str, Any]) -> str:
    return "\n".join(pages.ops([ATTENTION | row]))


@pytest.mark.parametrize("name", ["16", "512", "short", "passages", "wiki", "mixed", "uniform"])
def test_lengths_make_the_tokens_asked_for(name: str) -> None:
    lengths = cases.lengths_of(name, 65_536)
    assert abs(sum(lengths) / 65_536 - 1) < 0.03
    assert cases.lengths_of(name, 65_536) == lengths
    assert min(lengths) >= 1 and cases.lengths_of(name, 1)


@pytest.mark.parametrize("dim", [32, 64])
def test_attention_and_its_peers_agree(dim: int) -> None:
    case = cases.attention_case(CPU, torch.float32, LENGTHS, dim, 2, (SDPA, FLEX, VARLEN))
    wrong = check(case)
    assert wrong == {OURS: None, SDPA: None, FLEX: None}
    assert set(case.missing) == {VARLEN}, "it has no kernel for a CPU"
    assert case.moved_bytes == sum(LENGTHS) * 12 * dim * 4 * 4
    first, second = (peers.as_packed(case.systems[SDPA](i)) for i in range(2))
    assert not torch.equal(first, second)


def test_documents_are_masked_block_by_block() -> None:
    lengths = [100, 1, 200, 128, 30, 300]
    mask = peers.document_mask(lengths, CPU)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens, block = sum(lengths), 128
    same = torch.nn.functional.pad(owner[:, None] == owner, (0, -tokens % block) * 2)
    blocks = same.shape[0] // block
    needed = same.view(blocks, block, blocks, block).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), needed)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_and_their_peers_agree(op: str, dtype: torch.dtype) -> None:
    case = cases.row_case(op, CPU, dtype, LENGTHS, 64, 2, (EAGER,))
    wrong = check(case)
    assert wrong[OURS] is None and case.missing == {}
    assert wrong[EAGER] is None or dtype == torch.bfloat16
    eager = peers.as_packed(case.systems[EAGER](1))
    assert eager.shape == case.systems[OURS](1).shape


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("op", ["varlen_attention", *ROW_OPS])
def test_both_of_ours_are_checked_timed_and_compared(op: str) -> None:
    dtype, few = torch.bfloat16, LENGTHS[:5]
    peer = SDPA if op == "varlen_attention" else EAGER
    if op == "varlen_attention":
        case = cases.attention_case(CPU, dtype, few, 32, 2, (peer,))
    else:
        case = cases.row_case(op, CPU, dtype, few, 64, 2, (peer,))
    assert case.ours == (OURS, OURS_CUDA) and set(case.systems) == {OURS, OURS_CUDA, peer, COPY}
    row = measure(case, CPU, 1e10, samples=2)
    assert row["ok"], row["systems"]
    assert set(row["ratios"]) == {OURS_CUDA, peer, COPY}
    assert set(row["ratios_cuda"]) == {OURS, peer, COPY}
    assert row["ratios"][OURS_CUDA] > row["ratios_cuda"][OURS] > 0, "an emulator is slow"
    json.dumps(row)


def test_the_figures_of_a_row() -> None:
    row = measure(add_norm(EAGER), CPU, 1e10, samples=2)
    assert row["ok"] and set(row["ratios"]) == {EAGER, COPY} and "ratios_cuda" not in row
    ours = row["systems"][OURS]
    assert ours["floor_fraction"] == pytest.approx(row["floor_us"] / ours["us"])
    assert ours["tokens_per_s"] == pytest.approx(sum(LENGTHS) / ours["us"] * 1e6)
    assert "| yes " in shown(row)


@pytest.mark.parametrize("both", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda true: lambda i: true(i) * 1.01, "is over the bound"),
        (lambda true: lambda i: torch.empty_like(true(i)), "not written"),
        (lambda true: lambda i: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "unwritten", "failing"],
)
def test_what_is_wrong_has_no_ratios(fault: Any, told: str, both: bool) -> None:
    """And the other one of ours is not compared with it."""
    case = add_norm(EAGER)
    true = case.systems[OURS]
    broken = OURS_CUDA if both else OURS
    if both:
        case.ours = (OURS, OURS_CUDA)
    case.systems[broken] = fault(true)
    row = measure(case, CPU, 1e10, samples=2)
    figures = row["systems"][broken]
    assert not row["ok"] and told in (figures.get("wrong") or figures["error"])
    assert row["ratios_cuda" if both else "ratios"] == {}
    assert not both or set(row["ratios"]) == {EAGER, COPY}
    assert ("| NO " in shown(row)) == (both or "wrong" in figures)
    assert " !" in shown(row) or told in shown(row)
    assert "ERROR no case" in shown({"error": "no case"})


def test_an_unwritten_result_is_wrong_even_in_reused_memory() -> None:
    case = add_norm()
    kept, case.ours = case.systems[OURS](0), (OURS, OURS_CUDA)
    case.systems[OURS] = case.systems[OURS_CUDA] = lambda i: kept
    found = check(case)
    assert found[OURS] is None and "not written" in str(found[OURS_CUDA])


@pytest.mark.parametrize("reason", ["sbert_fast/_C_cuda was not built", None])
def test_what_a_gpu_cannot_run_is_told(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = add_norm()
    assert case.ours == (OURS,) and not case.absent, "nobody expects it on a CPU"
    monkeypatch.setattr(cases.ops, "refusal", lambda *_: reason)
    cases._expect_cuda(case, GPU, torch.float16, None)
    row = measure(case, CPU, 1e10, samples=1)
    if reason is None:
        assert case.ours == (OURS, OURS_CUDA) and not row["ok"], "it is to run, and did not"
        return
    assert row["ok"] and "ratios_cuda" not in row
    assert row["systems"][OURS_CUDA] == {"missing": reason}
    assert f"{OURS_CUDA}: not measured: {reason}" in shown(row) and "cuda us" not in shown(row)


def figures(us: float) -> dict[str, Any]:
    return {"us": us, "floor_fraction": 0.5, "launch_bound": False, "wrong": None}


def test_the_table_has_both_within_200_columns() -> None:
    peers = {"varlen_attn": 2, "padded SDPA": 3, CUDNN: 4, "FlexAttention": 5, COPY: 1}
    paces = {OURS: 2, OURS_CUDA: 1} | peers
    row = ATTENTION | {"op": "varlen_attention", "lengths": "passages", "ok": True}
    row["systems"] = {name: figures(1000.0 * pace) for name, pace in paces.items()}
    row["systems"][FA3] = {"error": "No module named 'flash_attn_interface'"}
    for name, ours in (("ratios", OURS), ("ratios_cuda", OURS_CUDA)):
        row[name] = {peer: pace / paces[ours] for peer, pace in paces.items() if peer != ours}
    other = {key: value for key, value in row.items() if key != "dim"} | {"op": "add_norm"}
    table, second = "\n".join(pages.ops([row, other])).split("\n\n| op ")
    header, _, cells, *told = table.splitlines()
    names, values = ([c.strip() for c in line.split(" | ")] for line in (header, cells))
    columns = dict(zip(names, values, strict=True))
    assert columns["cuda us"] == "1000" and columns["cuda is"] == "2.00x"
    assert columns["varlen_attn"] == "2000 (1.00x 2.00x)" and "add_norm" in second
    assert max(map(len, [header, cells])) <= 200
    assert f"{FA3}: error: No module named 'flash_attn_interface'" in told


@pytest.mark.parametrize("count", [1, 3])
def test_long_sequences_are_compared_by_two_heads(count: int) -> None:
    lengths = [1500] * count
    case = cases.attention_case(CPU, torch.float32, lengths, 8, 1, ())
    assert case.heads == [0, 11] and case.checked[0].shape[2] == 2
    assert case.rows[-1] == sum(lengths) - 1 and (case.rows[0] == 0)
    assert check(case) == {OURS: None}
    true = case.systems[OURS]
    for head, seen in ((11, True), (5, False)):
        case.systems[OURS] = lambda i, head=head: true(i).index_fill(1, torch.tensor(head), 9.0)
        assert (check(case)[OURS] is not None) == seen


def test_flash_attention_is_switched_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    attention = torch.nn.attention
    monkeypatch.setattr(attention, "activate_flash_attention_impl", done.append, raising=False)
    restore = lambda: done.append("default")  # noqa: E731
    monkeypatch.setattr(attention, "restore_flash_attention_impl", restore, raising=False)
    monkeypatch.setattr(peers, "_varlen", lambda *_: lambda: "packed")
    call = peers.makers("varlen_attention", [4])[FA3]()
    with stopwatch.context_of(call):
        assert done == ["FA3", "default", "FA3"] and call() == "packed"
    assert done[3:] == ["default"]
    monkeypatch.delattr(attention, "activate_flash_attention_impl")
    case = cases.attention_case(CPU, torch.float32, [4], 8, 1, (FA3, CUDNN))
    assert "has no activate_flash_attention_impl" in case.missing[FA3]
    assert "cuDNN has no attention for a CPU" in case.missing[CUDNN]


def test_ground_keeps_figures_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground.Ground, "_copy", lambda *_: 1 / 0)
    assert ground.main(["--rows", str(tmp_path / "rows")]) == 1
    first, failed, *rows = storage.read(tmp_path / "rows")
    assert first["benchmark"] == "ground" and failed["error"].startswith("ZeroDivisionError")
    assert {row["what"] for row in rows} == {"gemm", "launch"}
    assert all(row["value"] > 0 for row in rows)
