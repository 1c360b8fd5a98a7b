"""Who waits for what a base model returns, and what they read of it.

Callers are found on the stack: who holds a model is written nowhere, and changes when modules are
appended, shared, copied or unpickled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sbert_fast import bypass
from sbert_fast.classification import reads_last_id
from sbert_fast.pooling import is_module

# The modules of sentence-transformers that take every token for itself, or only those that the
# mask keeps. All others (CNN, LSTM, those of other people) may look at padding.
_READ_NO_PADDING = {
    "Dense",
    "Dropout",
    "HierarchicalTokenPooling",
    "LayerNorm",
    "LogitScore",
    "MLMTransformer",
    "MultiVectorMask",
    "Normalize",
    "Pooling",
    "SparseAutoEncoder",
    "SparseStaticEmbedding",
    "SpladePooling",
    "Transformer",
}
# Models of transformers that do so, by the end of their names.
_HEADS = (
    "DPRContextEncoder",
    "DPREncoder",
    "DPRQuestionEncoder",
    "EncoderDecoderModel",
    "ForCausalLM",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
    "VisionTextDualEncoderModel",
)
# Of these heads and modules, those that read the first column as any other. Pooling is told apart
# by its modes.
_READ_NO_FIRST = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification")
_POOL_ANYWHERE = {"lasttoken", "max", "mean", "mean_sqrt_len_tokens"}


@dataclass(frozen=True, slots=True)
class Caller:
    """A module that waits for what a model returns.

    Attributes:
        module: the module.
        methods: the code of its methods that wait, the innermost first.
        inputs: the first argument of the innermost one; None where it has none.
    """

    module: nn.Module
    methods: list[CodeType]
    inputs: Any


def callers_of(model: nn.Module) -> list[Caller]:
    """Those of `model`, each once, the innermost first."""
    found: dict[int, Caller] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            holder = frame.f_locals.get(code.co_varnames[0])
            if isinstance(holder, nn.Module) and holder is not model:
                if id(holder) not in found:
                    second = code.co_varnames[1] if code.co_argcount > 1 else ""
                    found[id(holder)] = Caller(holder, [], frame.f_locals.get(second))
                found[id(holder)].methods.append(code)
        frame = frame.f_back
    return list(found.values())


def reads_first_column(caller: Caller) -> bool:
    """Whether `caller` may read the states of the first column, masked or not."""
    module = caller.module
    if type(module).__module__.startswith("transformers."):
        return not (type(module).__name__.endswith(_READ_NO_FIRST) or reads_last_id(module))
    if _is_row(module) or is_module(module, "Router"):
        return any(map(_pools_first, parts_of(module)))
    return not any(is_module(module, name) for name in ("Transformer", "MLMTransformer"))


def _pools_first(module: nn.Module) -> bool:
    if not is_module(module, "Pooling"):
        return False
    modes: Any = module.pooling_mode
    return not _POOL_ANYWHERE.issuperset((modes,) if isinstance(modes, str) else modes)


def answers_questions(module: nn.Module) -> bool:
    """Whether a head gives logits for all columns, of which the caller may take the best, masked or
    not."""
    return type(module).__name__.endswith("ForQuestionAnswering")


def reader_of_padding(
    caller: Caller, keep: NDArray[np.bool_], ids: NDArray[np.int64] | None
) -> str | None:
    """The class of what may read padding, or None: `caller`, where that is a model of transformers,
    or one of its modules, where it is a SentenceTransformer.

    Args:
        caller: waits for the states.
        keep: the tokens that the mask keeps, `[B, S]`.
        ids: the token ids `[B, S]`; None where embeddings were given.
    """
    module = caller.module
    name = type(module).__name__
    if type(module).__module__.startswith("transformers."):
        summary = getattr(module, "sequence_summary", None)
        known = name.endswith(_HEADS) and getattr(summary, "summary_type", "first") == "first"
        if known and reads_last_id(module):
            known = bool(keep[np.arange(len(keep)), _last_ids(module, ids)].all())
        return None if known else name
    if _scores_masked(caller.inputs):
        return "MultiVectorMask"
    if not _is_row(module):
        return None
    for part in parts_of(module):
        if not _reads_no_padding(part):
            return type(part).__name__
    return None


def _last_ids(module: Any, ids: NDArray[np.int64] | None) -> NDArray[np.int64] | int:  # noqa: ANN401
    """The column that such a head reads of each row."""
    padding = module.config.get_text_config().pad_token_id
    if ids is None or padding is None:
        return -1
    return (np.arange(ids.shape[1]) * (ids != padding)).argmax(axis=1)


def _scores_masked(inputs: Any) -> bool:  # noqa: ANN401
    """Whether late interaction scores tokens that were added to a query and that the mask drops."""
    if not isinstance(inputs, Mapping) or "query_expansion_positions" not in inputs:
        return False
    return bool((inputs["query_expansion_positions"] & ~inputs["attention_mask"].bool()).any())


def _reads_no_padding(module: nn.Module) -> bool:
    known = any(is_module(module, name) for name in _READ_NO_PADDING)
    # What makes an embedding of all tokens makes it of the masked ones, too.
    names = {getattr(module, f"module_{end}_name", None) for end in ("input", "output")}
    joins = len(names) > 1 and any(is_module(module, name) for name in ("Dense", "Normalize"))
    return known and not joins and not bypass.is_replaced(module, "forward")


def _is_row(module: nn.Module) -> bool:
    """Whether `module` is a row of modules, of sentence-transformers' classes or derived ones."""
    return isinstance(module, nn.Sequential) and any(
        cls.__module__.startswith("sentence_transformers.") for cls in type(module).__mro__
    )


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in a row, all routes of a Router among them."""
    for child in module.children():
        if type(child) in (nn.Sequential, nn.ModuleDict) or is_module(child, "Router"):
            yield from parts_of(child)
        else:
            yield child
