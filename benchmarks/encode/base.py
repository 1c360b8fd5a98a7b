"""What the systems of the encode benchmark have in common. It imports nothing heavy, so that a
process which runs one system shows that system's memory and no other's."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.folders import Tokens


class NotAvailable(Exception):
    """A system that cannot be measured here; the message says why."""


class Setting(NamedTuple):
    """How a system is run: rows of a batch, and batches computed at the same time."""

    batch_size: int = 0
    workers: int = 1

    def __str__(self) -> str:
        return f"{self.batch_size}" + (f" x {self.workers}" if self.workers > 1 else "")


class System:
    """Something that embeds texts: strings to L2-normalised float32 rows.

    Attributes:
        batch_sizes: whether it takes batch sizes; False where it plans its batches itself.
        workers: how many batches it can compute at the same time.
    """

    batch_sizes = True
    workers: tuple[int, ...] = (1,)

    def encode(self, texts: list[str], setting: Setting) -> NDArray[np.float32]:
        """L2-normalised float32 `[N, E]` in the order of `texts`."""
        raise NotImplementedError

    def stage(self, tokens: Tokens, batch_size: int) -> Any:
        """Prepared ids on the device, as :func:`sbert_fast.staging.stage` makes them."""
        raise NotImplementedError

    def computed_tokens(self, texts: list[str], setting: Setting) -> int | None:
        """Tokens computed, padding included; None where there is no padding."""
        return None

    def forget(self) -> None:
        """Drop what is kept for the shapes of earlier batches."""
