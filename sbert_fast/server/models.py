"""The models of a server: each with its queue, its tokenizer and what tells of it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from sentence_transformers import SparseEncoder

from sbert_fast.arguments import check_device
from sbert_fast.inference import Pipeline, Ready
from sbert_fast.patching import accelerate
from sbert_fast.pending import Work
from sbert_fast.queueing import BatchQueue
from sbert_fast.sentence_transformers.cross_encoder import FastCrossEncoder
from sbert_fast.sentence_transformers.encoder import FastEncoder
from sbert_fast.server.errors import Refusal
from sbert_fast.stats import EncoderStats
from sbert_fast.tokenization import TokenizedTexts
from sbert_fast.values import check_model

# Three tokens of nearly every tokenizer, of which one means nothing.
_PROBE = "ok"
_READ_SECONDS = 1.0
_SPARSE = ("SpladePooling", "SparseStaticEmbedding")


class Served:
    """A model of a server.

    Args:
        name: what clients call it.
        model: what runs.

    Attributes:
        kind: "embedding", "sparse", "reranker" or "classifier".
        queue: where calls wait for it.
        batch_tokens: most tokens of a batch; 0 where sentence-transformers runs the model.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model
        self.kind = "embedding"
        if isinstance(model, FastCrossEncoder):
            self.kind = "reranker" if model.num_labels == 1 else "classifier"
        elif isinstance(model, SparseEncoder):
            self.kind = "sparse"
        self.is_packed = isinstance(model, (FastEncoder, FastCrossEncoder))
        self.queue = model.queue if self.is_packed else BatchQueue(_SparseRunner(model))
        lengths = (getattr(model, name, None) for name in ("max_seq_length", "max_length"))
        self.max_length = next((int(length) for length in lengths if length), 512)
        self.prompts: dict[str, str] = dict(getattr(model, "prompts", None) or {})
        self.dimension = None
        if self.kind in ("embedding", "sparse"):
            named = "get_embedding_dimension", "get_sentence_embedding_dimension"
            self.dimension = next(getattr(model, n)() for n in named if hasattr(model, n))
        self._backend = _tokenizer(model)
        self._expected = self.run_probe()
        self._pipeline, self._read = None, -_READ_SECONDS
        pipeline = self._present()
        self.batch_tokens = 0 if pipeline is None else model._session.token_budget(pipeline)

    @property
    def stats(self) -> EncoderStats:
        return self.model.stats if self.is_packed else EncoderStats()

    @property
    def dtype(self) -> str:
        dtype = getattr(self.model, "compute_dtype", None) or self.model.dtype
        return str(dtype).removeprefix("torch.")

    @property
    def labels(self) -> dict[int, str]:
        """The names of the scores of a cross-encoder."""
        named = getattr(self.model.config, "id2label", None) or {}
        return {int(index): str(label) for index, label in named.items()}

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """A tokenizer of this server's own, which neither cuts nor pads.

        Raises:
            Refusal: the model has none that is fast.
        """
        if self._backend is None:
            raise Refusal("backend", "the tokenizer of this model cannot be asked")
        return self._backend

    def work_of(self, inputs: list[Any], options: dict[str, Any], side: str = "right") -> Work:
        """A call for texts or pairs of texts.

        Args:
            inputs: texts, or pairs of them.
            options: of `encode` or `predict`.
            side: where texts that are too long lose tokens.
        """
        if not self.is_packed:
            sizes = [1 + len(text) // 4 for text in inputs]
            return Work(inputs, sizes, None, options, owner=self.model)
        prompt, is_text = options.get("prompt"), isinstance(inputs[0], str)
        pipeline = self._present()
        if pipeline is not None and is_text == isinstance(self.model, FastEncoder):
            work = self.model.packed_work(pipeline, inputs, options, prompt)
        else:
            alone = is_text and not isinstance(self.model, FastEncoder)
            work = self.model.work_of(inputs[0] if alone else inputs, options)
        if side == "left" and work.truncated:
            self._cut_left(work, prompt or "")
        return work

    def _present(self) -> Pipeline | None:
        """What runs the model. Whether it is still that is looked at by every batch, not by every
        call: if it is not, texts are tokenised again."""
        now = time.monotonic()
        if self.is_packed and now - self._read >= _READ_SECONDS:
            self._pipeline, self._read = self.model.packed_pipeline, now
        return self._pipeline

    def _cut_left(self, work: Work, prompt: str) -> None:
        if not isinstance(work.inputs, Ready):
            raise Refusal("backend", "this model cuts texts on the right alone")
        backend = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        backend.enable_truncation(self.max_length, strategy="longest_first", direction="left")
        pairs = [text if isinstance(text, (list, tuple)) else prompt + text for text in work.inputs]
        found = backend.encode_batch([tuple(p) if isinstance(p, list) else p for p in pairs])
        chunks = [
            (
                np.array(encoding.ids, dtype=np.int32),
                np.array([len(encoding.ids)], dtype=np.int32),
                np.array(encoding.type_ids, dtype=np.int32) if any(encoding.type_ids) else None,
                int(bool(encoding.overflowing)),
            )
            for encoding in found
        ]
        tokens = TokenizedTexts.of(chunks)
        work.inputs, work.sizes = Ready(work.inputs, None, tokens), tokens.lengths.tolist()
        # Apart from calls whose tokens another tokenizer may make again.
        work.key = (work.key, "left")

    def run_probe(self) -> Any:
        """The result for a short text, without the queue."""
        text: Any = (_PROBE, _PROBE) if self.kind in ("reranker", "classifier") else _PROBE
        if self.kind == "sparse":
            return self.model.encode([text], convert_to_sparse_tensor=False).cpu().numpy()
        return getattr(self.model, self.model.method)([text], show_progress_bar=False)

    def probe(self) -> Work:
        """A call for the same, without tokens to count."""
        text: Any = (_PROBE, _PROBE) if self.kind in ("reranker", "classifier") else _PROBE
        work = self.work_of([text], {"show_progress_bar": False} if self.is_packed else {})
        return work

    def is_as_expected(self, result: Any) -> bool:
        """Whether a result of :meth:`probe` is that of the start, bit for bit."""
        if self.kind == "sparse":
            result = result.to_dense().cpu().numpy()
        return bool(np.array_equal(np.asarray(result), np.asarray(self._expected)))


class _SparseRunner:
    """Runs the calls that wait for a SparseEncoder, each alone: its results depend on padding."""

    def __init__(self, model: SparseEncoder) -> None:
        self._model = model

    def join(self, parts: list[Any]) -> Any:
        raise NotImplementedError

    def finish(self, work: Work, parts: list[Any]) -> Any:
        raise NotImplementedError

    def run(self, inputs: Any, options: dict[str, Any]) -> Any:
        result = self._model.encode(inputs, show_progress_bar=False, **options)
        if not torch.isfinite(result.coalesce().values()).all():
            raise Refusal("nonfinite", "a sparse embedding is not finite")
        return result


def _tokenizer(model: Any) -> tokenizers.Tokenizer | None:
    backend = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
    if backend is None:
        return None
    own = tokenizers.Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    return own


def load(
    name: str,
    path: str,
    *,
    reranks: bool = False,
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int | str = "auto",
    revision: str | None = None,
) -> Served:
    """Load a model and run it once.

    Args:
        name: what clients call it.
        path: folder, or name on the Hub.
        reranks: whether it is a cross-encoder.
        device, dtype, batch_tokens: as :class:`FastEncoder` takes them.
        revision: of the Hub.

    Raises:
        ValueError, OSError: there is no such model, or it cannot be run as asked.
    """
    check_model("model", path)
    if device is not None:
        check_device("device", device)
    how: dict[str, Any] = {"device": device, "revision": revision}
    own: dict[str, Any] = {"dtype": dtype, "batch_tokens": batch_tokens}
    if reranks:
        # Scores are activated by the routes, some of which want them raw.
        model: Any = FastCrossEncoder(path, activation_fn=torch.nn.Identity(), **how, **own)
    elif _is_sparse(path):
        model = SparseEncoder(path, **how)
        accelerate(model)
    else:
        model = FastEncoder(path, **how, **own)
    if hasattr(model, "warmup"):
        model.warmup()
    return Served(name, model)


def _is_sparse(path: str) -> bool:
    """Whether a folder holds a SparseEncoder. Names on the Hub are taken for embedding models."""
    file = Path(path) / "modules.json"
    if not file.is_file():
        return False
    modules = json.loads(file.read_text(encoding="utf-8"))
    return any(str(module.get("type", "")).endswith(_SPARSE) for module in modules)


def name_of(model: str) -> tuple[str, str]:
    """The name and the path that an argument `NAME=PATH` or `PATH` means."""
    name, equals, path = model.partition("=")
    if equals and name and not os.path.exists(model):
        return name, path
    return (os.path.basename(os.path.normpath(model)) if os.path.isdir(model) else model), model
