"""Rerankers that generate: token ids of pairs that a chat template formats, and scores from the
states of last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.heads import Head, Rows
from sbert_fast.layers import PoolKernels
from sbert_fast.models.base import linear
from sbert_fast.packing import PackedBatch
from sbert_fast.pooling import is_module
from sbert_fast.tokenization import TextTokenizer, TokenizedChunk, tokenize

# Classes of transformers whose logits are a linear layer of the last states.
GENERATORS = ("Gemma3ForCausalLM", "Qwen3ForCausalLM")


class ChatTokenizer(TextTokenizer):
    """Token ids of pairs of texts as a chat template formats them, made by sentence-transformers.

    A template may put anything anywhere, and the ids of a text depend on what is around it: each
    pair is rendered, tokenised and cut as a whole. Those that fill `max_length` count as cut.

    Args:
        model: a cross-encoder.
        max_length: tokens kept of a pair.
    """

    def __init__(self, model: Any, max_length: int) -> None:  # noqa: ANN401
        self._model = model
        super().__init__(model.tokenizer, max_length)

    def refresh(self) -> None:
        """Nothing is taken over from the tokenizer: each call asks the model."""

    def prepend(self, prompt: str, texts: Sequence[Any]) -> list[Any]:
        """The pairs with a prompt in front, which is a message of its own to the template."""
        return [(prompt, *pair) for pair in texts]

    def _chunk(self, texts: Sequence[Any]) -> TokenizedChunk:
        prompt = texts[0][0] if len(texts[0]) > 2 else None
        pairs = [list(text[-2:]) for text in texts]
        lists = {"common": {"return_tensors": None}, "text": {"padding": False}}
        encode = partial(self._model.preprocess, prompt=prompt, processing_kwargs=lists)
        with self._lock:
            found: Any = tokenize(encode, pairs)
        # Another thread may let the same tokenizer pad.
        columns = zip(found["input_ids"], found["attention_mask"], strict=True)
        rows = [list(compress(ids, mask)) for ids, mask in columns]
        lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
        ids = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
        return ids, lengths, None, int((lengths == self.max_length).sum())


class LogitHead(Head):
    """Scores from hidden states: what the model's own head makes of the last state of a pair, of
    the tokens alone that a `LogitScore` reads. Its weights are never copied.

    Args:
        model: a model of transformers that generates.
        after: the modules that follow it, by name.

    Raises:
        UnsupportedModelError: its class or an option is not supported, or other modules follow.
    """

    padding_sides = ("left",)
    dimension = 1

    def __init__(self, model: Any, after: dict[str, nn.Module]) -> None:  # noqa: ANN401
        cls = type(model)
        if cls.__name__ not in GENERATORS or not cls.__module__.startswith("transformers.models."):
            raise UnsupportedModelError(
                f"{cls.__name__} is not supported; supported are {', '.join(GENERATORS)}"
            )
        if getattr(model.config, "final_logit_softcapping", None) is not None:
            raise UnsupportedModelError("config.final_logit_softcapping is set")
        found = ", ".join(type(module).__name__ for module in after.values()) or "nothing"
        score: Any = next(iter(after.values()), None)
        if len(after) != 1 or not is_module(score, "LogitScore"):
            raise UnsupportedModelError(f"LogitScore must follow the Transformer, got {found}")
        if (name := score.module_input_name) != "causal_logits":
            raise UnsupportedModelError(f"LogitScore.module_input_name is {name!r}")
        false = [] if score.false_token_id is None else [score.false_token_id]
        self._model, self._tokens = model, [score.true_token_id, *false]

    def reads(self, skip: int) -> Rows:
        return PackedBatch.last_rows

    def prepare(self, dtype: torch.dtype, device: torch.device, impl: str) -> None:
        """Check the head of the model as it is now.

        Raises:
            UnsupportedModelError: it is not a plain linear layer of the states that has the tokens
                of the `LogitScore`; or its weights have another dtype than `dtype`, that of the
                encoder.
        """
        head: Any = getattr(self._model, "lm_head", None)
        layer = linear(head)
        rows, width = layer.weight.shape
        if width != self._model.config.hidden_size:
            raise UnsupportedModelError(f"lm_head takes states of {width} components")
        if not all(type(token) is int and -rows <= token < rows for token in self._tokens):
            raise UnsupportedModelError(f"LogitScore has the tokens {self._tokens}, of {rows}")
        if any(p.dtype != dtype for p in (layer.weight, layer.bias) if p is not None):
            raise UnsupportedModelError("parameters have several dtypes")

    def _rows_of(self, parameter: Tensor) -> Tensor:
        return torch.stack([parameter[token] for token in self._tokens]).float()

    def scores(self, x: Tensor, batch: PackedBatch, kernels: PoolKernels) -> Tensor:
        layer, states = self._model.lm_head, x[: batch.num_sequences, None].float()
        # Sums of products, not a matrix product: the bits of a score depend on no other.
        logits = (states * self._rows_of(layer.weight)).sum(dim=-1)
        if layer.bias is not None:
            logits += self._rows_of(layer.bias)
        return logits[:, :1] - logits[:, 1:].sum(dim=1, keepdim=True)
