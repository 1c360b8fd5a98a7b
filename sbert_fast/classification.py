"""Heads of sequence classification, as cross-encoders have them: scores from packed states."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from sbert_fast import models, ops
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.heads import Head, Rows
from sbert_fast.layers import PoolKernels
from sbert_fast.models.base import pool
from sbert_fast.models.twin import fresh_modules
from sbert_fast.packing import ROW_ALIGNMENT, PackedBatch

# Classes of transformers whose forward reads one state of a text: that of its first token, of its
# last if they are decoders, or the mean of all where the config says so.
CLASSIFIERS = frozenset(
    f"{name.removesuffix('Model')}ForSequenceClassification" for name in models.FAMILIES
)


def reads_last_id(model: nn.Module) -> bool:
    """Whether a model of transformers classifies a row by the state of its last id that is not the
    padding id of the config, wherever padding is."""
    return isinstance(model, GenericForSequenceClassification)


class ClassificationHead(Head):
    """Scores from hidden states, by the model's own modules.

    They are called as they are, on one state a text: their weights are never copied.

    Args:
        model: a model of transformers for sequence classification.
        after: the modules that follow it, by name.
        padding_id: what its tokenizer pads with.

    Raises:
        UnsupportedModelError: its class or an option is not supported, or modules follow.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        after: dict[str, nn.Module],
        padding_id: int | None,
    ) -> None:
        if after:
            raise UnsupportedModelError(f"modules follow the Transformer: {', '.join(after)}")
        cls = type(model)
        if cls.__name__ not in CLASSIFIERS or not cls.__module__.startswith("transformers.models."):
            raise UnsupportedModelError(
                f"{cls.__name__} is not supported; supported are {', '.join(sorted(CLASSIFIERS))}"
            )
        self._model, self._prefix = model, model.base_model_prefix
        self._mode = getattr(model.config, "classifier_pooling", "cls")
        if self._mode not in ("bos", "cls", "mean"):
            raise UnsupportedModelError(f"config.classifier_pooling is {self._mode!r}")
        self._reads: Rows = PackedBatch.first_rows
        if reads_last_id(model):
            expected = model.config.pad_token_id
            if expected is None or expected != padding_id:
                raise UnsupportedModelError(
                    f"config.pad_token_id is {expected}, and the tokenizer pads with {padding_id}"
                )
            self._reads = partial(PackedBatch.last_rows, padding_id=expected)
            self.padding_sides = ("right", "left")
        self._kinds = kinds_of(self._parts(fresh_modules(cls, model.config)[""]))
        self.dimension = int(model.config.num_labels)

    def _parts(self, model: Any) -> dict[str, nn.Module]:  # noqa: ANN401
        """The modules of `model` that are called: all but the base model, and its pooler."""
        parts = {name: part for name, part in model.named_children() if name != self._prefix}
        pooler = getattr(getattr(model, self._prefix), "pooler", None)
        return parts if pooler is None else parts | {f"{self._prefix}.pooler": pooler}

    @property
    def is_training(self) -> bool:
        return any(m.training for part in self._parts(self._model).values() for m in part.modules())

    def reads(self, skip: int) -> Rows | None:
        return None if self._mode == "mean" else self._reads

    def prepare(self, dtype: torch.dtype, device: torch.device, impl: str) -> None:
        """Check the modules as they are now.

        Raises:
            UnsupportedModelError: one is not what the class makes of the config: it may read more
                than one state, or give other labels; or weights have another dtype than those of
                the encoder, `dtype`.
        """
        parts = self._parts(self._model)
        mine = kinds_of(parts)
        for name in mine.keys() | self._kinds.keys():
            if mine.get(name) != self._kinds.get(name):
                raise UnsupportedModelError(
                    f"{name} of {type(self._model).__name__} must be "
                    f"{_told(self._kinds.get(name))}, got {_told(mine.get(name))}"
                )
        if any(p.dtype != dtype for part in parts.values() for p in part.parameters()):
            raise UnsupportedModelError("parameters have several dtypes")

    def scores(self, x: Tensor, batch: PackedBatch, kernels: PoolKernels) -> Tensor:
        count = batch.num_sequences
        states = x[:count]
        if self._mode == "mean":
            states = torch.empty((count, x.shape[1]), device=x.device, dtype=torch.float32)
            mode = ops.POOLING_MODES.index("mean")
            kernels.pool(x, batch.cu_seqlens, mode, False, 0, None, states, None)
        return self._logits(states)

    def _logits(self, states: Tensor) -> Tensor:
        """Logits `[B, labels]` of states `[B, E]`; on a CPU of 16 at a time, the last of them
        padded: the bits of a row then depend on no other row."""
        model, count = self._model, states.shape[0]
        head = with_finished_base(model)
        padded = F.pad(states.to(model.dtype), (0, 0, 0, -count % ROW_ALIGNMENT))[:, None]
        blocks = padded.split(ROW_ALIGNMENT if states.device.type == "cpu" else len(padded))
        mask = padded.new_ones((len(blocks[0]), 1), dtype=torch.long)
        inputs = {"input_ids": mask, "attention_mask": mask, "return_dict": True}
        logits = [head(inputs_embeds=block, **inputs).logits for block in blocks]
        return torch.cat(logits)[:count]


def kinds_of(parts: dict[str, nn.Module]) -> dict[str, tuple[Any, ...]]:
    """The class of every module in `parts`, and the shapes of its parameters, by name."""
    return {
        f"{name}.{inner}".rstrip("."): (type(module), *(p.shape for p in module.parameters(False)))
        for name, part in parts.items()
        for inner, module in part.named_modules()
    }


def _told(kind: tuple[Any, ...] | None) -> str:
    if kind is None:
        return "nothing"
    return " ".join([kind[0].__name__, *(str(list(shape)) for shape in kind[1:])])


def with_finished_base(model: Any) -> Any:  # noqa: ANN401
    """A model with the head of `model`: what it is given as `inputs_embeds` are the last states."""
    head: Any = object.__new__(type(model))
    prefix = model.base_model_prefix
    modules = model._modules | {prefix: _Finished(getattr(model, prefix))}
    vars(head).update(vars(model), _modules=modules)
    return head


class _Finished(nn.Module):
    """Stands in for a base model whose last states are there already."""

    def __init__(self, base: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.pooler = getattr(base, "pooler", None)
        self.pooler_activation = getattr(base, "pooler_activation", None)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        pooled = pool(self, inputs_embeds)
        return BaseModelOutputWithPoolingAndCrossAttentions(inputs_embeds, pooled)
