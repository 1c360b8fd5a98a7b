"""Length-sorted padded batches over a bare forward pass, for runtimes without an encoder."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Inputs = dict[str, NDArray[np.int64]]
Forward = Callable[[Inputs], NDArray[np.float32]]


class NotAvailable(Exception):
    """A system that cannot be measured here; the message says why."""


class ModelFolder:
    """A sentence-transformers model on disk, and what a driver of its weights must know.

    Args:
        path: folder with config.json, modules.json, model.safetensors and tokenizer.json.
        threads: CPU threads of every system built from it.

    Raises:
        ValueError: a file is missing.
    """

    def __init__(self, path: Path, threads: int) -> None:
        for name in ("config.json", "modules.json", "model.safetensors", "tokenizer.json"):
            if not path.joinpath(name).is_file():
                raise ValueError(f"model must be a folder with {name}, got {path}")
        self.path, self.threads = path, threads
        self.config = self._json("config.json")
        modules = self._json("modules.json")
        self._kinds = [module["type"].rpartition(".")[2] for module in modules]
        self._pooling = {}
        if "Pooling" in self._kinds:
            folder = modules[self._kinds.index("Pooling")]["path"]
            self._pooling = self._json(f"{folder}/config.json")

    def _json(self, name: str) -> Any:
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def weights_sha256(self) -> str:
        """SHA-256 of the weights."""
        with self.path.joinpath("model.safetensors").open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def normalizes(self) -> bool:
        """Whether the model's own modules end with L2 normalisation."""
        return self._kinds[-1] == "Normalize"

    @property
    def max_length(self) -> int:
        """Tokens kept of a text, special tokens included, as sentence-transformers reads it."""
        own = self._json("sentence_bert_config.json").get("max_seq_length")
        limit = self._json("tokenizer_config.json").get("model_max_length", 1 << 60)
        return int(own or min(limit, self.config["max_position_embeddings"]))

    @cached_property
    def tokenizer(self) -> Any:
        """The Rust tokenizer, truncating and not padding."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)
        return tokenizer

    def tokenize(self, texts: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids of all texts, one after the other, and the length of each, with special tokens."""
        encodings = self.tokenizer.encode_batch_fast(texts)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        flat = chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(flat, np.int64, int(lengths.sum())), lengths

    def check_mean_pooling(self) -> None:
        """Raise :class:`NotAvailable` unless the model is a transformer with mean pooling."""
        mode = self._pooling.get("pooling_mode")
        if mode is None:
            mode = [k for k, on in self._pooling.items() if k.startswith("pooling_mode_") and on]
        shape = self._kinds[:2] == ["Transformer", "Pooling"] and len(self._kinds) <= 3
        if not shape or mode not in ("mean", ["mean"], ["pooling_mode_mean_tokens"]):
            raise NotAvailable("its driver pools by the mean and nothing else")


class Setting(NamedTuple):
    """How a system is run: rows of a batch, and batches computed at the same time."""

    batch_size: int = 0
    workers: int = 1

    def __str__(self) -> str:
        return f"{self.batch_size}" + (f" x {self.workers}" if self.workers > 1 else "")


class Padded:
    """A bare forward pass behind length-sorted padded batches, masked mean and L2.

    Args:
        folder: where tokenizer and limits come from.
        make_forward: from a number of workers, which share the threads evenly, to what each of
            them calls: int64 `[B, S]` arrays by name to last hidden states, float32 `[B, S, E]`,
            valid until the worker's next call.
        workers: numbers of workers that it supports.
    """

    batch_sizes = True

    def __init__(
        self,
        folder: ModelFolder,
        make_forward: Callable[[int], Forward],
        workers: tuple[int, ...] = (1,),
    ) -> None:
        self.folder, self.workers = folder, workers
        self._forward = cache(make_forward)

    def encode(self, texts: list[str], setting: Setting) -> NDArray[np.float32]:
        ids, lengths = self.folder.tokenize(texts)
        starts = np.cumsum(lengths) - lengths
        out = np.empty((len(texts), self.folder.config["hidden_size"]), np.float32)
        pad = self.folder.config.get("pad_token_id") or 0
        forward = self._forward(setting.workers)

        def run(rows: NDArray[np.int64]) -> None:
            mask = np.arange(lengths[rows[0]]) < lengths[rows, None]
            padded = np.full(mask.shape, pad, np.int64)
            padded[mask] = np.concatenate([ids[starts[i] : starts[i] + lengths[i]] for i in rows])
            hidden = forward(
                {
                    "input_ids": padded,
                    "attention_mask": mask.astype(np.int64),
                    "token_type_ids": np.zeros_like(padded),
                }
            )
            pooled = (mask[:, None].astype(np.float32) @ hidden)[:, 0] / lengths[rows, None]
            out[rows] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

        batches = _sorted_batches(lengths, setting.batch_size)
        if setting.workers == 1:
            for rows in batches:
                run(rows)
            return out
        with ThreadPoolExecutor(setting.workers) as pool:
            deque(pool.map(run, batches), maxlen=0)
        return out

    def forget(self) -> None:
        """Load the model anew: runtimes keep what they made for every shape, which is gigabytes."""
        self._forward.cache_clear()

    def computed_tokens(self, texts: list[str], setting: Setting) -> int:
        _, lengths = self.folder.tokenize(texts)
        batches = _sorted_batches(lengths, setting.batch_size)
        return sum(int(lengths[rows[0]]) * len(rows) for rows in batches)


def _sorted_batches(lengths: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Rows of each batch, longest text first."""
    order = np.argsort(-lengths, kind="stable")
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))
