"""Tests of `benchmarks/` and `tools/`: the only ones that import these, which nobody installs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import cuda_emulation
import families
from sbert_fast.ops import extension

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# The last one takes the root off the path again.
for package in ("tools", "benchmarks"):
    importlib.import_module(package)

from benchmarks.common import checkpoints, tree  # noqa: E402
from sbert_fast.bench.checkpoint import Checkpoint  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny BERT with random weights."""
    scratch = tmp_path_factory.mktemp("model")
    families.make_tokenizer("bert").save_pretrained(scratch / "tokenizer")
    checkpoints.make_random("random-tiny", scratch / "tokenizer", scratch / "model", SIZES)
    return Checkpoint(scratch / "model", threads=1)


@pytest.fixture(autouse=True)
def path_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tests write what tells Python of the source tree."""
    monkeypatch.setattr(tree, "PATH_HOOK", tmp_path / "path")
    return tree.PATH_HOOK


@pytest.fixture(scope="session")
def minilm(minilm_path: str) -> Checkpoint:
    return Checkpoint(Path(minilm_path), threads=1)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA ops compiled for a CPU."""
    if (reason := cuda_emulation.unavailable()) is not None:
        pytest.skip(reason)
    loaded = extension.load_emulated_cuda(cuda_emulation.library())
    assert loaded.available, loaded.reason
    monkeypatch.setattr(extension, "CUDA", loaded)
