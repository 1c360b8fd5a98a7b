"""The forward of a FastEncoder itself: packed where it trains, stock's everywhere else."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor

import families
from checks import assert_same_vectors
from sbert_fast import FastEncoder, accelerate, counts
from trained import NO_DROPOUT

TEXTS = families.make_texts(6)


def make(**arguments: Any) -> SentenceTransformer:
    return families.make_sentence_transformer("bert", overrides=NO_DROPOUT, **arguments)


def run(model: Any) -> dict[str, Tensor]:
    return model(model.preprocess(TEXTS))


def gradient(model: Any) -> Tensor:
    """Of the table of words, a row a vector."""
    model.zero_grad()
    vectors = run(model)["sentence_embedding"]
    (vectors @ vectors.T).square().sum().backward()
    table = model[0].auto_model.get_input_embeddings().weight
    return table.grad.flatten()[None]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_trains_in_the_dtype_of_the_weights(dtype: str) -> None:
    encoder = FastEncoder(make(), dtype=dtype)
    assert_same_vectors(gradient(encoder), gradient(make()))
    assert encoder.stats.forwards == 1
    assert encoder.stats.fallbacks == {}


def test_without_gradients_it_is_that_of_stock() -> None:
    """Padded states, too."""
    encoder, stock = FastEncoder(make()), make()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours, theirs = run(encoder), run(stock)
            assert torch.equal(ours["token_embeddings"], theirs["token_embeddings"])
    assert encoder.stats.forwards == 0


def test_in_training_mode_it_is_packed_without_gradients_too() -> None:
    """Losses that cache gradients call it in both ways, and expect the same."""
    encoder = FastEncoder(make()).train()
    with torch.no_grad():
        without = run(encoder)["sentence_embedding"]
    assert_same_vectors(without, run(encoder)["sentence_embedding"].detach())
    assert encoder.stats.forwards == 2


def test_a_model_that_shares_the_modules_trains_in_stock() -> None:
    stock = make()
    encoder, base = FastEncoder(stock), stock[0].auto_model
    gradient(encoder)
    assert "forward" not in vars(base)
    assert torch.equal(gradient(stock), gradient(make()))
    with pytest.raises(ValueError):
        encoder({})
    assert "forward" not in vars(base)
    assert encoder.stats.forwards == 1


def test_a_bound_forward_is_put_back() -> None:
    encoder = FastEncoder(make())
    base = encoder[0].auto_model
    bound = base.forward = base.forward
    gradient(encoder)
    assert vars(base)["forward"] is bound
    assert encoder.stats.forwards == 1


def test_what_is_accelerated_stays_so() -> None:
    encoder = FastEncoder(accelerate(make()))
    gradient(encoder)
    gradient(encoder)
    assert counts(encoder) == {"packed": 2}


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_forward_of_the_callers_own_is_called(trained_before: bool) -> None:
    encoder, stock = FastEncoder(make()), make()
    if trained_before:
        gradient(encoder)
    before = encoder.stats.forwards
    for model in (encoder, stock):
        base = model[0].auto_model
        original = base.forward
        base.forward = functools.wraps(original)(lambda *a, f=original, **how: f(*a, **how))
    assert torch.equal(gradient(encoder), gradient(stock))
    (reason,) = encoder.stats.fallbacks
    assert "BertModel.forward was replaced on this instance" in reason
    assert encoder.stats.forwards == before


def test_another_base_model() -> None:
    encoder, other = FastEncoder(make()), make(seed=3)
    gradient(encoder)
    encoder[0].model = other[0].model
    assert_same_vectors(gradient(encoder), gradient(make(seed=3)))
    assert encoder.stats.forwards == 2


COPIES: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_counts_its_own(copied: Callable[[Any], Any]) -> None:
    encoder = FastEncoder(make())
    gradient(encoder)
    twin = copied(encoder)
    assert_same_vectors(gradient(twin), gradient(make()))
    assert (encoder.stats.forwards, twin.stats.forwards) == (1, 1)


@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_what_is_not_supported_trains_in_stock() -> None:
    stock = families.make_xlnet()
    encoder = FastEncoder(copy.deepcopy(stock))
    assert torch.equal(gradient(encoder), gradient(stock))
    (reason,) = encoder.stats.fallbacks
    assert reason.startswith("XLNetModel cannot be accelerated")


def test_what_has_no_base_model_trains_in_stock() -> None:
    table = StaticEmbedding(families.make_tokenizer("bert").backend_tokenizer, embedding_dim=16)
    encoder = FastEncoder(SentenceTransformer(modules=[table], device="cpu"))
    run(encoder)["sentence_embedding"].sum().backward()
    assert encoder.stats.fallbacks == {"the model contains no model of transformers": 1}


# Autocast that a trainer has left behind


def _wrapped(model: Any, wrap: Callable[[Any], Any]) -> None:
    model.forward = wrap(type(model).forward).__get__(model)


WRAPPERS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "autocast": (torch.autocast("cpu", torch.bfloat16), True),
    "autocast twice": (lambda f: torch.autocast("cpu")(torch.autocast("cpu")(f)), True),
    "something else": (lambda f: functools.wraps(f)(lambda *a, **how: f(*a, **how)), False),
    "autocast around it": (
        lambda f: torch.autocast("cpu")(functools.wraps(f)(lambda *a, **how: f(*a, **how))),
        False,
    ),
}


@pytest.mark.parametrize(("wrap", "is_seen_through"), WRAPPERS.values(), ids=WRAPPERS)
def test_autocast_around_a_forward(wrap: Callable[[Any], Any], is_seen_through: bool) -> None:
    encoder = FastEncoder(make())
    _wrapped(encoder, wrap)
    vectors = encoder.encode(TEXTS)
    assert (encoder.stats.fallbacks == {}) == is_seen_through
    if is_seen_through:
        assert_same_vectors(vectors, make().encode(TEXTS))
