"""Benchmarks for a GPU without one: ours in CUDA C++ beside ours in Triton.

Some run on the emulated CUDA ops; where only the place counts, other ops stand in for them.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cuda_emulation
import families
from sbert_fast import ops
from sbert_fast.ops import extension

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import encode  # noqa: E402
import gate  # noqa: E402
import gpu_encode  # noqa: E402
import gpu_report  # noqa: E402
import gpu_systems  # noqa: E402
import models  # noqa: E402
import op_peers  # noqa: E402
import op_rows  # noqa: E402
import op_systems  # noqa: E402
import provenance  # noqa: E402
import rows  # noqa: E402
import stopwatch  # noqa: E402
import test_op_speed  # noqa: E402
from op_peers import CUDNN, EAGER, FA3, FA4, SDPA  # noqa: E402
from padded import ModelFolder  # noqa: E402
from report import OURS, OURS_CUDA, REFERENCE  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = [5, 40, 1, 16, 33, 130, 17]
ATTENTION = {"lengths": "16", "state": "cold", "dtype": "bfloat16", "dim": 32}
COPY = op_systems.COPY


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA ops compiled for a CPU."""
    if (reason := cuda_emulation.unavailable()) is not None:
        pytest.skip(reason)
    loaded = extension.load_emulated_cuda(cuda_emulation.library())
    assert loaded.available, loaded.reason
    monkeypatch.setattr(extension, "CUDA", loaded)


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("op", ["varlen_attention", *test_op_speed.ROW_OPS])
def test_both_are_checked_timed_and_compared(op: str) -> None:
    dtype, few = torch.bfloat16, LENGTHS[:5]
    if op == "varlen_attention":
        case = op_systems.attention_case(CPU, dtype, few, 32, 2, (SDPA,))
    else:
        case = op_systems.row_case(op, CPU, dtype, few, 64, 2, (EAGER,))
    peer = SDPA if op == "varlen_attention" else EAGER
    assert case.ours == (OURS, OURS_CUDA) and set(case.systems) == {OURS, OURS_CUDA, peer, COPY}
    row = op_rows.measure(case, CPU, 1e10, samples=2)
    assert row["ok"], row["systems"]
    for name in (OURS, OURS_CUDA):
        assert row["systems"][name]["us"] > 0 and row["systems"][name]["wrong"] is None
    assert set(row["ratios"]) == {OURS_CUDA, peer, COPY}
    assert set(row["ratios_cuda"]) == {OURS, peer, COPY}
    assert row["ratios"][OURS_CUDA] > row["ratios_cuda"][OURS] > 0, "an emulator is slow"
    json.dumps(row)


def two(op: str = "add_norm") -> op_systems.Case:
    """A case whose op stands in for the CUDA op too."""
    case = op_systems.row_case(op, CPU, torch.float32, LENGTHS, 64, 1, (EAGER,))
    case.ours, case.systems[OURS_CUDA] = (OURS, OURS_CUDA), case.systems[OURS]
    return case


@pytest.mark.parametrize(("broken", "other"), [(OURS, OURS_CUDA), (OURS_CUDA, OURS)])
def test_one_that_is_wrong_has_no_ratios(broken: str, other: str) -> None:
    case = two()
    true = case.systems[broken]
    case.systems[broken] = lambda i: true(i) * 1.01
    row = op_rows.measure(case, CPU, 1e10, samples=2)
    ratios = {OURS: row["ratios"], OURS_CUDA: row["ratios_cuda"]}
    assert not row["ok"] and ratios[broken] == {}
    assert set(ratios[other]) == {EAGER, COPY}, "and the other is not compared with it"
    assert "is over the bound" in row["systems"][broken]["wrong"]
    text = "\n".join(gpu_report.ops([ATTENTION | row]))
    assert "| NO " in text and " !" in text


def test_one_that_fails_turns_the_row_red() -> None:
    case = two()
    case.systems[OURS_CUDA] = lambda i: 1 / 0
    row = op_rows.measure(case, CPU, 1e10, samples=2)
    assert row["systems"][OURS_CUDA] == {"error": "ZeroDivisionError: division by zero"}
    assert not row["ok"] and set(row["ratios"]) == {EAGER, COPY} and row["ratios_cuda"] == {}
    text = "\n".join(gpu_report.ops([ATTENTION | row]))
    assert "| ERROR " in text and f"{OURS_CUDA}: error: ZeroDivisionError" in text


