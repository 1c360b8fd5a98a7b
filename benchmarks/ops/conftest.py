"""Options of the op benchmarks, and the file that takes a row as soon as it is measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common import provenance, results, stopwatch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("op benchmarks")
    group.addoption("--rows", type=Path, metavar="FILE", help="append each row there, as JSON")
    group.addoption("--samples", type=int, default=stopwatch.SAMPLES, help="of each system")
    group.addoption("--tokens", type=int, help="of a cold row (default: by the device)")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest-benchmark is needed: pip install pytest-benchmark")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def options(pytestconfig: pytest.Config, device: torch.device) -> SimpleNamespace:
    """How to measure: `tokens`, `samples`; `copy_rate`, bytes a second of a large copy, read and
    written ones counted; `record`, which appends to the file of rows, from its first line on,
    which says where they come from."""
    path = pytestconfig.getoption("rows")

    def record(kind: str, line: dict[str, Any]) -> None:
        results.append(path, kind, {"benchmark": "ops"} | line)

    record("run", provenance.provenance(torch.get_num_threads(), device.type))
    return SimpleNamespace(
        tokens=pytestconfig.getoption("tokens"),
        samples=pytestconfig.getoption("samples"),
        copy_rate=stopwatch.copy_bandwidth(device, 1 << 30 if device.type == "cuda" else 1 << 27),
        record=record,
    )
