"""Loads the compiled CPU ops, once, and remembers why where that is impossible."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Extension:
    """A compiled library: `path` where it was found, `reason` where it cannot be used."""

    name: str
    path: Path | None
    reason: str | None

    @property
    def available(self) -> bool:
        return self.reason is None


def _load(name: str) -> Extension:
    found = sorted(_PACKAGE.glob(f"{name}.*so")) + sorted(_PACKAGE.glob(f"{name}.pyd"))
    if not found:
        return Extension(name, None, f"sbert_fast/{name} was not built (see `sbert-fast doctor`)")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return Extension(
            name, found[0], f"{found[0].name} does not load beside this torch: {error}"
        )
    return Extension(name, found[0], None)


CPU = _load("_C")
