"""The systems that run on a CPU and on a GPU.

Each embeds texts (scope s1: strings to L2-normalised float32 numpy rows, in input order) and
prepared ids (scope s3: ids on the device to L2-normalised rows on the device, in the order of its
batches). On a CPU all of them run too, for checks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common.checkpoints import Checkpoint, Tokens
from benchmarks.common.text import COMPILED, OURS, OURS_CUDA, REFERENCE, UNPADDED
from benchmarks.encode import unpadded
from benchmarks.encode.runtimes import NotAvailable, Setting, System

if TYPE_CHECKING:
    from sbert_fast.staging import Staged


class Packed(System):
    """FastEncoder with its default settings."""

    batch_sizes = False

    def __init__(
        self, folder: Checkpoint, device: torch.device, dtype: torch.dtype, impl: str = "auto"
    ) -> None:
        from sbert_fast import FastEncoder

        self.encoder = FastEncoder(str(folder.path), device=str(device), dtype=dtype, impl=impl)
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

    def stage(self, tokens: Tokens, batch_size: int) -> Staged:
        from sbert_fast.staging import stage

        pipeline = self.encoder.packed_pipeline
        return stage(pipeline, tokens.ids, tokens.lengths, normalize=self.normalize)


class SentenceTransformers(System):
    """SentenceTransformer, unpatched, padded."""

    def __init__(self, folder: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device = folder, device
        self.normalize = not folder.normalizes
        self.model = self._load(str(folder.path), dtype).eval()

    def _load(self, path: str, dtype: torch.dtype) -> Any:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(path, device=str(self.device), model_kwargs={"dtype": dtype})

    def encode(self, texts: list[str], setting: Setting) -> NDArray[np.float32]:
        return self.model.encode(
            texts,
            batch_size=setting.batch_size,
            show_progress_bar=False,
            normalize_embeddings=self.normalize,
        )

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

    def features(self, tokens: Tokens, rows: NDArray[np.int64]) -> dict[str, Any]:
        """What the model's forward takes, on the host."""
        padded = tokens.padded(rows, self.folder.pad)
        return {name: torch.from_numpy(value) for name, value in padded.items()}

    def forward(self, features: dict[str, Any]) -> Tensor:
        """Embeddings of a batch, not yet normalised where the model does not."""
        return self.model(features)["sentence_embedding"]

    def stage(self, tokens: Tokens, batch_size: int) -> Staged:
        from sbert_fast.staging import Staged

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
        ids = [{"input_ids": tokens.of(row).tolist()} for row in rows]
        features = dict(self.model[0].data_collator(ids))
        features.pop("labels", None)
        return features


class Compiled(SentenceTransformers):
    """The Hugging Face model compiled with free dimensions; masked mean. Prepared ids only."""

    encode = System.encode

    def _load(self, path: str, dtype: torch.dtype) -> Any:
        from transformers import AutoModel

        if not self.folder.pools_by_mean:
            raise NotAvailable("its driver pools by the mean and nothing else")
        self.normalize = True
        model = AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        self._compiled = torch.compile(self._embed, dynamic=True)
        return model.to(self.device)

    def _embed(self, **features: Tensor) -> Tensor:
        hidden = self.model(**features).last_hidden_state.float()
        mask = features["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, features: dict[str, Any]) -> Tensor:
        return self._compiled(**features)


SYSTEMS: dict[str, Callable[..., System]] = {
    OURS: Packed,
    OURS_CUDA: partial(Packed, impl="cuda"),
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
    return ops.refusal("cuda", device, dtype)
