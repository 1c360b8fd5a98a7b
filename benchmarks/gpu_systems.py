"""The systems of the encode benchmark on a GPU.

Each embeds texts (scope s1: strings to L2-normalised float32 numpy rows, in input order) and, where
it can, prepared ids (scope s3: ids on the device to L2-normalised rows on the device, in the order
of its batches). On a CPU all of them run too, for checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import unpadded
from numpy.typing import NDArray
from padded import ModelFolder
from report import OURS, OURS_CUDA, REFERENCE, UNPADDED
from torch import Tensor

COMPILED = "torch-compile"


@dataclass
class Tokens:
    """Tokenised texts: all ids, one text after the other, and the length of each."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = np.cumsum(self.lengths) - self.lengths

    def of(self, row: int) -> list[int]:
        return self.ids[self.starts[row] : self.starts[row] + self.lengths[row]].tolist()

    def batches(self, size: int) -> list[NDArray[np.int64]]:
        """Texts of each batch, longest first."""
        order = np.argsort(-self.lengths, kind="stable")
        return [order[i : i + size] for i in range(0, len(order), size)]


@dataclass
class Staged:
    """Batches on the device.

    Attributes:
        run: computes them all; `[N, E]` in batch order.
        order: int64 `[N]`, the text of each row.
        batch_tokens: tokens computed in each batch, padding included.
    """

    run: Callable[[], Tensor]
    order: NDArray[np.int64]
    batch_tokens: list[int]


class Packed:
    """FastEncoder with its default settings."""

    batch_sizes = False
    implementation = "auto"

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        from sbert_fast import FastEncoder

        self.encoder = FastEncoder(
            str(folder.path), device=str(device), dtype=dtype, impl=self.implementation
        )
        if self.encoder.unsupported_reason:
            raise RuntimeError(f"unaccelerated: {self.encoder.unsupported_reason}")
        self.normalize = not folder.normalizes

    def encode(self, texts: list[str], batch_size: int) -> NDArray[np.float32]:
        out = self.encoder.encode(
            texts, show_progress_bar=False, normalize_embeddings=self.normalize
        )
        if self.encoder.stats.fallbacks:
            raise RuntimeError(f"encode did not run packed: {self.encoder.stats.fallbacks}")
        return out

    def stage(self, tokens: Tokens, batch_size: int) -> Staged:
        from sbert_fast.staging import stage

        staged = stage(
            self.encoder.packed_pipeline, tokens.ids, tokens.lengths, normalize=self.normalize
        )
        return Staged(staged.run, staged.order, staged.batch_tokens)


class PackedCuda(Packed):
    """FastEncoder on the ops in CUDA C++."""

    implementation = "cuda"


class SentenceTransformers:
    """SentenceTransformer, unpatched, padded."""

    batch_sizes = True

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device = folder, device
        self.normalize = not folder.normalizes
        self.model = self._load(str(folder.path), dtype).eval()

    def _load(self, path: str, dtype: torch.dtype) -> Any:
        from sentence_transformers import SentenceTransformer

        kwargs = {"dtype": dtype, "attn_implementation": "sdpa"}
        return SentenceTransformer(path, device=str(self.device), model_kwargs=kwargs)

    def encode(self, texts: list[str], batch_size: int) -> NDArray[np.float32]:
        return self.model.encode(
            texts,
            batch_size=batch_size,
            show_progress_bar=False,
            normalize_embeddings=self.normalize,
        )

    def features(self, tokens: Tokens, rows: NDArray[np.int64]) -> dict[str, Any]:
        """What the model's forward takes, on the host."""
        mask = np.arange(tokens.lengths[rows].max()) < tokens.lengths[rows, None]
        ids = np.full(mask.shape, self.folder.config.get("pad_token_id") or 0, np.int64)
        ids[mask] = np.concatenate([tokens.of(row) for row in rows])
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "token_type_ids": torch.zeros(ids.shape, dtype=torch.int64),
        }

    def forward(self, features: dict[str, Any]) -> Tensor:
        """Embeddings of a batch, not yet normalised where the model does not."""
        return self.model(features)["sentence_embedding"]

    def stage(self, tokens: Tokens, batch_size: int) -> Staged:
        batches = tokens.batches(batch_size)
        staged = [
            {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in features.items()}
            for features in (self.features(tokens, rows) for rows in batches)
        ]

        @torch.inference_mode()
        def run() -> Tensor:
            out = torch.cat([self.forward(dict(features)) for features in staged])
            return F.normalize(out, dim=1) if self.normalize else out

        sizes = [features["input_ids"].numel() for features in staged]
        return Staged(run, np.concatenate(batches), sizes)


class Unpadded(SentenceTransformers):
    """SentenceTransformer on packed batches, see unpadded.py."""

    def _load(self, path: str, dtype: torch.dtype) -> Any:
        return unpadded.load(path, self.device, dtype)

    def features(self, tokens: Tokens, rows: NDArray[np.int64]) -> dict[str, Any]:
        features = dict(self.model[0].data_collator([{"input_ids": tokens.of(r)} for r in rows]))
        features.pop("labels", None)
        return features


class Compiled(SentenceTransformers):
    """The Hugging Face model compiled with free dimensions; masked mean. Prepared ids only."""

    def _load(self, path: str, dtype: torch.dtype) -> Any:
        from transformers import AutoModel

        self.folder.check_mean_pooling()
        self.normalize = True
        model = AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        self._compiled = torch.compile(self._embed, dynamic=True)
        return model.to(self.device)

    def encode(self, texts: list[str], batch_size: int) -> NDArray[np.float32]:
        raise NotImplementedError("this system runs prepared ids only")

    def _embed(self, **features: Tensor) -> Tensor:
        hidden = self.model(**features).last_hidden_state.float()
        mask = features["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, features: dict[str, Any]) -> Tensor:
        return self._compiled(**features)


SYSTEMS: dict[str, Any] = {
    OURS: Packed,
    OURS_CUDA: PackedCuda,
    REFERENCE: SentenceTransformers,
    UNPADDED: Unpadded,
    COMPILED: Compiled,
}


def cuda_ops(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CUDA ops cannot run on `device` in `dtype`, None where they can, "" where nobody
    would expect them to: on a CPU, and in float32."""
    from sbert_fast import ops

    if dtype == torch.float32 or not (device.type == "cuda" or ops.extension.CUDA.emulated):
        return ""
    return ops.rejection("cuda", device, dtype)
