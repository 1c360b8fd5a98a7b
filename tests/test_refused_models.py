"""Models that run in sentence-transformers, and what is not a model at all."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    LayerNorm,
    Pooling,
    StaticEmbedding,
)
from torch import nn

from checks import assert_same_result
from families import (
    make_sentence_transformer,
    make_texts,
    make_tokenizer,
    make_xlnet,
)
from sbert_fast import FastEncoder
from sbert_fast.errors import InvalidWeightsError

TEXTS = make_texts(30)
Launches = Callable[[], dict[tuple[str, str], int]]


# Unsupported models


def _xlnet(_: Path) -> list[nn.Module]:
    return list(make_xlnet())


class TwiceFirst(Pooling):
    """A user's own pooling module."""

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        features["sentence_embedding"] = features["token_embeddings"][:, 0] * 2
        return features


def _own_pooling(_: Path) -> list[nn.Module]:
    st = make_sentence_transformer()
    return [st[0], TwiceFirst(st[0].get_embedding_dimension())]


def _layer_norm_tail(_: Path) -> list[nn.Module]:
    st = make_sentence_transformer()
    return [st[0], st[1], LayerNorm(st[0].get_embedding_dimension())]


def _static(_: Path) -> list[nn.Module]:
    table = StaticEmbedding(make_tokenizer("bert").backend_tokenizer, embedding_dim=16)
    return [table, LayerNorm(16)]


UNSUPPORTED = {
    _xlnet: "XLNetModel is not supported",
    _own_pooling: "the second module must be Pooling, got TwiceFirst",
    _layer_norm_tail: "modules after Pooling must be Dense or Normalize, got LayerNorm",
    _static: "modules after StaticEmbedding must be Dense or Normalize, got LayerNorm",
}


@pytest.mark.parametrize(
    ("make", "reason"), UNSUPPORTED.items(), ids=["xlnet", "pooling", "layer norm", "static"]
)
def test_unsupported_model_runs_in_sentence_transformers(
    make: Callable[[Path], list[nn.Module]],
    reason: str,
    tmp_path: Path,
    launches: Launches,
    caplog: pytest.LogCaptureFixture,
) -> None:
    st = SentenceTransformer(modules=make(tmp_path), device="cpu").eval()
    with pytest.warns(UserWarning, match=f"unaccelerated: {reason}") as caught:
        encoder = FastEncoder(st)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arguments in ({}, {"convert_to_tensor": True}, {"output_value": "token_embeddings"}):
            if "token_embeddings" in arguments.values() and isinstance(st[0], StaticEmbedding):
                continue
            assert_same_result(encoder.encode(TEXTS, **arguments), st.encode(TEXTS, **arguments))
        assert_same_result(encoder.encode(TEXTS[0]), st.encode(TEXTS[0]))
    assert encoder.unsupported_reason is not None
    assert encoder.unsupported_reason.startswith(reason)
    assert encoder.compute_dtype is None
    assert encoder.packed_engine is None
    assert sum(encoder.stats.fallbacks.values()) >= 3
    assert not [r for r in caplog.records if r.name == "sbert_fast"], "told a second time"
    assert encoder.stats.texts == 0
    assert launches() == {}
    assert_same_result(pickle.loads(pickle.dumps(encoder)).encode(TEXTS), st.encode(TEXTS))


def test_model_that_becomes_supported(launches: Launches) -> None:
    st = make_sentence_transformer()
    with pytest.warns(UserWarning, match="LayerNorm"):
        encoder = FastEncoder(modules=[st[0], st[1], LayerNorm(64)], device="cpu")
    encoder.encode(TEXTS)
    assert launches() == {}
    del encoder[2]
    assert encoder.unsupported_reason is None
    plain = SentenceTransformer(modules=[st[0], st[1]], device="cpu")
    assert_same_result(encoder.encode(TEXTS), plain.encode(TEXTS))
    assert launches() != {}


# Inputs that are not models


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model here")
    with pytest.raises(ValueError, match=f"model_name_or_path must .*{tmp_path.name}.*holds none"):
        FastEncoder(str(tmp_path))


def test_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing.*no such folder"):
        FastEncoder(str(tmp_path / "missing"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    name = "encoder.layer.1.attention.self.query.weight"
    st = make_sentence_transformer()
    encoder = FastEncoder(st)
    with torch.no_grad():
        dict(st[0].auto_model.named_parameters())[name][3, 5] = value
    with pytest.raises(InvalidWeightsError, match=name):
        FastEncoder(st)
    with pytest.raises(InvalidWeightsError, match=name):
        encoder.encode(TEXTS)


def test_what_is_no_model_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="model_name_or_path must be a name, .* got int"):
        FastEncoder(3)
    with pytest.raises(TypeError, match="model_name_or_path must be a name, .* got Linear"):
        FastEncoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model_name_or_path or modules must be given"):
        FastEncoder()


def test_a_path_object_is_a_path(minilm_path: str) -> None:
    assert FastEncoder(Path(minilm_path)).packed_engine is not None


@pytest.mark.parametrize(
    ("model", "reason"),
    [("", "it is empty"), ("/nowhere/at all", "there is no such folder"), (__file__, "a file")],
)
def test_what_is_no_model_is_named(model: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"model_name_or_path must be .* got .*: .*{reason}"):
        FastEncoder(model)
