"""Processes forked from one that has loaded a model, or encoded: they work, and never hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import fork_cases
from checks import assert_same_vectors

CASES = [(s, model, way) for s in fork_cases.SITUATIONS for model, way in fork_cases.cases(s)]


class Runs:
    """One process a situation, started when the first of its cases is asked for."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.of = cache(self._run)

    def _run(self, situation: str) -> Path:
        out = self.folder / situation
        out.mkdir()
        command = f"import fork_cases; fork_cases.main({self.model!r}, {situation!r}, {str(out)!r})"
        paths = [str(Path(__file__).parent), *filter(None, sys.path)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "2",
            # Threads of several processes share the cores: none may spin.
            "OMP_WAIT_POLICY": "passive",
            "HF_HOME": str(self.folder),
            "TOKENIZERS_PARALLELISM": "",
        }
        subprocess.run([sys.executable, "-c", command], env=environment, check=True, timeout=900)
        return out


@pytest.fixture(scope="module")
def runs(minilm_path: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(minilm_path, tmp_path_factory.mktemp("forks"))


@pytest.fixture(scope="module")
def expected(st_minilm: SentenceTransformer) -> np.ndarray:
    return st_minilm.encode(fork_cases.TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize(("situation", "model", "way"), CASES)
def test_a_forked_child_encodes(
    runs: Runs, expected: np.ndarray, situation: str, model: str, way: str
) -> None:
    out = runs.of(situation)
    errors = json.loads((out / "errors.json").read_text(encoding="utf-8"))
    case = f"{model}, {way}"
    assert case not in errors, errors[case]
    assert_same_vectors(np.load(out / f"{case}.npy"), expected)
