"""The systems that run on a GPU.

Each embeds texts (scope s1: strings to L2-normalised float32 numpy rows, in input order) and
prepared ids (scope s3: ids on the device to L2-normalised rows on the device, in the order of its
batches). On a CPU all of them run too, for checks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.encode import unpadded
from sbert_fast import ops
from sbert_fast.bench import systems
from sbert_fast.bench.checkpoint import Tokens
from sbert_fast.bench.names import COMPILED, OURS, OURS_CUDA, REFERENCE, UNPADDED
from sbert_fast.bench.systems import NotAvailable, System
from sbert_fast.staging import Staged, stage


class Packed(systems.Packed):
    """FastEncoder with its default settings."""

    def stage(self, tokens: Tokens, batch_size: int) -> Staged:
        pipeline = self.encoder.packed_pipeline
        return stage(pipeline, tokens.ids, tokens.lengths, normalize=self.normalize)


class SentenceTransformers(systems.SentenceTransformers):
    """SentenceTransformer, unpatched, padded."""

    def features(self, tokens: Tokens, rows: NDArray[np.int64]) -> dict[str, Any]:
        """What the model's forward takes, on the host."""
        padded = tokens.padded(rows, self.folder.pad)
        return {name: torch.from_numpy(value) for name, value in padded.items()}

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

    def _load(self) -> Any:
        return unpadded.load(str(self.folder.path), self.device, self.precision)

    def features(self, tokens: Tokens, rows: NDArray[np.int64]) -> dict[str, Any]:
        ids = [{"input_ids": tokens.of(row).tolist()} for row in rows]
        features = dict(self.model[0].data_collator(ids))
        features.pop("labels", None)
        return features


class Compiled(SentenceTransformers):
    """The Hugging Face model compiled with free dimensions; masked mean. Prepared ids only."""

    encode = System.encode

    def _load(self) -> Any:
        from transformers import AutoModel

        if not self.folder.pools_by_mean:
            raise NotAvailable("its driver pools by the mean and nothing else")
        self.normalize = True
        how = {"dtype": getattr(torch, self.precision), "attn_implementation": "sdpa"}
        self._compiled = torch.compile(self._embed, dynamic=True)
        return AutoModel.from_pretrained(self.folder.path, **how).to(self.device)

    def _embed(self, **features: Tensor) -> Tensor:
        hidden = self.model(**features).last_hidden_state.float()
        mask = features["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, features: dict[str, Any]) -> Tensor:
        return self._compiled(**features)


# By name, from a checkpoint, a precision and a device.
SYSTEMS: dict[str, Callable[..., System]] = {
    OURS: Packed,
    OURS_CUDA: partial(Packed, impl="cuda"),
    REFERENCE: SentenceTransformers,
    UNPADDED: Unpadded,
    COMPILED: Compiled,
}


def cuda_ops(device: torch.device, precision: str) -> str | None:
    """Why the CUDA ops cannot run on `device` in `precision`, None where they can, "" where nobody
    would expect them to: on a CPU, and in float32."""
    if precision == "float32" or not (device.type == "cuda" or ops.extension.CUDA.emulated):
        return ""
    return ops.refusal("cuda", device, getattr(torch, precision))
