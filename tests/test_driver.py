"""Whether an NVIDIA driver answers, asked of drivers made for the test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import driver  # noqa: E402


class Driver:
    """A libcuda whose two functions return what they are told to."""

    def __init__(self, init: int = 0, counting: int = 0, count: int = 1) -> None:
        self.init, self.counting, self.count = init, counting, count

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.init

    def cuDeviceGetCount(self, pointer: object) -> int:
        assert self.init == 0
        pointer._obj.value = self.count
        return self.counting


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (Driver(), None),
        (Driver(init=100), "does not start (cuInit returned 100)"),
        (Driver(counting=3), "does not count its GPUs (cuDeviceGetCount returned 3)"),
        (Driver(count=0), "the NVIDIA driver has no GPU"),
    ],
)
def test_what_a_driver_answers(found: Driver, reason: str | None) -> None:
    told = driver.unavailable(lambda name: found)
    assert told is None if reason is None else str(told).endswith(reason)


def test_without_a_driver() -> None:
    def load(name: str) -> Driver:
        raise OSError(f"{name}: cannot open shared object file")

    assert driver.unavailable(load) == "there is no NVIDIA driver (libcuda.so.1 does not load)"


def test_the_driver_of_this_machine() -> None:
    command = [sys.executable, str(ROOT / "csrc/driver.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1) and done.stdout.strip()
    if torch.cuda.is_available():
        assert done.returncode == 0
