"""Encoding on a CPU: a run over a tiny corpus, the peers, the breakdown. No figure is judged."""

from __future__ import annotations

import importlib.util
import json
import platform
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import ROOT
from benchmarks.common import options
from benchmarks.encode import breakdown, rerank, training
from benchmarks.report import render
from sbert_fast.bench import machine, measure, runtimes
from sbert_fast.bench.checkpoint import Checkpoint
from sbert_fast.bench.contenders import FLOAT32_LOSS, Contender
from sbert_fast.bench.corpora import Corpus
from sbert_fast.bench.names import ALONE, OURS, REFERENCE
from sbert_fast.bench.systems import NotAvailable, Setting, System

TEXTS = ["A cat.", "Rain is expected in the north for most of the week.", "", "Why?"]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Runs a command in this process, which it does not pin to a CPU: the document that it stores,
    and prints last."""
    path = tmp_path / "new" / "tiny.json"
    tiny = ("--texts", "24", "--rounds", "2", "--threads", "1", "--json", str(path))
    for module in (machine, options):
        monkeypatch.setattr(module, "pin", lambda threads: None)
    monkeypatch.chdir(ROOT)

    def run(module: str, *chosen: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [module, *tiny, *chosen])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_module(f"benchmarks.{module}", run_name="__main__")
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert capsys.readouterr().out.endswith(render(stored) + "\n")
        return stored

    return run


@pytest.mark.slow
def test_a_run(run: Callable[..., dict[str, Any]]) -> None:
    """Beside every peer that starts quickly."""
    needs = {OURS: (), REFERENCE: (), "zentorch": ("zentorch",)}
    needs |= {name: (name, "onnx", "onnxscript") for name in ("onnxruntime", "openvino")}
    chosen = (
        "--sweep-texts",
        "8",
        "--latency",
        "30",
        "--by-length",
        "64",
        "--peers",
        ",".join([*needs][1:]),
    )
    document = run("encode", *chosen)
    assert document["device"]["threads"] == document["settings"]["threads"] == 1
    assert set(document["versions"]) == {"python", *machine.PACKAGES}
    assert document["model"]["sha256"].startswith("53aa5117")
    corpus = document["corpus"]
    assert corpus["tokens"] == round(24 * corpus["lengths"]["mean"])
    assert document["gates"]["float32"]["green"]
    rows = {row["system"]: row for row in document["rows"]}
    assert rows.keys() == needs.keys()
    for name, row in rows.items():
        if not all(importlib.util.find_spec(module) for module in needs[name]):
            assert row["status"] == "not measured (not installed)" and len(row) == 3
            continue
        assert row["status"] == "measured" and len(row["seconds"]) == 2
        low, high = row["iqr_tokens_per_s"]
        assert 0 < low <= row["tokens_per_s"] <= high
        assert 1 - row["mean_cosine"] <= 1 - row["worst_cosine"] <= FLOAT32_LOSS
        assert row["peak_rss_mb"] >= row["loaded_rss_mb"] > 0
        assert (row["batch"] == "auto") == (row["real_token_share"] is None) == (name == OURS)
        assert set(row["ratios"]) == (set() if name == OURS else {"float32"})
        assert bool(row["sweep_tokens_per_s"]) == (name != OURS)
    latency = document["latency"]
    measured = {name for name, row in rows.items() if len(row) > 3}
    assert {row["system"] for row in latency["rows"]} == measured | {ALONE}
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in latency["rows"])
    assert all(min(row["tokens_per_s"]) > 0 for row in document["by_length"]["rows"])
    assert document["by_length"]["lengths"] == [16, 32, 64, 128, 256]


def test_a_peer_that_is_absent_or_does_not_load_is_named(
    minilm: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zentorch.py").write_text("raise OSError('wrong torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "zentorch", raising=False)
    with pytest.raises(NotAvailable, match="does not load: OSError: wrong torch"):
        runtimes.build("zentorch", "float32", minilm, tmp_path / "onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    for name in ("onnxruntime", "openvino", "zentorch"):
        with pytest.raises(NotAvailable, match="^not installed$"):
            runtimes.build(name, "float32", minilm, tmp_path / "onnx")


class Broken(System):
    def encode(self, texts: list[str], setting: Setting) -> np.ndarray:
        raise MemoryError("no room\nand more")


def test_a_peer_that_fails_is_left_out(minilm: Checkpoint) -> None:
    corpus = Corpus(TEXTS, minilm.tokenize(TEXTS))
    peer, ours = (Contender(name, "float32", system=Broken()) for name in ("openvino", OURS))
    measure.prepare(peer, corpus, len(TEXTS))
    assert peer.status == "not measured (failed: MemoryError: no room)" and peer.system is None
    assert set(measure.row_of(peer, [], None, corpus, 1, {})) == {"system", "precision", "status"}
    with pytest.raises(MemoryError):
        measure.prepare(ours, corpus, len(TEXTS))


def test_padded_batches_keep_order_and_mean(minilm: Checkpoint) -> None:
    def forward(inputs: runtimes.Inputs) -> np.ndarray:
        """The id of every token beside a 1, and rubbish where there is padding."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        states = np.where(mask == 1, ids, 1e6).astype(np.float32)
        return np.stack([states, np.ones_like(states)], axis=-1)

    folder = Checkpoint(minilm.path, threads=1)
    folder.config = folder.config | {"hidden_size": 2}
    system = runtimes.Padded(folder, lambda workers: forward, workers=(1, 2))
    tokens = folder.tokenize(TEXTS)
    means = [tokens.of(row).mean() for row in range(len(TEXTS))]
    expected = np.array([[mean, 1] / np.hypot(mean, 1) for mean in means])
    # Sums of ids are exact; the mean, the square, the norm and the quotient round once each.
    for setting in (Setting(1), Setting(3), Setting(4), Setting(1, 2), Setting(3, 2)):
        np.testing.assert_allclose(
            system.encode(TEXTS, setting), expected, rtol=4 * np.finfo(np.float32).eps
        )
    assert system.computed_tokens(TEXTS, Setting(1)) == tokens.lengths.sum()
    assert system.computed_tokens(TEXTS, Setting(4)) == 4 * tokens.lengths.max()


