"""The launchers of Triton kernels."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sbert_fast import kernels


def test_one_thread_launches_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch compiles and loads a kernel, which Triton leaves half done meanwhile."""
    inside: list[int] = []
    most: list[int] = []

    def add_norm(x: torch.Tensor) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return x

    module = SimpleNamespace(add_norm=add_norm)
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: module)
    launch, barrier = kernels.launcher("add_norm"), threading.Barrier(8)

    def work(index: int) -> int:
        barrier.wait()
        return int(launch(torch.tensor(index)))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))
    assert most == [1] * 8
