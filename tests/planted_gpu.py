"""A GPU that is not there, beside a library of CUDA ops that loads: for tests of what is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sbert_fast.ops import extension

TARGETS = ("8.0", "8.6", "9.0a", "10.0", "12.0+PTX")
LOADED = extension.Extension("_C_cuda", Path("_C_cuda.so"), None, "13.0", TARGETS)


def plant(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (9, 0),
    library: extension.Extension = LOADED,
) -> None:
    """Make torch tell of one GPU, and `library` the CUDA ops."""
    monkeypatch.setattr(extension, "CUDA", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(extension, "capability_of", lambda index: capability)