def test_an_unwritten_result_is_wrong_even_in_reused_memory() -> None:
    case = two()
    kept = case.systems[OURS](0)
    case.systems[OURS] = case.systems[OURS_CUDA] = lambda i: kept
    found = op_rows.check(case)
    assert found[OURS] is None and "not written" in str(found[OURS_CUDA])


@pytest.mark.parametrize("reason", ["sbert_fast/_C_cuda was not built", None])
def test_what_a_gpu_cannot_run_is_told(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = op_systems.row_case("add_norm", CPU, torch.float32, LENGTHS, 64, 1, ())
    assert case.ours == (OURS,) and not case.absent, "nobody expects it on a CPU"
    monkeypatch.setattr(op_systems.ops, "rejection", lambda *_: reason)
    op_systems._expect_cuda(case, GPU, torch.float16, None)
    if reason is None:
        assert case.ours == (OURS, OURS_CUDA)
        assert not op_rows.measure(case, CPU, 1e10, samples=1)["ok"], "it is to run, and did not"
        return
    row = op_rows.measure(case, CPU, 1e10, samples=1)
    assert row["ok"] and "ratios_cuda" not in row
    assert row["systems"][OURS_CUDA] == {"missing": reason}
    text = "\n".join(gpu_report.ops([ATTENTION | row]))
    assert f"{OURS_CUDA}: not measured: {reason}" in text and "cuda us" not in text


def figures(us: float, **more: Any) -> dict[str, Any]:
    made = {"us": us, "floor_fraction": 0.5, "tokens_per_s": 1e6, "launch_bound": False}
    return made | {"wrong": None} | more


def test_the_table_has_both_within_200_columns() -> None:
    peers = {"varlen_attn": 2, "padded SDPA": 3, CUDNN: 4, "FlexAttention": 5, COPY: 1}
    row = ATTENTION | {"op": "varlen_attention", "lengths": "passages", "ok": True}
    row["systems"] = {OURS: figures(2000.0), OURS_CUDA: figures(1000.0)}
    row["systems"] |= {name: figures(1000.0 * times) for name, times in peers.items()}
    row["systems"][FA3] = {"error": "No module named 'flash_attn_interface'"}
    row["ratios"] = {name: times / 2 for name, times in peers.items()} | {OURS_CUDA: 0.5}
    row["ratios_cuda"] = peers | {OURS: 2.0}
    other = row | {"op": "add_norm", "width": 384, "lengths": "short"}
    del other["dim"]
    table, second = "\n".join(gpu_report.ops([row, other])).split("\n\n| op ")
    header, _, cells, *told = table.splitlines()
    columns = dict(zip(header.split(" | "), cells.split(" | "), strict=True))
    assert columns["cuda us"].strip() == "1000" and columns["cuda is"].strip() == "2.00x"
    assert columns["varlen_attn".ljust(18)].strip() == "2000 (1.00x 2.00x)"
    assert max(map(len, [header, cells])) <= 200 and "add_norm" in second
    assert f"{FA3}: error: No module named 'flash_attn_interface'" in told


def test_the_rows_of_attention() -> None:
    made = [row.values for row in test_op_speed._attention_rows()]
    assert len({row.id for row in test_op_speed._attention_rows()}) == len(made)
    first = [row[0] == "cold" and row[1] == torch.float16 for row in made]
    assert first == sorted(first, reverse=True), "what tells most comes first"
    lengths = {(state, dim): set() for state in ("cold", "hot") for dim in (32, 64)}
    for state, _, name, dim in made:
        lengths[state, dim].add(name)
    assert {"16", "1024", "2048", "4096", "wiki"} <= lengths["cold", 64] == lengths["cold", 32]
    assert lengths["hot", 32] - lengths["hot", 64] == {"1024", "2048", "4096"}


@pytest.mark.parametrize("count", [1, 3])
def test_long_sequences_are_compared_by_two_heads(count: int) -> None:
    lengths = [1500] * count
    case = op_systems.attention_case(CPU, torch.float32, lengths, 8, 1, ())
    assert case.heads == [0, 11] and case.checked[0].shape[2] == 2
    assert case.rows[-1] == sum(lengths) - 1 and (case.rows[0] == 0)
    assert op_rows.check(case) == {OURS: None}
    true = case.systems[OURS]
    for head, seen in ((11, True), (5, False)):
        case.systems[OURS] = lambda i, head=head: true(i).index_fill(1, torch.tensor(head), 9.0)
        assert (op_rows.check(case)[OURS] is not None) == seen


def test_a_call_runs_inside_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def around(name: str) -> Any:
        seen.append(f"into {name}")
        yield
        seen.append(f"out of {name}")

    class Inside:
        def __init__(self, name: str) -> None:
            self.name = name

        def context(self) -> Any:
            return around(self.name)

        def __call__(self, i: int) -> None:
            assert seen[-1] == f"into {self.name}"

    systems = {"a": Inside("a"), "b": Inside("b")}
    timings = stopwatch.take_turns(systems, 2, CPU, samples=3)
    assert not any(timing.error for timing in timings.values())
    assert seen == ["into a", "out of a", "into b", "out of b"] * 4, "warm-up and three samples"


def test_flash_attention_is_switched_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    attention = torch.nn.attention
    monkeypatch.setattr(attention, "activate_flash_attention_impl", done.append, raising=False)
    restore = lambda: done.append("default")  # noqa: E731
    monkeypatch.setattr(attention, "restore_flash_attention_impl", restore, raising=False)
    monkeypatch.setattr(op_peers, "_varlen", lambda *_: lambda: "packed")
    call = op_peers.makers("varlen_attention", [4])[FA3]()
    assert done == ["FA3", "default"]
    with stopwatch.context_of(call):
        assert done[2:] == ["FA3"] and call() == "packed"
    assert done[2:] == ["FA3", "default"]


def test_optional_peers_say_why_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = op_systems.attention_case(CPU, torch.float32, [4], 8, 1, (FA3, FA4, CUDNN))
    assert set(case.missing) == {FA3, FA4, CUDNN} and all(case.missing.values())
    assert "cuDNN has no attention for a CPU" in case.missing[CUDNN]
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl", raising=False)
    case = op_systems.attention_case(CPU, torch.float32, [4], 8, 1, (FA3,))
    assert "has no activate_flash_attention_impl" in case.missing[FA3]


def test_sources_of_a_gpu_include_cuda(tmp_path: Path) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    seen = {provenance.source_hash(tmp_path, "cuda")}
    for name in ("attention.cu", "attention.cuh", "ops.cpp", "params.h"):
        folder.joinpath(name).write_text("// code")
        seen.add(provenance.source_hash(tmp_path, "cuda"))
    assert len(seen) == 5


def test_each_of_ours_has_a_gate() -> None:
    exact = np.eye(3, dtype=np.float32)
    near, far = exact + 1e-3, exact + 1e-1
    embeddings = {(REFERENCE, "float32"): exact, (REFERENCE, "float16"): near}
    embeddings |= {(OURS, "float16"): near, (OURS_CUDA, "float16"): far}
    gates = {
        (name, "float16"): gate.check(embeddings, ["float16"], name)["float16"]
        for name in (OURS, OURS_CUDA)
    }
    assert gates[OURS, "float16"]["green"] and not gates[OURS_CUDA, "float16"]["green"]

    def system(name: str, seconds: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, precision="float16", seconds=[seconds] * 2)

    ours, cuda, peer = system(OURS, 2.0), system(OURS_CUDA, 1.0), system(REFERENCE, 4.0)
    running = [ours, cuda, peer]
    assert gate.ratios(OURS, peer, running, gates) == {"float16": 2.0}
    assert gate.ratios(OURS_CUDA, peer, running, gates) == {}
    assert gate.ratios(OURS, cuda, running, gates) == {}
    gates[OURS_CUDA, "float16"] = gates[OURS, "float16"]
    assert gate.ratios(OURS_CUDA, peer, running, gates) == {"float16": 4.0}
    assert gate.ratios(OURS_CUDA, ours, running, gates) == {"float16": 2.0}
    assert gate.ratios(OURS, cuda, running, gates) == {"float16": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A tiny BERT with random weights."""
    scratch = tmp_path_factory.mktemp("model")
    families.make_tokenizer("bert").save_pretrained(scratch / "tokenizer")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 96, "max_position_embeddings": 64}
    models.make_random("random-tiny", scratch / "tokenizer", scratch / "model", sizes)
    return ModelFolder(scratch / "model", threads=1)


@pytest.fixture
def run(folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark of one scope; the exit code and the rows by system and precision."""
    monkeypatch.setattr(gpu_encode, "_SAMPLE_SECONDS", 1e-4)
    stored = tmp_path / "rows.jsonl"

    def once(*precisions: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
        made: Namespace = encode.parse_args(["--device", "cuda", "--model", str(folder.path)])
        few = {"texts": 12, "sweep_texts": 8, "rounds": 2, "device": "cpu", "rows": stored}
        few |= {"dtype": list(precisions), "scope": ["s3"], "peers": [REFERENCE]}
        vars(made).update(few)
        code = gpu_encode.main(made)
        lines = [line for line in rows.read(stored) if line["kind"] != "run"]
        return code, {(line["system"], line["precision"]): line for line in lines}

    return once


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, scale: float = 1.0) -> None:
    """Ours stands in for ours in CUDA C++; with a `scale` its embeddings are wrong."""

    class Pretended(gpu_systems.Packed):
        def stage(self, tokens: gpu_systems.Tokens, batch_size: int) -> gpu_systems.Staged:
            staged = super().stage(tokens, batch_size)
            true = staged.run
            staged.run = lambda: true() * torch.linspace(1, scale, 64)
            return staged

    def reason(device: torch.device, dtype: torch.dtype) -> str | None:
        return "" if dtype == torch.float32 else None

    monkeypatch.setattr(gpu_encode, "cuda_ops", reason)
    monkeypatch.setitem(gpu_systems.SYSTEMS, OURS_CUDA, Pretended)


@pytest.mark.slow
def test_encode_compares_both(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch)
    code, found = run("float32", "bfloat16")
    assert code == 0
    assert set(found) == {
        *((OURS, "float32"), (REFERENCE, "float32")),
        *((OURS, "bfloat16"), (OURS_CUDA, "bfloat16"), (REFERENCE, "bfloat16")),
    }
    peer = found[REFERENCE, "bfloat16"]
    assert set(peer["ratios"]) == {"float32", "bfloat16"}
    assert set(peer["ratios_cuda"]) == {"bfloat16"}
    assert set(found[OURS, "bfloat16"]["ratios_cuda"]) == {"bfloat16"}
    assert set(found[OURS_CUDA, "bfloat16"]["ratios"]) == {"float32", "bfloat16"}
    assert found[OURS_CUDA, "bfloat16"]["gate"]["green"]
    text = "\n".join(gpu_report.encode(list(found.values())))
    assert f"{OURS_CUDA} is faster by" in text


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
def test_encode_runs_the_cuda_ops(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(gpu_systems.PackedCuda):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            # On a CPU tables in float32 stay so, and the op of a GPU takes no such.
            self.encoder.to(torch.bfloat16)

    monkeypatch.setitem(gpu_systems.SYSTEMS, OURS_CUDA, Narrow)
    ops.reset_launches()
    code, found = run("bfloat16")
    assert code == 0 and found[OURS_CUDA, "bfloat16"]["gate"]["green"]
    assert set(found[REFERENCE, "bfloat16"]["ratios_cuda"]) == {"bfloat16"}
    assert {"varlen_attention", "embed_norm", "norm_pool_out"} <= {
        op for op, name in ops.launches() if name == "cuda"
    }


@pytest.mark.slow
def test_encode_with_a_wrong_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, scale=9.0)
    code, found = run("bfloat16")
    assert code == 1 and not found[OURS_CUDA, "bfloat16"]["gate"]["green"]
    assert found[OURS, "bfloat16"]["gate"]["green"]
    assert set(found[REFERENCE, "bfloat16"]["ratios"]) == {"bfloat16"}
    assert all(row["ratios_cuda"] == {} for row in found.values())
    assert found[OURS_CUDA, "bfloat16"]["ratios"] == {}


@pytest.mark.slow
def test_encode_without_the_library(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_encode, "cuda_ops", lambda *_: "_C_cuda was not built")
    code, found = run("bfloat16")
    assert code == 0
    assert found[OURS_CUDA, "bfloat16"]["status"] == "not measured: _C_cuda was not built"
    text = "\n".join(gpu_report.encode(list(found.values())))
    assert "not measured: _C_cuda was not built" in text


def test_where_the_cuda_ops_are_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_systems.cuda_ops(CPU, torch.bfloat16) == ""
    assert gpu_systems.cuda_ops(GPU, torch.float32) == ""
    lacking = extension.Extension("_C_cuda", None, "was not built")
    monkeypatch.setattr(extension, "CUDA", lacking)
    assert gpu_systems.cuda_ops(GPU, torch.float16) == "was not built"
