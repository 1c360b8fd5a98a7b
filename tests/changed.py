"""A model of sentence-transformers beside ours, after the same change to both."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from checks import assert_same_vectors
from families import make_sentence_transformer
from sbert_fast import FastEncoder, accelerate
from sbert_fast.patching import counts

Make = Callable[[], SentenceTransformer]
Change = Callable[[Any], Any]
Patch = Callable[[pytest.MonkeyPatch], Any]

# Of one length, so that a batch of them needs no mask, and of several.
TEXTS = ["The sea was cold and dark", "a small boat", "old red trees, rain and windows by the sea"]

# Our model made and used before the change, made after it, or accelerated and used before it.
WAYS = ("used before", "made after", "accelerated")


@functools.cache
def _original(name: str) -> SentenceTransformer:
    return make_sentence_transformer(name, overrides={"max_position_embeddings": 90})


def tiny(name: str = "bert") -> SentenceTransformer:
    """A tiny model whose position table has room to spare."""
    return copy.deepcopy(_original(name))


def ours(make: Make, change: Change, way: str, texts: Sequence[str] = TEXTS) -> Any:
    """A model of ours in the state that `change` leaves it in."""
    model: Any = make()
    if way == "accelerated":
        accelerate(model)
    elif way == "used before":
        model = FastEncoder(model)
    if way != "made after":
        model.encode(texts)
    change(model)
    return FastEncoder(model) if way == "made after" else model


def packed_runs(model: Any) -> tuple[int, int]:
    """Calls that ran packed and calls that ran in stock, of an encoder or an accelerated model."""
    if isinstance(model, FastEncoder):
        return model.stats.batches, sum(model.stats.fallbacks.values())
    tally = counts(model)
    packed = tally.pop("packed", 0)
    return packed, sum(tally.values())


def assert_as_stock(
    change: Change,
    way: str,
    *,
    make: Make = tiny,
    texts: Sequence[str] = TEXTS,
    call: str = "encode",
    matters: bool = True,
) -> Any:
    """What `change` does to stock it does to ours; every call ran packed, or was counted.

    Args:
        change: applied to the stock model and to ours.
        way: one of `WAYS`.
        make: makes both models.
        texts: to embed.
        call: the method that embeds them.
        matters: whether stock gives other vectors after the change.

    Returns:
        Our model.
    """
    stock = make()
    before = getattr(stock, call)(texts)
    change(stock)
    expected = getattr(stock, call)(texts)
    moved = bool(np.abs(expected - before).max() > 1e-4)
    assert moved == matters, "stock changes" if moved else "stock does not change"
    model = ours(make, change, way, texts)
    runs = packed_runs(model)
    assert_same_vectors(getattr(model, call)(texts), expected)
    assert packed_runs(model) > runs or packed_runs(model)[1] > runs[1], "a call was not counted"
    return model


def assert_patched_as_stock(
    patch: Patch, way: str, monkeypatch: pytest.MonkeyPatch, make: Make = tiny
) -> None:
    """As :func:`assert_as_stock`, of a patch that holds for every model: ours runs in stock until
    it is undone, and packed then.
    """
    how = {"prompt": "find "}
    stock, before = make(), make().encode(TEXTS, **how)
    model = ours(make, lambda _: patch(monkeypatch), way)
    expected = stock.encode(TEXTS, **how)
    assert np.abs(expected - before).max() > 1e-4, "the patch does nothing"
    runs = packed_runs(model)
    assert_same_vectors(model.encode(TEXTS, **how), expected)
    assert packed_runs(model) == (runs[0], runs[1] + 1)
    monkeypatch.undo()
    assert_same_vectors(model.encode(TEXTS, **how), before)
    assert packed_runs(model) == (runs[0] + 1, runs[1] + 1)
