"""The benchmarks: results on disk, the correctness gate, the peers. No figure is judged."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import breakdown  # noqa: E402
import encode  # noqa: E402
import gate  # noqa: E402
import padded  # noqa: E402
import peers  # noqa: E402
import process  # noqa: E402
import provenance  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
from padded import ModelFolder, NotAvailable, Setting  # noqa: E402
from report import OURS, REFERENCE  # noqa: E402

from families import make_mpnet  # noqa: E402
from sbert_fast import FastEncoder  # noqa: E402

TEXTS = ["A cat.", "Rain is expected in the north for most of the week.", "", "Why?"]
TINY = ("--texts", "24", "--sweep-texts", "8", "--rounds", "2", "--threads", "1")


@pytest.fixture(scope="module")
def folder(minilm_path: str) -> ModelFolder:
    return ModelFolder(Path(minilm_path), threads=1)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The stored result of a run over a tiny corpus, beside every peer that starts quickly."""
    path = tmp_path_factory.mktemp("results") / "new" / "tiny.json"
    chosen = "sentence-transformers,onnxruntime,openvino,zentorch"
    command = [sys.executable, str(BENCHMARKS / "encode.py"), *TINY, "--latency"]
    command += ["--peers", chosen, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert done.stdout == report.render(stored) + "\n"
    return stored


@pytest.mark.slow
def test_a_result_says_where_it_comes_from(document: dict[str, Any]) -> None:
    assert document["schema"] == provenance.SCHEMA
    assert re.fullmatch(r"[0-9a-f]{64}", document["source_sha256"])
    assert document["device"]["threads"] == document["settings"]["threads"] == 1
    assert len(document["load_average_before"]) == 3
    assert set(document["versions"]) == {"python", *provenance.PACKAGES}
    assert document["versions"]["torch"]
    assert document["model"]["sha256"].startswith("53aa5117")
    assert document["corpus"]["texts"] == 24
    assert document["corpus"]["lengths"].keys() >= {"mean", "p50", "max", "Le"}
    assert document["corpus"]["tokens"] == round(24 * document["corpus"]["lengths"]["mean"])


@pytest.mark.slow
def test_every_system_has_a_row(document: dict[str, Any]) -> None:
    modules = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}
    modules |= {"zentorch": ("zentorch",), OURS: (), REFERENCE: ()}
    modules["openvino"] += ("onnx", "onnxscript")
    rows = {row["system"]: row for row in document["rows"]}
    assert rows.keys() == modules.keys()
    for name, needed in modules.items():
        installed = all(importlib.util.find_spec(module) for module in needed)
        expected = "measured" if installed else "not measured (not installed)"
        assert rows[name]["status"] == expected


@pytest.mark.slow
def test_measured_rows_are_complete(document: dict[str, Any]) -> None:
    assert document["gates"]["float32"]["green"]
    for row in document["rows"]:
        if row["status"] != "measured":
            assert row.keys() == {"system", "precision", "status"}
            continue
        assert len(row["seconds"]) == 2
        low, high = row["iqr_tokens_per_s"]
        assert 0 < low <= row["tokens_per_s"] <= high
        assert row["worst_cosine"] <= row["mean_cosine"]
        assert 1 - row["worst_cosine"] <= gate.FLOAT32_LOSS
        assert row["peak_rss_mb"] >= row["loaded_rss_mb"] > 0
        assert (row["batch"] == "auto") == (row["system"] == OURS)
        assert (row["real_token_share"] is None) == (row["system"] == OURS)
        assert set(row["ratios"]) == (set() if row["system"] == OURS else {"float32"})
    latency = document["latency"]
    assert [row["system"] for row in latency["rows"]] == [OURS, REFERENCE]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in latency["rows"])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "zentorch"])
