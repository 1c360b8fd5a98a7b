"""The supported model families, one line each in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.models import base, bert, distilbert
from sbert_fast.models.base import Architecture, EncoderWeights

__all__ = ["FAMILIES", "Architecture", "EncoderWeights", "Family", "family_of", "read", "refusal"]


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one family: sizes and conventions, and where its parameters are."""

    architecture: Callable[[nn.Module], Architecture]
    weights: Callable[[nn.Module], EncoderWeights]


_BERT = Family(bert.architecture, bert.weights)
_ROBERTA = Family(bert.offset_architecture, bert.weights)

# Keyed on the class of the base model in transformers.
FAMILIES: dict[str, Family] = {
    "BertModel": _BERT,
    "ElectraModel": _BERT,
    "RobertaModel": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "CamembertModel": _ROBERTA,
    "DistilBertModel": Family(distilbert.architecture, distilbert.weights),
}


def family_of(model: nn.Module) -> Family | None:
    """The family of a base model, or None. A subclass with a forward of its own is none of ours."""
    cls: Any
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("transformers.models."):
            return FAMILIES[cls.__name__] if type(model).forward is cls.forward else None
    return None


def read(model: nn.Module) -> tuple[Architecture, EncoderWeights]:
    """Sizes, conventions and live parameters of a base model.

    Raises:
        UnsupportedModelError: with the reason.
    """
    family = family_of(model)
    if family is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported; supported are {', '.join(FAMILIES)}"
        )
    try:
        architecture, weights = family.architecture(model), family.weights(model)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} lacks a module this version expects: {error}"
        ) from error
    base.check(model, architecture, weights)
    return architecture, weights


def refusal(model: nn.Module) -> str | None:
    """Why the packed engine does not run `model`; None where it does."""
    try:
        read(model)
    except UnsupportedModelError as error:
        return str(error)
    return None
