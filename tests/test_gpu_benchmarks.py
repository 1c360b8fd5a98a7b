"""The benchmarks for a GPU, run on a CPU with tiny inputs: what they compute, store and show."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import families
from sbert_fast.testing import worst_cosine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import encode  # noqa: E402
import gpu_encode  # noqa: E402
import gpu_report  # noqa: E402
import gpu_systems  # noqa: E402
import ground  # noqa: E402
import models  # noqa: E402
import op_peers  # noqa: E402
import op_rows  # noqa: E402
import op_systems  # noqa: E402
import provenance  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import rows  # noqa: E402
import stopwatch  # noqa: E402
from op_peers import EAGER, FLEX, SDPA, VARLEN  # noqa: E402
from padded import ModelFolder  # noqa: E402
from report import OURS, REFERENCE, UNPADDED  # noqa: E402

CPU = torch.device("cpu")
LENGTHS = [5, 40, 1, 16, 33, 130, 17]
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


class Clock:
    """A clock that only moves when a system runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> stopwatch.Call:
        def call(i: int) -> None:
            self.now += seconds

        return call


def test_systems_are_timed_in_turn_and_a_failing_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, seen = Clock(), []
    monkeypatch.setattr(stopwatch.time, "perf_counter", clock)

    def fails(i: int) -> None:
        seen.append(i)
        raise RuntimeError("no such kernel\nand more") if len(seen) > 4 else clock.takes(1)(i)

    def breaks(i: int) -> None:
        raise ValueError("never ran")

    systems = {"a": clock.takes(2e-4), "b": breaks, "c": clock.takes(5e-4)}
    timings = stopwatch.take_turns(systems, 3, CPU, samples=4)
    assert timings["a"].median == pytest.approx(2e-4)
    assert len(timings["a"].seconds) == len(timings["c"].seconds) == 4
    assert timings["b"].error == "ValueError: never ran" and not timings["b"].seconds
    assert stopwatch.paired_ratio(timings["c"], timings["a"]) == pytest.approx(2.5)


def test_a_system_that_fails_late_has_no_figures() -> None:
    calls = []

    def fails(i: int) -> None:
        calls.append(i)
        if len(calls) > 30:
            raise RuntimeError("lost\nand more")

    timing = stopwatch.take_turns({"a": fails}, 3, CPU, samples=50)["a"]
    assert timing.error == "RuntimeError: lost" and not timing.seconds


def test_sets_of_inputs_exceed_the_cache() -> None:
    cache = stopwatch.cache_bytes(CPU)
    assert stopwatch.cold_sets(CPU, 10 * cache) == 3
    assert stopwatch.cold_sets(CPU, cache // 2) == 8
    assert stopwatch.cold_sets(CPU, 1) == 32


@pytest.mark.parametrize("name", ["16", "512", "short", "passages", "wiki", "mixed", "uniform"])
def test_lengths_make_the_tokens_asked_for(name: str) -> None:
    lengths = op_systems.lengths_of(name, 65_536)
    assert abs(sum(lengths) / 65_536 - 1) < 0.03
    assert op_systems.lengths_of(name, 65_536) == lengths
    assert min(lengths) >= 1 and op_systems.lengths_of(name, 1)


@pytest.mark.parametrize("dim", [32, 64])
def test_attention_and_its_peers_agree(dim: int) -> None:
    case = op_systems.attention_case(CPU, torch.float32, LENGTHS, dim, 2, (SDPA, FLEX, VARLEN))
    wrong = op_rows.check(case)
    assert wrong == {OURS: None, SDPA: None, FLEX: None}
    assert set(case.missing) == {VARLEN}, "it has no kernel for a CPU"
    assert case.moved_bytes == sum(LENGTHS) * 12 * dim * 4 * 4
    first, second = (op_peers.as_packed(case.systems[SDPA](i)) for i in range(2))
    assert not torch.equal(first, second)


def test_documents_are_masked_block_by_block() -> None:
    lengths = [100, 1, 200, 128, 30, 300]
    mask = op_peers.document_mask(lengths, CPU)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens, block = sum(lengths), 128
    same = torch.nn.functional.pad(owner[:, None] == owner, (0, -tokens % block) * 2)
    blocks = same.shape[0] // block
    needed = same.view(blocks, block, blocks, block).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), needed)


