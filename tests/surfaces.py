"""The two ways in, `FastEncoder.encode` and `accelerate`, each beside stock on the same modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from checks import assert_same_vectors
from families import make_texts
from sbert_fast import FastEncoder, accelerate
from sbert_fast.patching import counts

TEXTS = make_texts(6, seed=4)
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Surface:
    """Results of one model now: ours, stock's, and how our calls ran."""

    ours: Callable[[], np.ndarray]
    stock: Callable[[], np.ndarray]
    packed: Callable[[], int]
    fallbacks: Callable[[], dict[str, int]]

    def check(self) -> np.ndarray:
        """Ours, which equal stock's."""
        ours = self.ours()
        assert_same_vectors(ours, self.stock())
        return ours


def _encoder(st: SentenceTransformer) -> Surface:
    encoder = FastEncoder(st)
    return Surface(
        lambda: encoder.encode(TEXTS),
        lambda: SentenceTransformer(modules=list(st), device="cpu").encode(TEXTS),
        lambda: encoder.stats.texts,
        lambda: encoder.stats.fallbacks,
    )


def _accelerated(st: SentenceTransformer) -> Surface:
    base = accelerate(st[0].auto_model)

    def states(forward: Callable[..., Any]) -> np.ndarray:
        batch = {name: value for name, value in st.preprocess(TEXTS).items() if name in _INPUTS}
        base.eval()
        with torch.inference_mode():
            return forward(**batch)[0][batch["attention_mask"].bool()].float().numpy()

    return Surface(
        lambda: states(base),
        lambda: states(lambda **batch: type(base).forward(base, **batch)),
        lambda: counts(base).get("packed", 0),
        lambda: {reason: n for reason, n in counts(base).items() if reason != "packed"},
    )


SURFACES: dict[str, Callable[[SentenceTransformer], Surface]] = {
    "encode": _encoder,
    "accelerate": _accelerated,
}
