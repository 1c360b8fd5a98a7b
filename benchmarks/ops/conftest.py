"""Options of the op benchmarks, and the file that takes a row as soon as it is measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common import provenance, stopwatch, storage


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("op benchmarks")
    group.addoption("--rows", type=Path, metavar="FILE", help="append each row there, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest-benchmark is needed: pip install pytest-benchmark")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def options(pytestconfig: pytest.Config, device: torch.device) -> SimpleNamespace:
    """What rows need: `copy_rate`, bytes a second of a large copy, read and written ones counted;
    `record`, which appends to the file of rows; its first line says where they come from."""
    path = pytestconfig.getoption("rows")

    def record(kind: str, line: dict[str, Any]) -> None:
        storage.append(path, kind, {"benchmark": "ops"} | line)

    record("run", provenance.provenance(torch.get_num_threads(), device.type))
    size = 1 << 30 if device.type == "cuda" else 1 << 27
    return SimpleNamespace(copy_rate=stopwatch.copy_bandwidth(device, size), record=record)
