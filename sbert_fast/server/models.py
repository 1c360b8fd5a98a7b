"""The models of a server: each with its queue, its tokenizer and what tells of it."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from sentence_transformers import SparseEncoder

from sbert_fast.arguments import check_device
from sbert_fast.inference import Pipeline, Ready
from sbert_fast.pairs import PairTokenizer
from sbert_fast.patching import accelerate
from sbert_fast.pending import Work
from sbert_fast.queueing import BatchQueue
from sbert_fast.sentence_transformers.cross_encoder import FastCrossEncoder
from sbert_fast.sentence_transformers.encoder import FastEncoder
from sbert_fast.server.errors import Refusal
from sbert_fast.stats import EncoderStats
from sbert_fast.tokenization import TextTokenizer
from sbert_fast.transformer_module import formats
from sbert_fast.values import check_model

# Three tokens of nearly every tokenizer, of which one means nothing.
_PROBE = "ok"
_READ_SECONDS = 1.0
# Lengths from here on are no limits: sys.maxsize, infinity, a placeholder of transformers.
_NO_LENGTH = (1 << 31) - 1
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
        max_length: most tokens of a text, or of a pair; None if there is no limit.
        width: numbers that a token is embedded in.
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
        self.prompts: dict[str, str] = dict(getattr(model, "prompts", None) or {})
        self.dimension = None
        if self.kind in ("embedding", "sparse"):
            named = "get_embedding_dimension", "get_sentence_embedding_dimension"
            self.dimension = next(getattr(model, n)() for n in named if hasattr(model, n))
        self._backend = _tokenizer(model)
        self._cutting: tuple[TextTokenizer, TextTokenizer] | None = None
        self._expected = self.run_probe()
        self._pipeline, self._read = None, -_READ_SECONDS
        pipeline = self._present()
        self.batch_tokens = 0 if pipeline is None else model._session.token_budget(pipeline)
        self.max_length = _max_length(model, pipeline)
        self.width = self.dimension or 0
        if pipeline is not None:
            self.width = pipeline.engine.architecture.hidden_size

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

    def work_of(
        self,
        inputs: list[Any],
        options: dict[str, Any],
        side: str = "right",
        *,
        truncate: bool = True,
    ) -> Work:
        """A call for texts or pairs of texts.

        Args:
            inputs: texts, or pairs of them.
            options: of `encode` or `predict`.
            side: where texts that are too long lose tokens.
            truncate: whether they may; otherwise they are refused.

        Raises:
            Refusal: a text is too long, or this model cannot cut it on that side.
        """
        prompt = self.model._resolve_prompt(options.get("prompt"), options.get("prompt_name"))
        if prompt is not None:
            options = {**options, "prompt": prompt}
        is_text, pipeline = isinstance(inputs[0], str), self._present()
        if pipeline is not None and is_text == isinstance(self.model, FastEncoder):
            work = self.model.packed_work(pipeline, inputs, options, prompt)
            if work.truncated and not truncate:
                raise self._too_long()
            if work.truncated and side == "left":
                self._cut_left(work, pipeline.tokenizer, prompt or "")
            return work
        if side == "left":
            raise Refusal("backend", "this model cuts such texts on the right alone")
        if not truncate:
            self._check_lengths(inputs, prompt or "")
        if not self.is_packed:
            sizes = [1 + len(text) // 4 for text in inputs]
            return Work(inputs, sizes, None, options, owner=self.model)
        alone = is_text and not isinstance(self.model, FastEncoder)
        return self.model.work_of(inputs[0] if alone else inputs, options)

    def _too_long(self) -> Refusal:
        return Refusal("validation", f"`inputs` must have less than {self.max_length} tokens each")

    def _check_lengths(self, inputs: list[Any], prompt: str) -> None:
        """Refuse what sentence-transformers would cut.

        Raises:
            Refusal: a text is too long, or nobody can tell.
        """
        if self.max_length is None:
            return
        if formats(self.model[0]):
            raise Refusal("backend", "texts of this model cannot be counted: let it truncate them")
        texts = [
            prompt + each if isinstance(each, str) else (prompt + each[0], each[1])
            for each in inputs
        ]
        if any(len(found) > self.max_length for found in self.tokenizer.encode_batch_fast(texts)):
            raise self._too_long()

    def _present(self) -> Pipeline | None:
        """What runs the model. Whether it is still that is looked at by every batch, not by every
        call: if it is not, texts are tokenised again."""
        now = time.monotonic()
        if self.is_packed and now - self._read >= _READ_SECONDS:
            self._pipeline, self._read = self.model.packed_pipeline, now
        return self._pipeline

    def _cut_left(self, work: Work, tokenizer: TextTokenizer, prompt: str) -> None:
        """Put the ends of texts in place of their beginnings.

        Raises:
            Refusal: a template, or sentence-transformers, decides what is cut.
        """
        found = self.model._asked(list(work.inputs), dict(work.options))[2]
        packed = isinstance(found, Pipeline)
        if not packed or type(tokenizer) not in (TextTokenizer, PairTokenizer):
            raise Refusal("backend", "this model cuts texts on the right alone")
        if self._cutting is None or self._cutting[0] is not tokenizer:
            self._cutting = tokenizer, _cutting_left(tokenizer)
        cutting, texts = self._cutting[1], list(work.inputs)
        tokens = cutting(cutting.prepend(prompt, texts) if prompt else texts)
        work.inputs, work.sizes = Ready(texts, None, tokens), tokens.lengths.tolist()
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


def _cutting_left(tokenizer: TextTokenizer) -> TextTokenizer:
    """A copy that keeps the ends of texts."""
    own = copy.deepcopy(tokenizer._tokenizer)
    own.truncation_side = "left"
    return type(tokenizer)(own, tokenizer.max_length)


def _max_length(model: Any, pipeline: Pipeline | None) -> int | None:
    """Most tokens of a text; None if there is no limit."""
    length: float | None = None if pipeline is None else pipeline.tokenizer.max_length
    for name in ("max_seq_length", "max_length"):
        length = length or getattr(model, name, None)
    return None if length is None or length >= _NO_LENGTH else int(length)


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
