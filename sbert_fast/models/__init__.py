"""The supported model families, one line each in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.models import (
    albert,
    bert,
    deberta,
    distilbert,
    llama,
    modernbert,
    mpnet,
    rotary_bert,
)
from sbert_fast.models.architecture import Architecture, describe
from sbert_fast.models.base import EncoderWeights
from sbert_fast.models.checks import check
from sbert_fast.models.shapes import check_shapes
from sbert_fast.models.twin import check_attributes
from sbert_fast.originals import SYNTAX, Originals, originals

__all__ = [
    "FAMILIES",
    "Architecture",
    "EncoderWeights",
    "Family",
    "originals_of",
    "read",
    "refusal",
]


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one family: where its parameters are, and its sizes and conventions."""

    weights: Callable[[nn.Module], EncoderWeights]
    architecture: Callable[[nn.Module, EncoderWeights], Architecture] = describe


_BERT = Family(bert.weights)
_ROBERTA = Family(bert.weights, bert.offset_architecture)
_LLAMA = Family(llama.weights, llama.architecture)
_ROTARY_BERT = Family(rotary_bert.weights)

# Keyed on the class of the base model in transformers.
FAMILIES: dict[str, Family] = {
    "BertModel": _BERT,
    "ElectraModel": _BERT,
    "RobertaModel": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "CamembertModel": _ROBERTA,
    "AlbertModel": Family(albert.weights),
    "DistilBertModel": Family(distilbert.weights),
    "MPNetModel": Family(mpnet.weights, bert.offset_architecture),
    "DebertaV2Model": Family(deberta.weights),
    "ModernBertModel": Family(modernbert.weights),
    "NomicBertModel": _ROTARY_BERT,
    "GteModel": _ROTARY_BERT,
    "JinaEmbeddingsV3Model": _ROTARY_BERT,
    "EuroBertModel": _LLAMA,
    "Qwen3Model": _LLAMA,
    "Gemma3TextModel": _LLAMA,
}


# What calling a base model calls.
_ROOTS = (*SYNTAX, "_attn_implementation_internal", "forward")


def originals_of(model: nn.Module) -> Originals:
    """The functions of transformers and torch that the forward of a base model reaches."""
    # Imported with the model, and not before: sentence-transformers alone may not need it.
    from transformers.utils import ModelOutput

    kinds = {type(getattr(model, "config", None)), ModelOutput}
    return originals({type(module) for module in model.modules()} | kinds, _ROOTS)


def _class_of(model: nn.Module) -> type:
    """The class in transformers of a base model. A subclass with a forward of its own has none."""
    cls: Any
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("transformers.models."):
            if type(model).forward is cls.forward:
                return cls
            break
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported; supported are {', '.join(FAMILIES)}"
    )


def read(model: nn.Module) -> tuple[Architecture, EncoderWeights]:
    """Sizes, conventions and live parameters of a base model.

    Raises:
        UnsupportedModelError: with the reason.
    """
    cls = _class_of(model)
    family, found = FAMILIES[cls.__name__], originals_of(model)
    if found.reason is not None:
        raise UnsupportedModelError(found.reason)
    try:
        weights = family.weights(model)
        architecture = family.architecture(model, weights)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} lacks a module this version expects: {error}"
        ) from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} has a setting that this version cannot read: {error!r}"
        ) from error
    check(model, architecture, weights)
    check_shapes(model, architecture, weights)
    check_attributes(model, cls, found.names, weights)
    return architecture, weights


def refusal(model: nn.Module) -> str | None:
    """Why the packed engine does not run `model`; None where it does."""
    try:
        read(model)
    except UnsupportedModelError as error:
        return str(error)
    return None
