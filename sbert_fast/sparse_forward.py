"""SparseForward: what SPLADE keeps of the logits of a text, without the logits of a batch."""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from sbert_fast import bypass
from sbert_fast.callers import Caller, callers_of
from sbert_fast.classification import kinds_of, with_finished_base
from sbert_fast.models.twin import fresh_modules
from sbert_fast.originals import is_genuine, originals
from sbert_fast.packed_forward import StandIn
from sbert_fast.pooling import is_module

# Most bytes of logits at a time.
_LOGITS_BYTES = 64 << 20
_ARGUMENTS = {"input_ids", "attention_mask", "token_type_ids", "return_dict"}


def has_masked_lm_head(module: nn.Module) -> bool:
    """Whether `module` is a model of transformers that gives every token logits `[V]`."""
    cls = type(module)
    return cls.__module__.startswith("transformers.models.") and cls.__name__.endswith(
        "ForMaskedLM"
    )


class SparseForward(StandIn):
    """Stands in for the `forward` of a model with a masked-LM head.

    While a SparseEncoder encodes, its next module takes the maximum over the tokens of a text, of a
    function that rises with the logits. So the maximum of the logits is all it needs: `[B, 1, V]`
    takes the place of `[B, S, V]`, and the head runs on some packed tokens at a time. Whoever else
    calls gets all logits, from the model's own forward.

    Args:
        model: the model with its head.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        self.model, self.shadowed = model, "forward" in model.__dict__
        self._look_like_original()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "shadowed": self.shadowed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._look_like_original()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if bypass.is_transformed() or not self._gives_maxima(args, kwargs):
            return self._run_original(*args, **kwargs)
        mask = kwargs["attention_mask"].bool()
        base = getattr(self.model, self.model.base_model_prefix)
        states = base(**kwargs)[0]
        lengths = mask.sum(dim=1).tolist()
        return MaskedLMOutput(logits=self._maxima(states[mask], lengths)[:, None])

    def _gives_maxima(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call comes from a SparseEncoder that reads nothing but maxima."""
        model, mask = self.model, kwargs.get("attention_mask")
        return (
            not args
            and kwargs.keys() <= _ARGUMENTS
            and type(mask) is Tensor
            and mask.dim() == 2
            and bool(mask[:, 0].all())
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(mask.device.type)
            and not model.training
            and not model.config.output_hidden_states
            and bool(readers := self._readers())
            and self._is_usual(readers)
        )

    def _readers(self) -> list[nn.Module]:
        """What waits for the logits where that is a SparseEncoder that encodes: the Transformer
        module, the last module of its row, and all around them; nothing anywhere else."""
        # Whoever has a SparseEncoder has imported it.
        callers = callers_of(self.model) if "sentence_transformers" in sys.modules else []
        if len(callers) < 2 or not any(map(_is_encoding, callers)):
            return []
        transformer, *around = [caller.module for caller in callers]
        inside = around[0].modules()
        rows = [list(row.children()) for row in inside if isinstance(row, nn.Sequential)]
        behind = [row[i + 1 :] for row in rows for i, part in enumerate(row) if part is transformer]
        routed = [list(row.children())[-1:] == [part] for part, row in pairwise(around)]
        if not behind or not all(routed) or any(len(after) != 1 for after in behind):
            return []
        return [transformer, *(after[0] for after in behind), *around]

    def _is_usual(self, readers: list[nn.Module]) -> bool:
        """Whether `readers` take maxima, and they and the head are as their packages made them."""
        model = self.model
        fresh: Any = fresh_modules(type(model), model.config)[""]
        head = _head(model)
        modules = [model, *readers, *(m for part in head.values() for m in part.modules())]
        return (
            all(map(_is_known, readers))
            and kinds_of(head) == kinds_of(_head(fresh))
            and (bypass.reason(modules) or bypass.global_reason()) is None
            and originals(map(type, modules), ("__call__", "forward")).reason is None
        )

    @torch.inference_mode()
    def _maxima(self, states: Tensor, lengths: list[int]) -> Tensor:
        """The largest logits `[B, V]` of texts of `lengths` tokens, of packed states `[T, E]`."""
        head = with_finished_base(self.model)
        width = self.model.get_output_embeddings().weight.shape[0]
        maxima = states.new_full((len(lengths), width), -torch.inf)
        step = max(1, _LOGITS_BYTES // (width * maxima.element_size()))
        owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).split(step)
        for some, owner in zip(states.split(step), owners, strict=True):
            logits = type(self.model).forward(head, inputs_embeds=some[None]).logits[0]
            rows, counts = torch.unique_consecutive(owner, return_counts=True)
            for row, part in zip(rows, logits.split(counts.tolist()), strict=True):
                torch.maximum(maxima[row], part.amax(dim=0), out=maxima[row])
        return maxima


def _is_encoding(caller: Caller) -> bool:
    """Whether `caller` is in the loop over batches of sentence-transformers."""
    from sentence_transformers import SparseEncoder

    # New in sentence-transformers 6.2.
    loop = getattr(SparseEncoder, "_inference", SparseEncoder.encode)
    own = isinstance(caller.module, SparseEncoder) and is_genuine(loop, SparseEncoder)
    return own and inspect.unwrap(loop).__code__ in caller.methods


def _is_known(reader: nn.Module) -> bool:
    """Whether `reader` takes the maximum of logits, or hands them on."""
    if is_module(reader, "SpladePooling"):
        return bool(reader.pooling_strategy == "max")
    from sentence_transformers import SparseEncoder

    if isinstance(reader, SparseEncoder):
        return type(reader).forward is SparseEncoder.forward
    names = ("Transformer", "MLMTransformer", "Router")
    return any(is_module(reader, name) for name in names)


def _head(model: Any) -> dict[str, nn.Module]:  # noqa: ANN401
    return {name: part for name, part in model.named_children() if name != model.base_model_prefix}
