"""SPLADE models, accelerated: their own `encode`, the same results, and never all logits."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Normalize, Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import families
from checks import assert_same_vectors
from sbert_fast import accelerate, classification, counts, restore, sparse_forward

NAMES = [name for name in families.FAMILIES if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES]
TEXTS = families.make_texts(20)


def _transformer(name: str = "bert") -> Transformer:
    with tempfile.TemporaryDirectory() as folder:
        families.save_model(name, folder, head="AutoModelForMaskedLM")
        return Transformer(folder, transformer_task="fill-mask")


def _splade(name: str = "bert", **options: Any) -> SparseEncoder:
    modules = [_transformer(name), SpladePooling(**options)]
    return SparseEncoder(modules=modules, device="cpu").eval()


def _embed(model: SparseEncoder, batch_size: int = 20) -> Tensor:
    return model.encode(TEXTS, batch_size=batch_size, convert_to_sparse_tensor=False)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many packed tokens each call of a masked-LM head has taken since, of 7 at most."""
    seen: list[int] = []
    forward = classification._Finished.forward

    def record(self: Any, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        assert inputs_embeds.shape[0] == 1
        seen.append(inputs_embeds.shape[1])
        return forward(self, *args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(classification._Finished, "forward", record)
    vocabulary = len(families.make_tokenizer("bert"))
    monkeypatch.setattr(sparse_forward, "_LOGITS_BYTES", 7 * 4 * vocabulary)
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_logits_are_never_whole(name: str, activation: str, heads: list[int]) -> None:
    original = _splade(name, activation_function=activation)
    model = accelerate(copy.deepcopy(original))
    ours = _embed(model, batch_size=8)
    assert max(heads) == 7
    assert sum(heads) == sum(len(ids) for ids in model.tokenizer(TEXTS)["input_ids"])
    assert_same_vectors(ours, _embed(original))
    assert counts(model) == {"packed": 3}
    assert model.encode(TEXTS[0]).layout == torch.sparse_coo


def test_copies_have_heads_of_their_own(heads: list[int]) -> None:
    model = accelerate(_splade())
    before = _embed(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        heads.clear()
        with torch.no_grad():
            twin[0].model.cls.predictions.bias += 1
        after = _embed(twin)
        assert heads
        assert_same_vectors(after, _embed(restore(twin)))
        assert not torch.equal(after, before)
    assert torch.equal(_embed(model), before)
    heads.clear()
    _embed(restore(model))
    assert not heads
    assert "forward" not in vars(model[0].model)


def test_a_route_of_a_router(heads: list[int]) -> None:
    def make() -> SparseEncoder:
        transformer = _transformer()
        table = SparseStaticEmbedding(tokenizer=transformer.tokenizer)
        with torch.no_grad():
            table.weight.uniform_(generator=torch.Generator().manual_seed(0))
        document = [transformer, SpladePooling()]
        router = Router.for_query_document(query_modules=[table], document_modules=document)
        return SparseEncoder(modules=[router], device="cpu").eval()

    original, model = make(), accelerate(make())
    for method in ("encode_document", "encode_query"):
        ours, theirs = (
            getattr(m, method)(TEXTS, convert_to_sparse_tensor=False) for m in (model, original)
        )
        assert_same_vectors(ours, theirs)
    assert heads
    assert counts(model) == {"packed": 1}


def _sums(model: SparseEncoder) -> None:
    model[1].pooling_strategy = "sum"


def _hooked(model: SparseEncoder) -> None:
    model[1].register_forward_hook(lambda *_: None)


def _hooked_head(model: SparseEncoder) -> None:
    model[0].model.cls.register_forward_hook(lambda *_: None)


def _replaced(model: SparseEncoder) -> None:
    forward = type(model[1]).forward
    model[1].forward = MethodType(lambda self, features: forward(self, features), model[1])


def _other_head(model: SparseEncoder) -> None:
    model[0].model.cls.predictions.transform = torch.nn.Linear(64, 64)


def _all_states(model: SparseEncoder) -> None:
    model[0].model.config.output_hidden_states = True


def _hooked_around(model: SparseEncoder) -> None:
    model.register_forward_hook(lambda *_: None)


def _followed(model: SparseEncoder) -> None:
    model.append(Normalize())


class OwnEncoder(SparseEncoder):
    """Somebody's own loop."""

    def encode(self, inputs: list[str], **_: Any) -> Tensor:
        features = self(self.preprocess(inputs))
        assert features["token_embeddings"].shape[1] > 1
        return features["sentence_embedding"]


def _own_loop(model: SparseEncoder) -> None:
    model.__class__ = OwnEncoder


class OwnForward(SparseEncoder):
    """Somebody's own: it looks at the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        features = super().forward(*args, **kwargs)
        assert features["token_embeddings"].shape[1] > 1
        return features


def _own_forward(model: SparseEncoder) -> None:
    model.__class__ = OwnForward


class OwnInference(SparseEncoder):
    """Somebody's own loop under the `encode` of sentence-transformers since 6.2."""

    def _inference(self, inputs: list[str], **_: Any) -> Tensor:
        return OwnEncoder.encode(self, inputs)  # type: ignore[arg-type]


def _own_inference(model: SparseEncoder) -> None:
    if not hasattr(SparseEncoder, "_inference"):
        pytest.skip("this version of sentence-transformers calls no _inference")
    model.__class__ = OwnInference


def _masked_first(model: SparseEncoder) -> None:
    model.tokenizer.padding_side = "left"


@pytest.mark.parametrize(
    "change",
    [
        _sums,
        _hooked,
        _hooked_head,
        _hooked_around,
        _replaced,
        _other_head,
        _all_states,
        _followed,
        _own_loop,
        _own_forward,
        _own_inference,
        _masked_first,
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_all_logits_for_whoever_may_read_them(
    change: Callable[[SparseEncoder], None], heads: list[int]
) -> None:
    original = _splade()
    change(original)
    model = accelerate(copy.deepcopy(original))
    with torch.inference_mode():
        assert_same_vectors(_embed(model), _embed(original))
    assert not heads


def test_autocast_is_that_of_stock(heads: list[int]) -> None:
    original = _splade()
    model = accelerate(copy.deepcopy(original))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = _embed(model), _embed(original)
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert not heads


@pytest.mark.parametrize("caller", ["the model", "the transformer", "the head"])
def test_outside_of_encode_logits_are_those_of_every_token(caller: str, heads: list[int]) -> None:
    original = _splade()
    model = accelerate(copy.deepcopy(original))

    def logits(model: SparseEncoder) -> Tensor:
        features = model.preprocess(TEXTS)
        with torch.inference_mode():
            if caller == "the head":
                return model[0].model(**features).logits
            part = model if caller == "the model" else model[0]
            return part(features)["token_embeddings"]

    keep = original.preprocess(TEXTS)["attention_mask"].bool()
    assert_same_vectors(logits(model)[keep], logits(original)[keep])
    assert not heads


def test_training_is_that_of_stock(heads: list[int]) -> None:
    model = accelerate(_splade()).train()
    features = model.preprocess(TEXTS)
    model(features)["sentence_embedding"].sum().backward()
    assert model[0].model.bert.embeddings.word_embeddings.weight.grad.any()
    assert not heads


def test_a_loop_that_was_replaced(heads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_inference" if hasattr(SparseEncoder, "_inference") else "encode"
    monkeypatch.setattr(SparseEncoder, name, OwnEncoder.encode)
    original = _splade()
    model = accelerate(copy.deepcopy(original))
    with torch.inference_mode():
        assert_same_vectors(_embed(model), _embed(original))
    assert not heads