def test_lengths_agree_with_sentence_transformers(minilm: Checkpoint) -> None:
    reference = runtimes.build(REFERENCE, "float32", minilm, Path())
    texts = [*TEXTS, "word " * 1000]
    lengths = minilm.tokenize(texts).lengths
    assert minilm.max_length == reference.model.max_seq_length == lengths.max()
    assert reference.computed_tokens(texts, Setting(1)) == lengths.sum()


@pytest.mark.slow
def test_breakdown(run: Callable[..., dict[str, Any]]) -> None:
    (row,) = run("encode.breakdown")["rows"]
    # The rest is what is left of the whole: less than nothing where a part is counted twice.
    for times in row["passes"]:
        assert all(times[part] > 0 for part in (*breakdown.PARTS, breakdown.REST))
    shares = [times["attention"] / times["all"] for times in row["passes"]]
    assert row["shares"]["attention"] == pytest.approx(np.median(shares))
    has_peak = platform.machine() == "x86_64" and shutil.which("c++") is not None
    assert len(row["peaks"]) == (2 if has_peak else 0)
    assert (row["fma_peak_gflops"] is not None) == has_peak


@pytest.mark.slow
def test_the_cost_of_comparisons(run: Callable[..., dict[str, Any]]) -> None:
    document = run("encode.comparison")
    samples = document["one_text"]["samples"]
    assert len(samples["checked"]) == len(samples["unchecked"]) == 200
    assert document["corpus"]["comparisons"] == 1


@pytest.mark.slow
def test_reranking(run: Callable[..., dict[str, Any]]) -> None:
    rows = run("encode.rerank")["rows"]
    assert [row["system"] for row in rows] == [REFERENCE, OURS]
    assert all(len(row["samples"]["short"]) == 2 * rerank.CALLS for row in rows)
    assert rows[0]["batch_size"] and rows[1]["ratios"]["float32"]["all"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("task", training.TASKS)
def test_training(run: Callable[..., dict[str, Any]], tiny: Checkpoint, task: str) -> None:
    chosen = ("--task", task, "--texts", "64", "--model", str(tiny.path))
    rows = run("encode.training", *chosen)["rows"]
    assert [row["system"] for row in rows] == [REFERENCE, OURS]
    assert rows[0]["loss"] == 0 < rows[1]["loss"] < training.LOSS
    assert rows[1]["ratio"] > 0 and min(row["peak_rss_mb"] for row in rows) > 0


def test_breakdown_refuses_a_model_that_does_not_run_packed() -> None:
    encoder = SimpleNamespace(encode=lambda texts: None)
    with pytest.raises(RuntimeError, match=r"no linear layers, attention, .*, tokenising: "):
        breakdown.profile(encoder, TEXTS)
