"""From the modules of a SentenceTransformer to the pipeline that runs them packed."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from sbert_fast import models, ops
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.inference import Pipeline
from sbert_fast.pooling import PoolingHead, is_module, read_pooling
from sbert_fast.tokenization import TextTokenizer, tokenizer_state

DEVICES = ("cpu", "cuda")
# transformers' stand-in for "no limit" is far above this.
_NO_LIMIT = 1_000_000_000
# What sentence-transformers takes of the base model, and what it calls that.
_READ = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


def signature(model: SentenceTransformer) -> tuple[Any, ...]:
    """What a pipeline is built from, cheap enough to look at on every call."""
    children = list(model.children())
    first = children[0] if children else None
    pooling = children[1] if len(children) > 1 else None
    base = getattr(first, "auto_model", None)
    return (
        tuple(map(id, children)),
        id(base),
        getattr(getattr(base, "config", None), "_attn_implementation", None),
        *(repr(getattr(first, name, None)) for name in _READ),
        tokenizer_state(getattr(first, "tokenizer", None)),
        getattr(pooling, "pooling_mode", None),
        getattr(pooling, "include_prompt", None),
        model.device,
    )


def build_pipeline(model: SentenceTransformer, dtype: torch.dtype | None, impl: str) -> Pipeline:
    """The packed pipeline of a SentenceTransformer.

    Args:
        model: what to run; its parameters are read, never copied into it.
        dtype: dtype to compute in; None is the dtype of the model.
        impl: implementation of the ops.

    Raises:
        UnsupportedModelError: with the reason.
        ValueError: `max_seq_length` is no length, beyond the position table, or leaves no room for
            the special tokens of a text.
    """
    children = list(model.children())
    if not children or not is_module(children[0], "Transformer"):
        found = type(children[0]).__name__ if children else "nothing"
        raise UnsupportedModelError(f"the first module must be Transformer, got {found}")
    transformer: Any = children[0]
    if model.get_backend() != "torch":
        raise UnsupportedModelError(f"backend must be 'torch', got {model.get_backend()!r}")
    _check_placement(model)
    if model.device.type not in DEVICES:
        raise UnsupportedModelError(
            f"the model is on {model.device}: there are kernels for {' and '.join(DEVICES)}"
        )
    _check_transformer(transformer)
    base = transformer.auto_model
    architecture, _ = models.read(base)
    after = dict(list(model.named_children())[1:])
    spec = read_pooling(after, architecture.hidden_size)
    max_length = _max_length(transformer, architecture.max_tokens)
    engine = PackedEncoder(base, dtype=dtype, impl=impl)
    if model.device.type != "cpu" and impl == "auto" and engine.implementation == "reference":
        raise UnsupportedModelError(f"no kernels run on {model.device}:\n{ops.explain_ops()}")
    return Pipeline(TextTokenizer(transformer.tokenizer, max_length), engine, PoolingHead(spec))


def _check_placement(model: SentenceTransformer) -> None:
    """Refuse models whose parts are on several devices, or come to theirs only when they run."""
    hook = getattr(model, "_accelerate_placement_hook", None)
    devices = {str(parameter.device) for parameter in model.parameters()}
    if hook is not None or (
        getattr(model, "_placement_is_delegated", False) and devices != {str(model.device)}
    ):
        raise UnsupportedModelError(
            f"a device_map or Accelerate hooks control placement, on {', '.join(sorted(devices))}"
        )


def _check_transformer(transformer: Any) -> None:
    """Refuse options of the Transformer module that the packed engine would pass by."""
    for name in ("processing_kwargs", "query_expansion", "query_length", "document_length"):
        if getattr(transformer, name, None):
            raise UnsupportedModelError(f"the Transformer module sets {name}")
    for name, expected in _READ.items():
        found = getattr(transformer, name, expected)
        if found != expected:
            raise UnsupportedModelError(f"Transformer.{name} must be {expected}, got {found}")
    tokenizer = transformer.tokenizer
    if tokenizer is None:
        raise UnsupportedModelError("the Transformer module has no tokenizer")
    if not type(tokenizer).__module__.startswith("transformers."):
        raise UnsupportedModelError(
            f"the tokenizer must be one of transformers, got {type(tokenizer).__module__}."
            f"{type(tokenizer).__qualname__}"
        )
    for holder in (tokenizer, getattr(transformer, "processor", None)):
        if getattr(holder, "chat_template", None):
            raise UnsupportedModelError("the tokenizer has a chat template")


def _max_length(transformer: Any, room: int) -> int:
    """Tokens kept of a text, given the room of the position table."""
    tokenizer = transformer.tokenizer
    value = tokenizer.model_max_length
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, (int, float, np.integer))
    ):
        raise ValueError(f"max_seq_length must be an integer, got {value!r}")
    # sentence-transformers falls back to the size of the whole table, offset rows included.
    table = transformer.auto_model.config.max_position_embeddings
    if value is None or value >= _NO_LIMIT or room < value == table:
        return room
    # Tokenizers cut nothing where the special tokens alone are too many.
    least = max(1, tokenizer.num_special_tokens_to_add(pair=False))
    if not least <= value <= room or value != int(value):
        raise ValueError(
            f"max_seq_length must be an integer from {least}, the special tokens of a text, to "
            f"{room}, the room of the position table, got {value}"
        )
    return int(value)


class Derived:
    """The pipeline of an encoder: rebuilt on demand, left behind by copies and pickles.

    Attributes:
        lost: what made the device useless to this process; None where it works.
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        self._lock = threading.Lock()
        self._entry: tuple[tuple[Any, ...], Pipeline] | None = None

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return type(self), ()

    def get(self, signature: tuple[Any, ...]) -> Pipeline | None:
        entry = self._entry
        return entry[1] if entry is not None and entry[0] == signature else None

    def set(self, signature: tuple[Any, ...], pipeline: Pipeline) -> None:
        with self._lock:
            self._entry = signature, pipeline

    def clear(self) -> None:
        with self._lock:
            self._entry = None
