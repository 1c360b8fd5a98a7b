"""Encoding on a GPU, run on a CPU with a tiny model: what is computed, stored and shown.

Where only the place of the CUDA ops counts, other ops stand in for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import families
from benchmarks.common import pages, storage
from benchmarks.encode import gpu, gpu_systems
from benchmarks.encode.__main__ import parse_args
from benchmarks.report import render
from sbert_fast import ops
from sbert_fast.bench import contenders
from sbert_fast.bench.checkpoint import Checkpoint
from sbert_fast.bench.contenders import Contender, Sizes
from sbert_fast.bench.corpora import Corpus
from sbert_fast.bench.names import OURS, OURS_CUDA, REFERENCE, UNPADDED
from sbert_fast.bench.systems import Setting, System
from sbert_fast.ops import extension
from sbert_fast.testing import worst_cosine

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WIDTH, EIGHT = 64, Setting(8)
Record = dict[str, Any]


@pytest.fixture(scope="module")
def corpus(tiny: Checkpoint) -> Corpus:
    texts = families.make_texts(40)
    return Corpus(texts, tiny.tokenize(texts))


@pytest.mark.parametrize("name", [OURS, REFERENCE, UNPADDED])
def test_systems_give_the_same_embeddings(name: str, tiny: Checkpoint, corpus: Corpus) -> None:
    reference = gpu_systems.SYSTEMS[REFERENCE](tiny, "float32")
    expected = reference.encode(corpus.texts, Setting(8))
    system = gpu_systems.SYSTEMS[name](tiny, "float32")
    each = Contender(name, "float32", system=system, setting=Setting(7))
    for scope in ("s1", "s3"):
        got = contenders.embed(each, scope, corpus)
        assert got.dtype == np.float32 and worst_cosine(got, expected) >= 1 - 1e-6
        assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    real, computed = corpus.tokens.lengths.sum(), sum(system.stage(corpus.tokens, 8).batch_tokens)
    if name == REFERENCE:
        assert computed > real
    else:
        assert real <= computed < real + (1 if name == UNPADDED else 16 * 5)


class Paced(System):
    """Takes as long as its table says, by a clock of its own; what is not in it does not fit."""

    def __init__(self, paces: list[dict[int, float]]) -> None:
        tables = enumerate(paces, start=1)
        self.pace = {Setting(s, w): seconds for w, t in tables for s, seconds in t.items()}
        self.workers, self.clock = tuple(range(1, len(paces) + 1)), 0.0
        self.remembered: set[Setting] = set()

    def encode(self, texts: list[str], setting: Setting) -> None:
        if setting not in self.pace:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.clock += self.pace[setting]
        self.remembered.add(setting)
        assert self.remembered == {setting}, "shapes of one setting at a time"

    def forget(self) -> None:
        self.remembered.clear()


MIDDLE = {8: 4.0, 16: 3.0, 32: 2.0, 64: 3.0, 128: 4.0}
BEYOND = {8: 9.0, 16: 8.0, 32: 7.0, 64: 6.0, 128: 5.0, 256: 1.0, 512: 4.5}
LAST_THAT_FITS = {size: pace for size, pace in BEYOND.items() if size < 512}


@pytest.mark.parametrize(
    ("paces", "texts", "best", "tried"),
    [
        ([MIDDLE], 1000, Setting(32), 5),
        ([BEYOND], 1000, Setting(256), 7),
        ([MIDDLE, BEYOND], 1000, Setting(256, 2), 12),
        ([BEYOND, MIDDLE], 1000, Setting(256), 12),
        ([LAST_THAT_FITS], 1000, Setting(256), 6),
        # A batch holds all texts.
        ([BEYOND], 40, Setting(64), 4),
    ],
)
def test_the_sweep_goes_on_while_it_gains(
    paces: list[dict[int, float]],
    texts: int,
    best: Setting,
    tried: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = Paced(paces)
    monkeypatch.setattr(contenders.time, "perf_counter", lambda: system.clock)
    each = Contender("openvino", "float32", system=system)
    some = Corpus(["text"] * texts, None)
    contenders.find_setting(each, "s1", some, CPU, Sizes(8, 128, times=2))
    assert each.setting == best and len(each.sweep) == tried and not system.remembered
    assert each.sweep.items() <= system.pace.items()


@pytest.fixture
def run(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark; the exit code, and the rows that it has stored."""
    monkeypatch.setattr(gpu, "_SAMPLE_SECONDS", 1e-4)
    stored = tmp_path / "rows.jsonl"

    def once(*precisions: str, **changes: Any) -> tuple[int, list[Record]]:
        made = parse_args(["--device", "cuda", "--model", str(tiny.path)])
        few = {"texts": 24, "sweep_texts": 12, "rounds": 2, "device": "cpu", "rows": stored}
        vars(made).update(few | {"dtype": list(precisions), "scope": ["s3"]} | changes)
        before = len(storage.read(stored))
        code = gpu.main(made)
        first, *lines = storage.read(stored)[before:]
        assert first["kind"] == "run" and len(first["source_sha256"]) == 64
        return code, lines

    once.stored = stored
    return once


