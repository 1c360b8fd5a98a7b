"""A pytest plugin for tests on a GPU: a failure is printed when it happens, so that a run cut short
has told it, and a process whose device is lost runs no further test."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest

_SECTION = "device"
_lost: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        lines = [f"\nFAILED {report.nodeid} ({report.when})", report.longreprtext]
        lines += [text for name, text in report.sections if name == _SECTION]
        print("\n".join(lines), flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    if report.failed and (why := _device_error()) is not None:
        _lost.append(why)
        report.sections.append((_SECTION, f"the device is lost to this process: {why}"))
    return report


def _device_error() -> str | None:
    """After some errors every call fails until the process ends: such an error, or None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    from sbert_fast.transfer import device_error

    return device_error(torch.device("cuda"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not _lost:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Another worker takes over; it costs this one test, which is reported as crashed.
        os._exit(3)
    pytest.exit(f"the device is lost: {_lost[0]}", returncode=3)