def test_an_absent_peer_is_named(
    name: str, folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(NotAvailable, match="^not installed$"):
        peers.build(name, "float32", folder, tmp_path / "onnx")


def test_a_peer_that_does_not_load_is_named(
    folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zentorch.py").write_text("raise OSError('wrong torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "zentorch", raising=False)
    with pytest.raises(NotAvailable, match="does not load: OSError: wrong torch"):
        peers.build("zentorch", "float32", folder, tmp_path / "onnx")


class Broken:
    batch_sizes = True
    workers = (1,)

    def encode(self, texts: list[str], setting: Setting) -> np.ndarray:
        raise MemoryError("no room\nand more")

    def forget(self) -> None:
        pass


def test_a_peer_that_fails_is_left_out() -> None:
    entry = timing.Entry("openvino", "float32", system=Broken())
    timing.prepare(entry, TEXTS, TEXTS, 30)
    assert entry.status == "not measured (failed: MemoryError: no room)"
    assert entry.system is None
    ours = timing.Entry(OURS, "float32", system=Broken())
    with pytest.raises(MemoryError):
        timing.prepare(ours, TEXTS, TEXTS, 30)


class Paced:
    """Takes as long as its table says, by a clock of its own."""

    batch_sizes = True

    def __init__(self, pace: dict[Setting, float], workers: tuple[int, ...]) -> None:
        self.pace, self.workers, self.clock = pace, workers, 0.0
        self.remembered: set[Setting] = set()

    def encode(self, texts: list[str], setting: Setting) -> None:
        self.clock += self.pace[setting]
        self.remembered.add(setting)
        assert self.remembered == {setting}, "shapes of one setting at a time"

    def forget(self) -> None:
        self.remembered.clear()


BEST_IN_THE_MIDDLE = {8: 4.0, 16: 3.0, 32: 2.0, 64: 3.0, 128: 4.0}
BEST_BEYOND = {8: 9.0, 16: 8.0, 32: 7.0, 64: 6.0, 128: 5.0, 256: 1.0, 512: 4.5}


@pytest.mark.parametrize(
    ("paces", "best"),
    [
        ([BEST_IN_THE_MIDDLE], Setting(32)),
        ([BEST_BEYOND], Setting(256)),
        ([BEST_IN_THE_MIDDLE, BEST_BEYOND], Setting(256, 2)),
        ([BEST_BEYOND, BEST_IN_THE_MIDDLE], Setting(256)),
    ],
)
def test_the_sweep_goes_on_while_it_gains(
    paces: list[dict[int, float]], best: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = {
        Setting(size, workers): seconds
        for workers, table in enumerate(paces, start=1)
        for size, seconds in table.items()
    }
    system = Paced(pace, workers=tuple(range(1, len(paces) + 1)))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: system.clock)
    entry = timing.Entry("openvino", "float32", system=system)
    timing.find_setting(entry, ["text"] * 1000, tokens=1000)
    assert entry.setting == best
    assert entry.sweep == {setting: 1000 / seconds for setting, seconds in pace.items()}
    assert not system.remembered


def embeddings(ours: float, reference: float) -> dict[tuple[str, str], np.ndarray]:
    """Two unit vectors a system, the second turned so that 1 - cosine is as given."""

    def turned(loss: float) -> np.ndarray:
        cosine = 1 - loss
        return np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)]])

    truth = np.array([[1.0, 0.0], [1.0, 0.0]])
    return {
        (REFERENCE, "float32"): truth,
        (OURS, "float32"): turned(ours),
        (REFERENCE, "bfloat16"): turned(reference),
        (OURS, "bfloat16"): turned(ours),
    }


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
    gates = gate.check(embeddings(ours, reference), ["float32", "bfloat16"])
    assert {precision for precision, each in gates.items() if each["green"]} == green


def test_no_ratio_while_the_gate_is_red() -> None:
    truth = np.eye(2, dtype=np.float32)

    def entry(name: str, precision: str, *seconds: float) -> timing.Entry:
        system = Broken()
        system.batch_sizes = name != OURS
        made = timing.Entry(name, precision, system=system, embeddings=truth)
        made.seconds = list(seconds)
        return made

    entries = [
        entry(OURS, "float32", 1.0, 1.0, 1.0),
        entry(OURS, "bfloat16", 0.5, 0.5, 0.5),
        entry(REFERENCE, "float32", 2.0, 3.0, 8.0),
    ]
    gates = {"float32": {"green": False}, "bfloat16": {"green": True}}
    *ours, reference = timing.rows_of(entries, truth, 10, gates)
    assert [row["ratios"] for row in ours] == [{}, {}]
    assert reference["ratios"] == {"bfloat16": 6.0}