def by_system(lines: list[Record]) -> dict[tuple[str, str], Record]:
    return {(line["system"], line["precision"]): line for line in lines}


@pytest.mark.slow
def test_a_row_a_system(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    code, every = run("bfloat16", scope=["s3", "s1"], json=out)
    assert code == 0
    lines = storage.latest(every)
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
    assert OURS in render(document) and len(document["rows"]) == len(lines)
    assert len(pages.encode_on_gpu(every)) == 2 + len(lines), "the last row of a system counts"


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_an_interruption_keeps_the_rounds_before_it(
    rounds: int, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three systems learn how long they take; then they take their turns.
    calls = iter(range(-3, 100))

    def seconds(run: Any, device: torch.device, times: int = 1) -> float:
        if next(calls) == 3 * rounds + 1:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(
        contenders, "find_setting", lambda each, *_: setattr(each, "setting", EIGHT)
    )
    monkeypatch.setattr(contenders, "seconds_of", seconds)
    with pytest.raises(KeyboardInterrupt):
        run("bfloat16", rounds=3)
    lines = storage.read(run.stored)[1:]
    stored = {0: [], 1: [1, 1, 1] * 2, 2: [1, 1, 1, 2, 2, 2]}
    assert [len(line["seconds"]) for line in lines] == stored[rounds]
    assert {line["system"] for line in lines[-3:] if line["ratios"]} == (
        {REFERENCE, UNPADDED} if rounds else set()
    )


@pytest.mark.slow
def test_a_system_that_fails_leaves_its_row(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu_systems.SYSTEMS, UNPADDED, broken)
    code, lines = run("bfloat16")
    assert code == 0
    assert [line["kind"] for line in storage.latest(lines)] == ["error", "row", "row"]
    monkeypatch.setitem(gpu_systems.SYSTEMS, OURS, broken)
    code, lines = run("bfloat16")
    errors = {line["error"] for line in lines if line["kind"] == "error"}
    assert code == 1 and errors == {"RuntimeError: no kernel image"}
    assert "no kernel image" in "\n".join(pages.encode_on_gpu(lines))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 9.0], ids=["right", "wrong"])
def test_both_of_ours_are_compared(scale: float, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours stands in for ours in CUDA C++; with a scale its embeddings are wrong."""

    class Pretended(gpu_systems.Packed):
        def stage(self, *arguments: Any) -> Any:
            staged = super().stage(*arguments)
            true = staged.run
            staged.run = lambda: true() * torch.linspace(1, scale, WIDTH)
            return staged

    reason = {"float32": "", "bfloat16": None}
    monkeypatch.setattr(gpu, "cuda_ops", lambda device, precision: reason[precision])
    monkeypatch.setitem(gpu_systems.SYSTEMS, OURS_CUDA, Pretended)
    code, lines = run("float32", "bfloat16", peers=[])
    found, right = by_system(lines), scale == 1
    half = {(name, "bfloat16") for name in (OURS, OURS_CUDA, REFERENCE)}
    assert set(found) == half | {(OURS, "float32"), (REFERENCE, "float32")}
    ours, cuda, peer = (found[name, "bfloat16"] for name in (OURS, OURS_CUDA, REFERENCE))
    assert code == (not right) and cuda["gate"]["green"] == right and ours["gate"]["green"]
    assert set(peer["ratios"]) == {"float32", "bfloat16"}
    assert set(cuda["ratios"]) == (set(peer["ratios"]) if right else set())
    for row in (peer, ours):
        assert set(row["ratios_cuda"]) == ({"bfloat16"} if right else set())
    assert f"{OURS_CUDA} is faster by" in "\n".join(pages.encode_on_gpu(lines))


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
def test_the_cuda_ops_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(*arguments: Any) -> System:
        made = gpu_systems.Packed(*arguments, impl="cuda")
        # On a CPU tables in float32 stay so, and the op of a GPU takes no such.
        made.encoder.to(torch.bfloat16)
        return made

    monkeypatch.setitem(gpu_systems.SYSTEMS, OURS_CUDA, narrow)
    ops.reset_launches()
    code, lines = run("bfloat16", peers=[], texts=12)
    found = by_system(lines)
    assert code == 0 and found[OURS_CUDA, "bfloat16"]["gate"]["green"]
    launched = {op for op, name in ops.launches() if name == "cuda"}
    assert {"varlen_attention", "embed_norm", "norm_pool_out"} <= launched


@pytest.mark.slow
def test_without_the_library(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_systems.cuda_ops(CPU, "bfloat16") == gpu_systems.cuda_ops(GPU, "float32") == ""
    monkeypatch.setattr(extension, "CUDA", extension.Extension("_C_cuda", None, "was not built"))
    assert gpu_systems.cuda_ops(GPU, "float16") == "was not built"
    monkeypatch.setattr(gpu, "cuda_ops", lambda *_: "was not built")
    code, lines = run("bfloat16", peers=[])
    assert code == 0
    assert by_system(lines)[OURS_CUDA, "bfloat16"]["status"] == "not measured: was not built"
    assert "not measured: was not built" in "\n".join(pages.encode_on_gpu(lines))
