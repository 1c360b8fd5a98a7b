"""Loads the compiled CPU ops, once, and remembers why where that is impossible."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sbert_fast.ops import schemas

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


def _load(name: str, implementation: str) -> Extension:
    found = sorted(_PACKAGE.glob(f"{name}.*so")) + sorted(_PACKAGE.glob(f"{name}.pyd"))
    if not found:
        return Extension(name, None, f"sbert_fast/{name} was not built (see `sbert-fast doctor`)")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return Extension(
            name, found[0], f"{found[0].name} does not load beside this torch: {error}"
        )
    # A library of another version may lack a kernel, and calling it would crash the process.
    missing = [
        op
        for op in schemas.SCHEMAS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(
            f"{schemas.NAMESPACE}::{op}.{implementation}", "CPU"
        )
    ]
    if missing:
        reason = f"{found[0].name} has no kernel for {', '.join(missing)}: build it again"
        return Extension(name, found[0], reason)
    return Extension(name, found[0], None)


CPU = _load("_C", "cpu")
