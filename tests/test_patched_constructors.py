"""Models made while something was patched that their constructors read, and twins made then."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.models.bert.modeling_bert as mb
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers.activations import ACT2FN, GELUActivation, GELUTanh

from changed import TEXTS, Patch, packed_runs
from checks import assert_same_vectors
from families import make_sentence_transformer
from sbert_fast import FastEncoder, accelerate
from sbert_fast.errors import UnsupportedModelError

KINDS = ("encoder", "accelerated")


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(function)(lambda *args, **how: 2 * function(*args, **how))


def louder(patch: pytest.MonkeyPatch) -> None:
    make = mb.BertSelfAttention.__init__

    @functools.wraps(make)
    def init(self: Any, *args: Any, **how: Any) -> None:
        make(self, *args, **how)
        self.scaling *= 4

    patch.setattr(mb.BertSelfAttention, "__init__", init)


# What is patched while the model is made, and the activation in its config.
PATCHES: dict[str, tuple[Patch, str]] = {
    "functional.gelu": (
        lambda patch: patch.setattr(nn.functional, "gelu", doubled(nn.functional.gelu)),
        "gelu",
    ),
    "functional.gelu by a partial": (
        lambda patch: patch.setattr(
            nn.functional, "gelu", functools.partial(nn.functional.gelu, approximate="tanh")
        ),
        "gelu",
    ),
    "functional.gelu by relu": (
        lambda patch: patch.setattr(nn.functional, "gelu", torch.relu),
        "gelu",
    ),
    "functional.gelu by silu": (
        lambda patch: patch.setattr(nn.functional, "gelu", nn.functional.silu),
        "gelu",
    ),
    "functional.gelu inside a partial": (
        lambda patch: patch.setattr(nn.functional, "gelu", doubled(nn.functional.gelu)),
        "gelu_pytorch_tanh",
    ),
    "method of GELUActivation": (
        lambda patch: patch.setattr(
            GELUActivation, "_gelu_python", doubled(GELUActivation._gelu_python)
        ),
        "gelu_python",
    ),
    "method of GELUTanh": (
        lambda patch: patch.setattr(
            GELUTanh, "_gelu_tanh_python", doubled(GELUTanh._gelu_tanh_python)
        ),
        "gelu_python_tanh",
    ),
    "table of activations": (lambda patch: patch.setitem(ACT2FN, "gelu", nn.ReLU), "gelu"),
    "constructor of BertSelfAttention": (louder, "gelu"),
}


def made(activation: str) -> SentenceTransformer:
    # No other test has a config like it: there is no twin yet.
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 91}
    return make_sentence_transformer("bert", overrides={"hidden_act": activation} | sizes)


def ran_packed(kind: str, model: SentenceTransformer) -> bool:
    """Whether ours runs packed; checked to give what stock gives."""
    expected = model.encode(TEXTS)
    if kind == "encoder":
        ours: Any = FastEncoder(model)
    else:
        try:
            ours = accelerate(model)
        except UnsupportedModelError:
            return False
    before = packed_runs(ours)
    assert_same_vectors(ours.encode(TEXTS), expected)
    after = packed_runs(ours)
    assert after != before
    return after[0] > before[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_made_while_patched(patch: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a model runs in stock, also when the patch is gone; one made then runs packed."""
    apply, activation = PATCHES[patch]
    apply(monkeypatch)
    try:
        model = made(activation)
        assert not ran_packed(kind, model)
    finally:
        monkeypatch.undo()
    assert ran_packed(kind, made(activation))
    assert not ran_packed(kind, model)


@pytest.mark.parametrize("kind", KINDS)
def test_made_after_something_was_compiled(kind: str) -> None:
    """Compiling puts another constructor into nn.Module, and leaves it there."""
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    assert ran_packed(kind, made("gelu"))


def test_a_patched_constructor_of_all_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    make = nn.Module.__init__
    monkeypatch.setattr(nn.Module, "__init__", functools.wraps(make)(lambda self: make(self)))
    assert not ran_packed("accelerated", made("gelu"))
