"""Every family beside stock on many texts of every length: the worst text, not the mean.

`SBERT_FAST_TEXTS=2000` runs as many texts.
"""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch

import families
from checks import MAX_DISTANCE, cosine_distances
from sbert_fast import FastCrossEncoder, FastEncoder

COUNT = int(os.environ.get("SBERT_FAST_TEXTS", "60"))
LONGEST = 256
MAX_SCORE_ERROR = 1e-5
every_family = pytest.mark.parametrize("name", families.FAMILIES)


def _room(name: str) -> dict[str, int]:
    offset = 2 if name in families.ROBERTA_LIKE else 0
    return {"max_position_embeddings": LONGEST + offset}


def _texts(count: int) -> list[str]:
    """From one word to more than fit."""
    return [*families.make_texts(count - 2, max_words=LONGEST), "a", " ".join(["sea"] * LONGEST)]


@every_family
def test_embeddings(name: str) -> None:
    stock = families.make_sentence_transformer(name, overrides=_room(name))
    stock.max_seq_length = LONGEST
    texts = _texts(COUNT)
    encoder = FastEncoder(stock)
    expected = stock.encode(texts)
    assert cosine_distances(encoder.encode(texts), expected).max() <= MAX_DISTANCE
    half = FastEncoder(stock, dtype="bfloat16")
    ours = half.encode(texts)
    peer = copy.deepcopy(stock).to(torch.bfloat16).encode(texts, convert_to_tensor=True)
    lost = cosine_distances(peer.float().numpy(), expected).max()
    assert cosine_distances(ours, expected).max() <= 2 * lost
    for each in (encoder, half):
        assert not each.stats.fallbacks and each.stats.texts == COUNT


@every_family
def test_scores(name: str) -> None:
    stock = families.make_cross_encoder(name, **_room(name))
    stock.max_seq_length = LONGEST
    first, *others = _texts(COUNT)
    pairs = [(first[:40], other) for other in others]
    model, half = FastCrossEncoder(stock), FastCrossEncoder(stock, dtype="bfloat16")
    scores, expected = model.predict(pairs), stock.predict(pairs)
    assert np.abs(scores - expected).max() <= MAX_SCORE_ERROR
    # Scores that are nearer to one another than stock rounds have no order.
    falls = np.diff(scores[np.argsort(-expected)])
    assert falls.max() <= MAX_SCORE_ERROR
    peer = copy.deepcopy(stock)
    peer.model.to(torch.bfloat16)
    lost = np.abs(peer.predict(pairs) - expected).max()
    assert np.abs(half.predict(pairs) - expected).max() <= 2 * lost
    assert not model.stats.fallbacks and not half.stats.fallbacks