@pytest.mark.parametrize("op", ["embed_norm", "add_norm", "bias_gelu", "segment_pool", "norm_pool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_and_their_peers_agree(op: str, dtype: torch.dtype) -> None:
    case = op_systems.row_case(op, CPU, dtype, LENGTHS, 64, 2, (EAGER,))
    wrong = op_rows.check(case)
    assert wrong[OURS] is None and case.missing == {}
    assert wrong[EAGER] is None or dtype == torch.bfloat16
    eager = op_peers.as_packed(case.systems[EAGER](1))
    assert eager.shape == case.systems[OURS](1).shape


def test_a_row_without_correctness_has_no_ratios() -> None:
    def case() -> op_systems.Case:
        return op_systems.row_case("add_norm", CPU, torch.float32, LENGTHS, 64, 1, (EAGER,))

    right = op_rows.measure(case(), CPU, 1e10, samples=2)
    assert right["ok"] and set(right["ratios"]) == {EAGER, op_systems.COPY}
    ours = right["systems"][OURS]
    assert ours["floor_fraction"] == pytest.approx(right["floor_us"] / ours["us"])
    assert ours["tokens_per_s"] == pytest.approx(sum(LENGTHS) / ours["us"] * 1e6)

    broken = case()
    true = broken.systems[OURS]
    broken.systems[OURS] = lambda i: true(i) * 1.01
    wrong = op_rows.measure(broken, CPU, 1e10, samples=2)
    assert not wrong["ok"] and wrong["ratios"] == {}
    assert "is over the bound" in wrong["systems"][OURS]["wrong"]

    absent = case()
    absent.systems[OURS] = lambda i: 1 / 0
    failed = op_rows.measure(absent, CPU, 1e10, samples=2)
    assert failed["systems"][OURS] == {"error": "ZeroDivisionError: division by zero"}
    assert not failed["ok"] and failed["ratios"] == {}
    what = {"lengths": "16", "state": "cold", "dtype": "float16", "width": 64}
    text = "\n".join(gpu_report.ops([what | row for row in (right, wrong, failed)], short=True))
    assert "yes" in text and "NO" in text and "ERROR ZeroDivisionError" in text


def test_an_unwritten_result_is_wrong() -> None:
    case = op_systems.row_case("add_norm", CPU, torch.float32, LENGTHS, 64, 1, ())
    case.systems[OURS] = lambda i: torch.empty_like(case.sets[0][0])
    assert "not written" in str(op_rows.check(case)[OURS])


def test_rows_are_appended_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    rows.append(None, "row", {})
    rows.append(path, "run", {"benchmark": "ops"})
    rows.append(path, "row", {"op": "add_norm"})
    with path.open("a") as stream:
        stream.write('{"kind": "row", "op')
    assert rows.read(path) == [
        {"kind": "run", "benchmark": "ops"},
        {"kind": "row", "op": "add_norm"},
    ]
    assert rows.read(tmp_path / "absent") == []


def test_the_last_row_of_a_system_counts() -> None:
    first = {"model": "m", "corpus": "c", "texts": 9, "scope": "s3", "system": OURS}
    first |= {"precision": "float16"}
    others = [first | {"texts": 8}, first | {"scope": "s1"}, first | {"precision": "bfloat16"}]
    made = [first, *others, first | {"tokens_per_s": 2e6, "batch": "auto", "sentences_per_s": 5.0}]
    assert rows.latest(made) == [made[-1], *others]
    assert len(gpu_report.encode(made)) == 2 + len(made) - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A tiny BERT with random weights."""
    scratch = tmp_path_factory.mktemp("model")
    families.make_tokenizer("bert").save_pretrained(scratch / "tokenizer")
    models.make_random("random-tiny", scratch / "tokenizer", scratch / "model", SIZES)
    return ModelFolder(scratch / "model", threads=1)


def test_a_model_is_narrowed_and_widened(folder: ModelFolder, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    assert models.main(["narrow", str(folder.path), str(narrow)]) == 0
    assert models.main(["widen", str(narrow), str(wide)]) == 0
    before, half, after = (load_file(path / models.WEIGHTS) for path in (folder.path, narrow, wide))
    for name, value in before.items():
        assert half[name].dtype == torch.float16 and after[name].dtype == torch.float32
        assert torch.equal(after[name], value.half().float())
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"
    assert models.main(["narrow"]) == 2


def tokens_of(folder: ModelFolder, texts: list[str]) -> gpu_systems.Tokens:
    return gpu_systems.Tokens(*folder.tokenize(texts))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return families.make_texts(40)


@pytest.mark.parametrize("name", [OURS, REFERENCE, UNPADDED])
@pytest.mark.parametrize("scope", ["s1", "s3"])
def test_systems_give_the_same_embeddings(
    name: str, scope: str, folder: ModelFolder, texts: list[str]
) -> None:
    corpus = gpu_encode.Corpus(texts, tokens_of(folder, texts))
    reference = gpu_systems.SYSTEMS[REFERENCE](folder, CPU, torch.float32)
    expected = reference.encode(texts, 8)
    system = gpu_systems.SYSTEMS[name](folder, CPU, torch.float32)
    each = gpu_encode.Contender(name, "float32", system=system, batch_size=7)
    got = gpu_encode.embed(each, scope, corpus)
    assert got.dtype == np.float32 and worst_cosine(got, expected) >= 1 - 1e-6
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_packed_batches_compute_no_padding(folder: ModelFolder, texts: list[str]) -> None:
    tokens = tokens_of(folder, texts)
    real = int(tokens.lengths.sum())
    sizes = {
        name: sum(
            gpu_systems.SYSTEMS[name](folder, CPU, torch.float32).stage(tokens, 8).batch_tokens
        )
        for name in (OURS, REFERENCE, UNPADDED)
    }
    assert sizes[UNPADDED] == real
    assert real <= sizes[OURS] < real + 16 * 5
    assert sizes[REFERENCE] > real


def arguments(folder: ModelFolder, **changes: Any) -> Namespace:
    made = encode.parse_args(["--device", "cuda", "--model", str(folder.path), "--rounds", "2"])
    few = {"texts": 24, "sweep_texts": 12, "dtype": ["bfloat16"], "device": "cpu"}
    for name, value in (few | changes).items():
        setattr(made, name, value)
    return made


@pytest.mark.slow
def test_encode_stores_a_row_a_system(
    folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_encode, "_SAMPLE_SECONDS", 1e-4)
    stored, out = tmp_path / "rows.jsonl", tmp_path / "result.json"
    code = gpu_encode.main(arguments(folder, rows=stored, json=out))
    assert code == 0
    run, *every = rows.read(stored)
    assert run["kind"] == "run" and len(run["source_sha256"]) == 64
    lines = rows.latest(every)
    assert [len(line["seconds"]) for line in every] == [1, 1, 1, 2, 2, 2] * 2
    assert [(line["scope"], line["system"]) for line in lines] == [
        (scope, name) for scope in ("s3", "s1") for name in (OURS, REFERENCE, UNPADDED)
    ]
    for line in lines:
        assert line["kind"] == "row" and line["tokens_per_s"] > 0 and line["gate"]["green"]
        assert set(line["ratios"]) == (set() if line["system"] == OURS else {"bfloat16"})
        assert (line["batch"] == "auto") == (line["system"] == OURS)
    assert lines[0]["gemm_seconds"] > 0 and lines[0]["batches"]
    document = json.loads(out.read_text())
    assert OURS in report.render(document) and len(document["rows"]) == len(lines)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_an_interruption_keeps_the_rounds_before_it(
    rounds: int, folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "rows.jsonl"
    turns = iter(range(100))

    def seconds(run: Any, device: torch.device, times: int = 0) -> float:
        # In the turn of the second of three systems.
        if times and next(turns) == 3 * rounds + 1:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(gpu_encode, "seconds_of", seconds)
    with pytest.raises(KeyboardInterrupt):
        gpu_encode.main(arguments(folder, rows=stored, scope=["s3"], rounds=3))
    lines = rows.read(stored)[1:]
    assert [len(line["seconds"]) for line in lines] == [1] * 3 * min(rounds, 1) + [rounds] * 3 * (
        rounds > 0
    )
    assert {line["system"] for line in lines[-3:] if line["ratios"]} == (
        {REFERENCE, UNPADDED} if rounds else set()
    )


@pytest.mark.slow
def test_a_system_that_fails_leaves_its_row(
    folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_encode, "_SAMPLE_SECONDS", 1e-4)
    stored = tmp_path / "rows.jsonl"
    monkeypatch.setitem(gpu_systems.SYSTEMS, UNPADDED, broken)
    assert gpu_encode.main(arguments(folder, rows=stored, scope=["s3"])) == 0
    _, *lines = rows.read(stored)
    assert [line["kind"] for line in rows.latest(lines)] == ["error", "row", "row"]
    monkeypatch.setitem(gpu_systems.SYSTEMS, OURS, broken)
    assert gpu_encode.main(arguments(folder, rows=stored, scope=["s3"])) == 1
    lines = rows.read(stored)[1 + len(lines) :]
    assert {line["error"] for line in lines if line["kind"] == "error"} == {
        "RuntimeError: no kernel image"
    }
    assert "no kernel image" in "\n".join(gpu_report.encode(lines[1:]))


def test_the_sweep_ends_where_it_loses_or_does_not_fit(
    folder: ModelFolder, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = {32: 4.0, 64: 3.0, 128: 2.0, 256: 1.0, 512: 0.5, 1024: 0.7}
    monkeypatch.setattr(gpu_encode, "runner", lambda each, scope, corpus: lambda: None)
    each = gpu_encode.Contender(REFERENCE, "bfloat16")

    def seconds(run: Any, device: torch.device) -> float:
        if each.batch_size not in pace:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pace[each.batch_size]

    monkeypatch.setattr(gpu_encode, "seconds_of", seconds)
    corpus = gpu_encode.Corpus(["text"] * 5000, tokens_of(folder, texts))
    gpu_encode.find_batch_size(each, "s3", corpus, CPU)
    assert each.batch_size == 512 and max(each.sweep) == 1024
    del pace[1024]
    gpu_encode.find_batch_size(each, "s3", corpus, CPU)
    assert each.batch_size == 512


def test_roofline_is_the_time_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def product(
        tokens: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, float]:
        asked.append((tokens, outputs, inputs))
        return {"seconds": tokens * outputs * inputs * 1e-12}

    monkeypatch.setattr(roofline, "product", product)
    config = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3}
    seconds = roofline.gemm_seconds([160, 165, 40], config, torch.float32, CPU)
    assert seconds == pytest.approx(3 * 365 * (24 + 8 + 32 + 32) * 8 * 1e-12)
    assert len(asked) == 3 * 4 - 4, "160 and 165 are measured once"


def test_products_are_measured() -> None:
    found = roofline.product(16, 24, 8, torch.float32, CPU)
    assert found["seconds"] == min(found["ways"].values()) > 0


@pytest.mark.slow
def test_ground_keeps_figures_and_errors(folder: ModelFolder, tmp_path: Path) -> None:
    stored = tmp_path / "ground.jsonl"
    command = ["--rows", str(stored), "--model", str(folder.path)]
    # Attention for packed sequences has no kernel on a CPU: its rows are errors.
    assert ground.main(command) == 1
    run, *lines = rows.read(stored)
    assert run["benchmark"] == "ground"
    kinds = {(line["what"], line["kind"]) for line in lines}
    assert kinds == {
        ("copy", "row"),
        ("gemm", "row"),
        ("varlen", "error"),
        ("launch", "row"),
        ("encode", "row"),
    }
    assert all(line["value"] > 0 for line in lines if line["kind"] == "row")


def test_arguments_by_device(capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu = encode.parse_args(["--device", "cuda"])
    assert on_gpu.dtype == ["bfloat16", "float16"] and on_gpu.peers == [REFERENCE, UNPADDED]
    on_cpu = encode.parse_args([])
    assert on_cpu.dtype == ["float32"] and on_cpu.peers == list(report.PEERS)
    for wrong in (["--dtype", "float16"], ["--peers", UNPADDED]):
        with pytest.raises(SystemExit):
            encode.parse_args(wrong)
    with pytest.raises(SystemExit):
        encode.parse_args(["--device", "cuda", "--peers", "openvino"])
    assert "openvino does not run on cuda" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert encode.main(["--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_result_rows_of_an_unused_tensor() -> None:
    laid = op_peers.Laid(torch.ones(2), lambda value: value + 1)
    assert torch.equal(op_peers.as_packed(laid), torch.full((2,), 2.0))
    plain: Tensor = torch.zeros(1)
    assert op_peers.as_packed(plain) is plain


def test_rows_become_stored_documents(tmp_path: Path) -> None:
    run = {
        "schema": 1,
        "date": "2026-01-02T00:00:00+00:00",
        "commit": None,
        "source_sha256": "old",
        "device": {"name": "a GPU", "kind": "cuda"},
        "versions": {"torch": "2.11.0", "onnx": None},
    }
    ours = {"us": 2.0, "floor_fraction": 0.5, "tokens_per_s": 1e6, "launch_bound": False}
    op = {"op": "add_norm", "lengths": "short", "state": "cold", "dtype": "float16", "width": 64}
    op |= {"ok": True, "systems": {OURS: ours | {"wrong": None}}, "ratios": {}}
    encoded = {"model": "base", "corpus": "wiki", "scope": "s3", "system": OURS}
    encoded |= {"precision": "bfloat16", "batch": "auto", "sentences_per_s": 9, "tokens_per_s": 1e6}
    now = provenance.source_hash(kind="cuda")
    for file, line in (("ops", op), ("encode", encoded)):
        path = tmp_path / f"{file}.jsonl"
        rows.append(path, "run", run | {"benchmark": file})
        rows.append(path, "row", line | {"benchmark": file, "lengths": "of old sources"})
        rows.append(path, "run", run | {"benchmark": file, "source_sha256": now})
        if file == "encode":
            rows.append(path, "row", line | {"benchmark": file, "tokens_per_s": 1.0})
        rows.append(path, "row", line | {"benchmark": file})
    results = tmp_path / "results" / "gpu"
    assert gpu_report.main([str(tmp_path), str(results)]) == 0
    documents = {p.stem: json.loads(p.read_text()) for p in results.glob("*.json")}
    assert set(documents) == {"ops", "encode-base-wiki"}
    for document in documents.values():
        assert len(document["rows"]) == 1 and document["commit"] == provenance.commit()
        assert "a GPU" in report.render(document)
    assert documents["encode-base-wiki"]["rows"][0]["tokens_per_s"] == 1e6, "the last one counts"
    text = report.readme_figures(results.parent)
    assert "add_norm" in text and "base" in text and "benchmarks/results/gpu" in text
