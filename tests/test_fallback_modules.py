"""What a packed pass would not call sends `encode` to sentence-transformers, and is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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


def replace_preprocess(model: SentenceTransformer) -> None:
    original = model[0].preprocess
    model[0].preprocess = lambda inputs, **how: original([f"find {i}" for i in inputs], **how)


def read_another_layer(model: SentenceTransformer) -> None:
    model[0].modality_config = {
        "text": {"method": "forward", "method_output_name": ("hidden_states", 1)}
    }


def scaled_attention(*args: Any, **how: Any) -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **(how | {"scaling": 3 * how["scaling"]}))


def register_attention(model: SentenceTransformer) -> None:
    ALL_ATTENTION_FUNCTIONS.register("scaled", scaled_attention)
    model[0].auto_model.set_attn_implementation("scaled")


CHANGES: dict[str, Callable[[SentenceTransformer], Any]] = {
    "hook of the encoder": lambda m: m.register_forward_hook(shift_sentence),
    "hook of the transformer": lambda m: m[0].register_forward_hook(shift_tokens),
    "hook of the pooling": lambda m: m[1].register_forward_hook(shift_sentence),
    "forward of a layer": replace_forward,
    "activation of a layer": replace_activation,
    "preprocess": replace_preprocess,
    "hidden states": read_another_layer,
    "attention": register_attention,
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


class Tripled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


def tripled(dense: Any) -> None:
    inner = Tripled(dense.linear.in_features, dense.linear.out_features)
    inner.load_state_dict(dense.linear.state_dict())
    dense.linear = inner


@pytest.mark.parametrize(
    "change",
    [tripled, lambda d: d.linear.register_forward_hook(lambda _, __, out: out * 2)],
    ids=["subclass", "hook"],
)
@pytest.mark.parametrize("used_before", [False, True])
def test_changed_layer_of_a_dense_module(change: Callable[[Any], Any], used_before: bool) -> None:
    st = make_sentence_transformer(normalize=False)
    st.append(Dense(64, 32))
    encoder = FastEncoder(st)
    before = encoder.encode(TEXTS) if used_before else None
    change(st[2])
    got = encoder.encode(TEXTS)
    np.testing.assert_array_equal(got, st.encode(TEXTS))
    assert before is None or np.abs(got - before).max() > 1e-3, "the change does nothing"
    assert sum(encoder.stats.fallbacks.values()) == 1


def test_a_dense_module_of_another_width_is_not_run_packed() -> None:
    st = make_sentence_transformer(normalize=False)
    st.append(Dense(48, 32))
    with pytest.warns(UserWarning, match="Dense must take the 64 components that come before it"):
        FastEncoder(st)


def test_a_preprocess_of_a_subclass() -> None:
    def preprocess(self: Any, inputs: list[str], *args: Any, **how: Any) -> Any:
        return super(type(self), self).preprocess([f"find {i}" for i in inputs], *args, **how)

    st = make_sentence_transformer()
    expected = type("Other", (SentenceTransformer,), {"preprocess": preprocess})(
        modules=list(st), device="cpu"
    ).encode(TEXTS)
    encoder = type("Mine", (FastEncoder,), {"preprocess": preprocess})(modules=list(st))
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    assert encoder.stats.fallbacks == {"Mine has a preprocess of its own": 1}


def test_tokenizers_that_do_more_than_the_packed_engine_reads() -> None:
    st = make_sentence_transformer()
    encoder = FastEncoder(st)
    encoder.encode(TEXTS)

    class Finder(type(st.tokenizer)):  # type: ignore[misc]
        def __call__(self, text: list[str], **how: Any) -> Any:
            return super().__call__([f"find {t}" for t in text], **how)

    st.tokenizer.__class__ = Finder
    np.testing.assert_array_equal(encoder.encode(TEXTS), st.encode(TEXTS))
    (reason,) = encoder.stats.fallbacks
    assert "the tokenizer must be one of transformers, got" in reason and "Finder" in reason

    st = make_sentence_transformer()
    st[0].modality_config["message"] = st[0].modality_config["text"] | {"format": "flat"}
    with pytest.warns(UserWarning, match="unaccelerated: Transformer.modality_config must be"):
        FastEncoder(st)


def test_all_that_a_model_is_told_to_output() -> None:
    st = make_sentence_transformer()
    st[0].auto_model.config.output_hidden_states = True
    encoder = FastEncoder(st)
    expected, got = (m.encode(TEXTS[:2], output_value=None) for m in (st, encoder))
    assert [set(g) for g in got] == [set(e) for e in expected]
    assert "all_layer_embeddings" in got[0]
    assert sum(encoder.stats.fallbacks.values()) == 1
    encoder.encode(TEXTS)
    assert sum(encoder.stats.fallbacks.values()) == 1


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


@pytest.mark.parametrize("part", [0, -1], ids=["encoder", "dense"])
def test_a_dense_of_another_dtype_fails_as_in_stock(part: int) -> None:
    st = make_sentence_transformer(normalize=False)
    st.append(Dense(64, 32))
    encoder = FastEncoder(st)
    encoder.encode(["a text"])
    encoder[part].half()
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        encoder.encode(["a text"])
    assert encoder.stats.fallbacks == {"parameters have several dtypes": 1}
    encoder[part].float()
    encoder.encode(["a text"])
    assert encoder.stats.texts == 2
