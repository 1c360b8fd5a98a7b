"""What a packed pass would not call sends `encode` to sentence-transformers, and is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from families import make_sentence_transformer
from sbert_fast import FastEncoder

TEXTS = ["a b c", "one more text", ""]


class Wrapped(nn.Module):
    """As adapters wrap a linear layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 1.1


def attention(model: SentenceTransformer) -> Any:
    return model[0].auto_model.encoder.layer[0].attention.self


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Not along itself: a normalisation behind would take that back."""
    return x + (x > 0) * 0.5


def shift_sentence(_: nn.Module, __: Any, output: dict[str, Any]) -> dict[str, Any]:
    return output | {"sentence_embedding": shifted(output["sentence_embedding"])}


def shift_tokens(_: nn.Module, __: Any, output: dict[str, Any]) -> dict[str, Any]:
    return output | {"token_embeddings": shifted(output["token_embeddings"])}


def replace_activation(model: SentenceTransformer) -> None:
    model[0].auto_model.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def replace_forward(model: SentenceTransformer) -> None:
    query = attention(model).query
    original = query.forward
    query.forward = lambda x: original(x) * 1.1


CHANGES: dict[str, Callable[[SentenceTransformer], Any]] = {
    "hook of the encoder": lambda m: m.register_forward_hook(shift_sentence),
    "hook of the transformer": lambda m: m[0].register_forward_hook(shift_tokens),
    "hook of the pooling": lambda m: m[1].register_forward_hook(shift_sentence),
    "forward of a layer": replace_forward,
    "activation of a layer": replace_activation,
    "module of a layer": lambda m: setattr(attention(m), "query", Wrapped(attention(m).query)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("used_before", [False, True])
def test_changed_modules(change: str, used_before: bool) -> None:
    encoder, expected = (FastEncoder(make_sentence_transformer()), make_sentence_transformer())
    before = encoder.encode(TEXTS) if used_before else None
    for model in (encoder, expected):
        CHANGES[change](model)
    got = encoder.encode(TEXTS)
    np.testing.assert_array_equal(got, expected.encode(TEXTS))
    assert before is None or np.abs(got - before).max() > 1e-4, "the change does nothing"
    assert sum(encoder.stats.fallbacks.values()) == 1
    np.testing.assert_array_equal(encoder.encode(TEXTS[0]), expected.encode(TEXTS[0]))


def test_a_module_that_is_put_back_runs_packed_again() -> None:
    st = make_sentence_transformer()
    encoder, query = FastEncoder(st), attention(st).query
    expected = encoder.encode(TEXTS)
    attention(st).query = Wrapped(query)
    assert (encoder.encode(TEXTS) != expected).any()
    assert sum(encoder.stats.fallbacks.values()) == 1
    attention(st).query = query
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    assert sum(encoder.stats.fallbacks.values()) == 1
    assert encoder.unsupported_reason is None


def test_a_forward_of_a_subclass() -> None:
    class Shifted(FastEncoder):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return shift_sentence(self, (), super().forward(*args, **kwargs))

    st = make_sentence_transformer()
    expected = shifted(torch.from_numpy(st.encode(TEXTS))).numpy()
    np.testing.assert_array_equal(Shifted(st).encode(TEXTS), expected)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_precision_of_token_embeddings(precision: str) -> None:
    st = make_sentence_transformer()
    how: dict[str, Any] = {"output_value": "token_embeddings", "precision": precision}
    encoder = FastEncoder(st)
    try:
        expected = st.encode(TEXTS[:2], **how)
    except Exception as error:
        with pytest.raises(type(error)):
            encoder.encode(TEXTS[:2], **how)
    else:
        got = encoder.encode(TEXTS[:2], **how)
        assert [g.dtype for g in got] == [e.dtype for e in expected]
        assert [g.shape for g in got] == [e.shape for e in expected]
    assert sum(encoder.stats.fallbacks.values()) == 1
