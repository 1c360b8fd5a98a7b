"""Options of the op benchmarks, and the file that takes a row as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import provenance
import pytest
import rows
import stopwatch
import torch


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
def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written ones counted."""
    size = 1 << 30 if device.type == "cuda" else 1 << 27
    return stopwatch.copy_bandwidth(device, size)


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config, device: torch.device) -> Callable[..., None]:
    """Appends to the file of rows; its first line says where they come from."""
    path = pytestconfig.getoption("rows")

    def store(kind: str, line: dict[str, Any]) -> None:
        rows.append(path, kind, {"benchmark": "ops"} | line)

    store("run", provenance.provenance(torch.get_num_threads(), device.type))
    return store