def test_padded_batches_keep_order_and_mean(folder: ModelFolder) -> None:
    def forward(inputs: padded.Inputs) -> np.ndarray:
        """The id of every token beside a 1, and rubbish where there is padding."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        states = np.where(mask == 1, ids, 1e6).astype(np.float32)
        return np.stack([states, np.ones_like(states)], axis=-1)

    folder_of_two = ModelFolder(folder.path, threads=1)
    folder_of_two.config = folder.config | {"hidden_size": 2}
    system = padded.Padded(folder_of_two, lambda workers: forward, workers=(1, 2))
    ids, lengths = folder.tokenize(TEXTS)
    means = [part.mean() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    expected = np.array([[mean, 1] / np.hypot(mean, 1) for mean in means])
    # Sums of ids are exact; the mean, the square, the norm and the quotient round once each.
    for setting in (Setting(1), Setting(3), Setting(4), Setting(1, 2), Setting(3, 2)):
        np.testing.assert_allclose(
            system.encode(TEXTS, setting), expected, rtol=4 * np.finfo(np.float32).eps
        )
    assert system.computed_tokens(TEXTS, Setting(1)) == lengths.sum()
    assert system.computed_tokens(TEXTS, Setting(4)) == 4 * lengths.max()


def test_lengths_agree_with_sentence_transformers(folder: ModelFolder) -> None:
    reference = peers.build(REFERENCE, "float32", folder, Path())
    texts = [*TEXTS, "word " * 1000]
    _, lengths = folder.tokenize(texts)
    assert folder.max_length == reference.model.max_seq_length == lengths.max()
    assert reference.computed_tokens(texts, Setting(1)) == lengths.sum()


def test_a_result_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    provenance.write_json({"rows": []}, path)
    with pytest.raises(ValueError):
        provenance.write_json({"rate": float("nan")}, path)
    assert json.loads(path.read_text()) == {"rows": []}
    assert os.listdir(tmp_path) == ["result.json"]


def test_the_source_hash_follows_the_timed_sources(tmp_path: Path) -> None:
    source = tmp_path / "sbert_fast" / "ops" / "x.py"
    source.parent.mkdir(parents=True)
    source.write_text("a = 1")
    first = provenance.source_hash(tmp_path)
    (tmp_path / "sbert_fast" / "_build_info.py").write_text("MODE = 'auto'")
    (tmp_path / "README.md").write_text("words")
    assert provenance.source_hash(tmp_path) == first
    source.write_text("a = 2")
    second = provenance.source_hash(tmp_path)
    source.rename(source.with_name("y.py"))
    assert len({first, second, provenance.source_hash(tmp_path)}) == 3


def test_threads_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: chosen.append(cpus))
    monkeypatch.setattr(os, "environ", {})
    process.pin(2)
    assert chosen == [[3, 5]]
    assert os.environ["OMP_NUM_THREADS"] == "2"
    with pytest.raises(ValueError, match="threads must be at most 3 here, got 4"):
        process.pin(4)


def test_peers_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(report.PEERS) == {REFERENCE, *peers.ONNX, *peers.TORCH}
    assert encode.parse_args(["--peers", "openvino,zentorch"]).peers == ["openvino", "zentorch"]
    with pytest.raises(SystemExit):
        encode.parse_args(["--peers", "fastest"])
    assert "expected some of sentence-transformers" in capsys.readouterr().err


def test_stored_results_can_be_shown() -> None:
    for file in BENCHMARKS.glob("results/*/*.json"):
        document = json.loads(file.read_text(encoding="utf-8"))
        assert document["schema"] == provenance.SCHEMA
        assert OURS in report.render(document), file


@pytest.mark.slow
def test_breakdown(tmp_path: Path) -> None:
    path = tmp_path / "breakdown.json"
    options = ("--texts", "24", "--rounds", "2", "--threads", "1", "--json", str(path))
    command = [sys.executable, str(BENCHMARKS / "breakdown.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert done.stdout.endswith(report.render(stored) + "\n")
    (row,) = stored["rows"]
    # The rest is what is left of the whole: less than nothing where a part is counted twice.
    for times in row["passes"]:
        assert all(times[part] > 0 for part in (*breakdown.PARTS, breakdown.REST))
    # Query, key, value and output, and the two layers between, of six blocks.
    linears = 4 * 384 * 384 + 2 * 384 * 1536
    assert stored["linear_flops_per_token"] == 2 * 6 * linears
    has_peak = platform.machine() == "x86_64" and shutil.which("c++") is not None
    assert len(row["peaks"]) == (2 if has_peak else 0)


def test_breakdown_refuses_a_model_that_does_not_run_packed() -> None:
    with pytest.warns(UserWarning, match="unaccelerated"):
        encoder = FastEncoder(make_mpnet())
    with pytest.raises(RuntimeError, match=r"no attention, embeddings, pooling, tokenising: "):
        breakdown.profile(encoder, TEXTS)


def test_rates_of_a_breakdown() -> None:
    parts = dict.fromkeys((*breakdown.PARTS, breakdown.REST), 0.5)
    passes = [parts | {"linear layers": 2.0 * slower, "all": 4.0 * slower} for slower in (1, 3, 2)]
    row = breakdown._row("float32", passes, [9.0, 8.0, 10.0], tokens=800, flops=10_000_000)
    assert (row["tokens_per_s"], row["linear_gflops"]) == (100.0, 2.0)
    assert (row["shares"]["linear layers"], row["shares"]["attention"]) == (0.5, 0.0625)
    assert (row["fma_peak_gflops"], row["fma_peak_tokens_per_s"]) == (9.0, 900.0)
    assert breakdown._row("float32", passes, [], tokens=800, flops=1)["fma_peak_gflops"] is None


def test_breakdown_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    peak = breakdown.FmaPeak(tmp_path, threads=1)
    assert peak.reason == "there is no C++ compiler"
    assert peak.measure("float32") is None
