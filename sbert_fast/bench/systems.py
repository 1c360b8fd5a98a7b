"""What a system is, and the two that run everywhere: FastEncoder and sentence-transformers.

Nothing heavy is imported before a system needs it, so that a process which runs one system shows
that system's memory and no other's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sbert_fast.bench.checkpoint import Checkpoint, Tokens
from sbert_fast.errors import SbertFastError


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
        """Prepared ids, as in staging.py, where it takes them."""
        raise NotImplementedError

    def computed_tokens(self, texts: list[str], setting: Setting) -> int | None:
        """Tokens computed, padding included; None where there is no padding."""
        return None

    def forget(self) -> None:
        """Drop what is kept for the shapes of earlier batches."""


class Packed(System):
    """FastEncoder with its default settings, or with `low_memory`.

    Raises:
        NotAvailable: the model does not run packed here in this dtype.
    """

    batch_sizes = False

    def __init__(
        self,
        folder: Checkpoint,
        precision: str,
        device: str = "cpu",
        impl: str = "auto",
        low_memory: bool = False,
    ) -> None:
        from sbert_fast.sentence_transformers.encoder import FastEncoder

        how: Any = {"device": device, "dtype": precision, "impl": impl, "low_memory": low_memory}
        try:
            self.encoder = FastEncoder(str(folder.path), **how)
        except SbertFastError as error:
            raise NotAvailable(str(error)) from error
        if self.encoder.unsupported_reason:
            raise NotAvailable(f"unaccelerated: {self.encoder.unsupported_reason}")
        self.normalize = not folder.normalizes

    def encode(self, texts: list[str], setting: Setting) -> NDArray[np.float32]:
        out = self.encoder.encode(
            texts, show_progress_bar=False, normalize_embeddings=self.normalize
        )
        if self.encoder.stats.fallbacks:
            raise RuntimeError(f"encode did not run packed: {self.encoder.stats.fallbacks}")
        return out


class SentenceTransformers(System):
    """SentenceTransformer, unpatched, padded."""

    def __init__(self, folder: Checkpoint, precision: str, device: str = "cpu") -> None:
        if precision == "int8":
            raise NotAvailable("has no int8 on a CPU")
        self.folder, self.precision, self.device = folder, precision, device
        self.normalize = not folder.normalizes
        self.model = self._load().eval()

    def _load(self) -> Any:
        import torch
        from sentence_transformers import SentenceTransformer

        kwargs = {"dtype": getattr(torch, self.precision)}
        return SentenceTransformer(str(self.folder.path), device=self.device, model_kwargs=kwargs)

    def encode(self, texts: list[str], setting: Setting) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self.model.encode(
            texts,
            batch_size=setting.batch_size,
            show_progress_bar=False,
            normalize_embeddings=self.normalize,
        )
        return rows

    def computed_tokens(self, texts: list[str], setting: Setting) -> int:
        seen: list[int] = []
        hook = self.model[0].register_forward_pre_hook(
            lambda module, args: seen.append(args[0]["input_ids"].numel())
        )
        try:
            self.encode(texts, setting)
        finally:
            hook.remove()
        return sum(seen)
