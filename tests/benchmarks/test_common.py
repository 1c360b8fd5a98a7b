"""What the benchmarks have in common: clock, gate, provenance, files, arguments."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import checkpoints, products, provenance, stopwatch, storage
from benchmarks.encode.__main__ import main, parse_args
from benchmarks.ops.peers import within
from sbert_fast import FastEncoder
from sbert_fast.bench import contenders, machine, runtimes
from sbert_fast.bench.checkpoint import Checkpoint
from sbert_fast.bench.names import OURS, OURS_CUDA, PEERS, REFERENCE, UNPADDED

CPU = torch.device("cpu")


def test_systems_are_timed_in_turn_and_a_failing_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock.now)

    def takes(seconds: float, most_calls: float = float("inf")) -> stopwatch.Call:
        calls: list[int] = []

        def call(i: int) -> None:
            calls.append(i)
            clock.now += seconds
            if len(calls) > most_calls:
                raise RuntimeError("no such kernel\nand more")

        return call

    entered = []

    @contextmanager
    def context() -> Any:
        entered.append(clock.now)
        yield
        entered.append(clock.now)

    systems = {
        "a": within(context, takes(2e-4)),
        "b": takes(1, 0),
        "c": takes(5e-4),
        "late": takes(1e-4, 30),
    }
    timings = stopwatch.take_turns(systems, 3, CPU, samples=4)
    assert len(entered) == 2 * 5 and entered == sorted(entered), "warm-up and four samples"
    assert timings["a"].median == pytest.approx(2e-4)
    assert len(timings["a"].seconds) == len(timings["c"].seconds) == 4
    for name in ("b", "late"):
        assert timings[name].error == "RuntimeError: no such kernel" and not timings[name].seconds
    assert stopwatch.paired_ratio(timings["c"], timings["a"]) == pytest.approx(2.5)


def test_sets_of_inputs_exceed_the_cache() -> None:
    cache = stopwatch.cache_bytes(CPU)
    assert [stopwatch.cold_sets(CPU, size) for size in (10 * cache, cache // 2, 1)] == [3, 8, 32]


def test_the_time_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    found = products.product(16, 24, 8, torch.float32, CPU)
    assert found["seconds"] == min(found["ways"].values()) > 0
    asked: list[tuple[int, ...]] = []

    def product(tokens: int, outputs: int, inputs: int, *_: object) -> dict[str, float]:
        asked.append((tokens, outputs, inputs))
        return {"seconds": tokens * outputs * inputs * 1e-12}

    monkeypatch.setattr(products, "product", product)
    config = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3}
    seconds = products.gemm_seconds([160, 165, 40], config, torch.float32, CPU)
    assert seconds == pytest.approx(3 * 365 * (24 + 8 + 32 + 32) * 8 * 1e-12)
    assert len(asked) == 3 * 4 - 4, "160 and 165 are measured once"
    assert products.flops_per_token(config) == 2 * 3 * (24 + 8 + 32 + 32) * 8
    assert products.flops_per_token(config | {"model_type": "nomic_bert"}) == 2 * 3 * 128 * 8


def turned(loss: float) -> np.ndarray:
    """Two unit vectors, the second turned so that 1 - cosine is as given."""
    cosine = 1 - loss
    return np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)]])


TRUTH = np.array([[1.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("ours", "reference", "green"),
    [
        (0.0, 1e-4, {"float32", "bfloat16"}),
        (0.9e-6, 1e-4, {"float32", "bfloat16"}),
        (1.1e-6, 1e-4, {"bfloat16"}),
        (1.9e-4, 1e-4, {"bfloat16"}),
        (2.1e-4, 1e-4, set()),
        (5.1e-4, 1e-3, set()),
        (float("nan"), 1e-4, set()),
    ],
)
def test_the_gate(ours: float, reference: float, green: set[str]) -> None:
    embeddings = {(REFERENCE, "float32"): TRUTH, (REFERENCE, "bfloat16"): turned(reference)}
    embeddings |= {(OURS, p): turned(ours) for p in ("float32", "bfloat16", "float16")}
    gates = contenders.check(embeddings)
    assert {precision for (_, precision), each in gates.items() if each["green"]} == green
    assert (OURS, "float16") not in gates, "there is nothing to hold it to"


@pytest.mark.parametrize("red", [None, OURS, OURS_CUDA])
def test_a_red_gate_has_no_ratios(red: str | None) -> None:
    paces = {(OURS, "float16"): [2, 2, 2], (OURS_CUDA, "float16"): [1, 1, 1]}
    paces |= {(REFERENCE, "float16"): [4, 8, 6], (OURS, "float32"): [3, 3, 3]}
    running = [SimpleNamespace(name=n, precision=p, seconds=s) for (n, p), s in paces.items()]
    ours, cuda, peer, _ = running
    gates = {key: {"green": key != (red, "float16")} for key in paces if key[0] != REFERENCE}

    def found(name: str, each: SimpleNamespace) -> dict[str, float]:
        return contenders.ratios(name, each, running, gates)

    half = {} if red == OURS else {"float16": 3.0}
    assert found(OURS, peer) == half | {"float32": 2.0}
    assert found(OURS_CUDA, peer) == ({} if red == OURS_CUDA else {"float16": 6.0})
    assert found(OURS, ours) == {}
    assert found(OURS_CUDA, ours) == ({} if red else {"float16": 2.0})
    assert ("float16" in found(OURS, cuda)) == (red is None)


def test_a_result_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    storage.write_json({"rows": []}, path)
    with pytest.raises(ValueError):
        storage.write_json({"rate": float("nan")}, path)
    assert json.loads(path.read_text()) == {"rows": []}
    assert os.listdir(tmp_path) == ["result.json"]


def test_rows_are_appended_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert storage.read(path) == []
    for row in ({"op": "add_norm"}, {"op": "bias_gelu"}):
        storage.append(None, "row", row)
        storage.append(path, "row", row)
    whole = path.read_text()
    path.write_text(whole + '{"kind": "row", "op')
    assert storage.read(path) == [json.loads(line) for line in whole.splitlines()]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("cpu", ("sbert_fast/ops/x.py", "csrc/cpu/ops.cpp", "csrc/host/host.cpp")),
        ("cuda", ("sbert_fast/x.py", "kernels/triton/x.py", "csrc/cuda/x.cu", "csrc/cuda/x.cuh")),
        ("cuda kernels", ("csrc/cuda/attention.cu", "csrc/cuda/ops.cpp", "csrc/cuda/params.h")),
    ],
)
def test_the_source_hash_follows_the_timed_sources(
    tmp_path: Path, kind: str, names: tuple[str, ...]
) -> None:
    def written(name: str, content: str) -> str:
        tmp_path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath(name).write_text(content)
        return provenance.source_hash(tmp_path, kind)

    seen = [provenance.source_hash(tmp_path, kind)]
    seen += [written(name, content) for name in names for content in ("a = 1", "a = 2")]
    source = tmp_path / names[-1]
    source.rename(source.with_stem("y"))
    for name in ("sbert_fast/_build_info.py", "README.md"):
        seen.append(written(name, "words"))
    assert len(set(seen)) == len(seen) - 1 == 2 + 2 * len(names)


def test_threads_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: chosen.append(cpus))
    monkeypatch.setattr(os, "environ", {})
    machine.pin(2)
    assert chosen == [[3, 5]] and os.environ["OMP_NUM_THREADS"] == "2"
    with pytest.raises(ValueError, match="threads must be at most 3 here, got 4"):
        machine.pin(4)


def test_a_model_is_narrowed_and_widened(tiny: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    assert checkpoints.main(["narrow", str(tiny.path), str(narrow)]) == 0
    assert checkpoints.main(["widen", str(narrow), str(wide)]) == 0
    before, half, after = (
        load_file(path / checkpoints.WEIGHTS) for path in (tiny.path, narrow, wide)
    )
    for name, value in before.items():
        assert half[name].dtype == torch.float16 and after[name].dtype == torch.float32
        assert torch.equal(after[name], value.half().float())
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"
    assert checkpoints.main(["narrow"]) == 2


def test_random_models_of_a_family_run_packed(
    tmp_path: Path, minilm: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "bundled_model", lambda: minilm.path)
    make, small = checkpoints.make_random, {"hidden_size": 64, "num_attention_heads": 4}

    def make_small(name: str, tokenizer: Path, target: Path, sizes: Any, family: str) -> None:
        make(name, tokenizer, target, sizes | small, family)

    monkeypatch.setattr(checkpoints, "make_random", make_small)
    assert checkpoints.main(["random", "modernbert", str(tmp_path / "model")]) == 0
    encoder = FastEncoder(str(tmp_path / "model"))
    assert encoder.unsupported_reason is None
    assert encoder[0].auto_model.config.model_type == "modernbert"
    monkeypatch.setattr(checkpoints, "bundled_model", lambda: None)
    assert checkpoints.main(["random", "modernbert", str(tmp_path / "other")]) == 2


def test_arguments_by_device() -> None:
    on_gpu, on_cpu = parse_args(["--device", "cuda"]), parse_args([])
    assert on_gpu.dtype == ["bfloat16", "float16"] and on_gpu.peers == [REFERENCE, UNPADDED]
    assert on_cpu.dtype == ["float32"] and on_cpu.peers == list(PEERS)
    assert {REFERENCE, *runtimes.ONNX, *runtimes.TORCH} == set(PEERS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--peers fastest", "expected some of sentence-transformers"),
        ("--dtype float16", "float16 is for GPUs"),
        (f"--peers {UNPADDED}", "st-unpadded does not run on cpu"),
        ("--device cuda --peers openvino,zentorch", "openvino, zentorch does not run on cuda"),
        ("--rounds 0", "--rounds must be at least 1"),
    ],
)
def test_refused_arguments(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(arguments.split())
    assert told in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err
