"""Training on batches that nobody pads: PackedCollator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import CNN, Pooling
from torch import Tensor, nn

import families
from checks import assert_same_vectors
from sbert_fast import FastEncoder, PackedCollator, accelerate
from sbert_fast.packed_forward import PackedForward
from test_trainers import LOSSES, PAIRS, TEXTS, make_encoder
from trained import assert_trains_packed, dataset, train

ROWS = [{"a": text} for text in TEXTS[:6]]
FEW = ("CoSENT", "CachedMultipleNegativesRanking", "Matryoshka", "two datasets")


def features_of(model: FastEncoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of `ROWS` without padding, and with it."""
    flat = PackedCollator(model)(ROWS)
    padded = model.preprocess([row["a"] for row in ROWS])
    return {name.removeprefix("a_"): value for name, value in flat.items()}, dict(padded)


@pytest.mark.parametrize("loss", FEW)
def test_the_trainer_trains_as_in_stock(loss: str) -> None:
    def fit(model: Any) -> Any:
        collator = PackedCollator(model) if isinstance(model, FastEncoder) else None
        return train(model, *LOSSES[loss], data_collator=collator)

    assert_trains_packed(make_encoder, FastEncoder, fit)


def test_the_trainer_evaluates() -> None:
    model = FastEncoder(make_encoder())
    options = {"data_collator": PackedCollator(model), "eval_dataset": dataset(PAIRS)}
    trained = train(model, losses.MultipleNegativesRankingLoss, PAIRS, **options)
    before = model.stats.forwards
    assert trained.trainer.evaluate()["eval_loss"] > 0
    assert model.stats.forwards > before and model.stats.fallbacks == {}


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "distilbert", "modernbert"])
def test_states_are_those_of_padded_batches(family: str) -> None:
    model = FastEncoder(families.make_sentence_transformer(family)).eval()
    flat, padded = features_of(model)
    kept = padded["attention_mask"].bool()
    assert flat.keys() & {"attention_mask", "position_ids"} == set()
    assert torch.equal(flat["input_ids"], padded["input_ids"][kept])
    grads = []
    for features in (flat, padded):
        states = model(features)["token_embeddings"]
        states = states[0] if features is flat else states[kept]
        states.square().sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        grads.append([states.detach(), *found])
        model.zero_grad()
    assert len(grads[0]) > 5
    assert all(map(torch.equal, *grads))
    assert model.stats.fallbacks == {}


def test_states_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    run = PackedForward._states

    def record(*args: Any) -> Any:
        made.extend(run(*args))
        return iter(made)

    monkeypatch.setattr(PackedForward, "_states", record)
    model = FastEncoder(make_encoder())
    flat, _ = features_of(model)
    states = model(flat)["token_embeddings"]
    assert states.shape == (1, flat["input_ids"].numel(), 64)
    assert states.data_ptr() == made[-1].data_ptr()


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_without_gradients(pooling: str, inference: Any) -> None:
    model = FastEncoder(make_encoder())
    model[1].pooling_mode = pooling
    model.eval()
    flat, _ = features_of(model)
    with inference():
        found = model(flat)["sentence_embedding"]
    assert_same_vectors(found, torch.from_numpy(model.encode(TEXTS[:6])))
    assert model.stats.forwards == 1 and model.stats.fallbacks == {}


def test_prompts() -> None:
    model = FastEncoder(make_encoder()).eval()
    model[1].include_prompt = False
    collator = PackedCollator(model, prompts="find: ")
    flat = {name.removeprefix("a_"): value for name, value in collator(ROWS).items()}
    found = model(flat)["sentence_embedding"].detach()
    assert_same_vectors(found, torch.from_numpy(model.encode(TEXTS[:6], prompt="find: ")))


def _hooked(model: Any) -> None:
    model[0].auto_model.encoder.layer[0].register_forward_hook(lambda *_: None)


def _replaced(model: Any) -> None:
    base = model[0].auto_model
    original = base.forward
    base.forward = lambda *args, **kwargs: original(*args, **kwargs)


def _unread(model: Any) -> None:
    model[0].auto_model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Mish()


@pytest.mark.parametrize("change", [_hooked, _replaced, _unread])
@pytest.mark.parametrize("grad", [True, False])
def test_what_does_not_run_packed_is_padded(change: Any, grad: bool) -> None:
    model = FastEncoder(make_encoder()).eval()
    flat, padded = features_of(model)
    change(model)
    with torch.set_grad_enabled(grad):
        found, expected = (model(each)["sentence_embedding"] for each in (flat, padded))
    assert_same_vectors(found.detach(), expected.detach())
    assert model.stats.forwards == 0
    assert model.stats.fallbacks


@pytest.mark.filterwarnings("ignore:FastEncoder runs this model")
def test_modules_that_look_across_texts_get_padding() -> None:
    flat, padded = features_of(FastEncoder(make_encoder()))
    mixing = FastEncoder(modules=[make_encoder()[0], CNN(64, 8), Pooling(24)]).eval()
    found, expected = (mixing(each)["sentence_embedding"] for each in (flat, padded))
    assert_same_vectors(found.detach(), expected.detach())


def test_heads_of_transformers_refuse_such_batches() -> None:
    model = families.make_model("roberta", head="AutoModelForSequenceClassification")
    flat = {"input_ids": torch.arange(5, 12), "cu_seq_lens_q": torch.tensor([0, 4, 7])}
    with pytest.raises(ValueError, match="RobertaForSequenceClassification reads padded texts"):
        accelerate(model)(**flat)


def test_stock_models_refuse_such_batches() -> None:
    stock = make_encoder()
    flat, _ = features_of(FastEncoder(stock))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        stock(flat)


@pytest.mark.parametrize("cut", [[0, 3], [1, 20], [0, 9, 9], [0, 99, 20]], ids=str)
def test_texts_must_fill_the_ids(cut: list[int]) -> None:
    model = FastEncoder(make_encoder())
    ids = torch.arange(1, 21)
    with pytest.raises(ValueError, match="^cu_seq_lens_q must"):
        model({"input_ids": ids, "cu_seq_lens_q": torch.tensor(cut)})


def test_models_that_do_not_run_packed_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a FastEncoder, got SentenceTransformer"):
        PackedCollator(make_encoder())  # type: ignore[arg-type]
    model = FastEncoder(make_encoder())
    _unread(model)
    with pytest.raises(ValueError, match="model must run packed: .*Mish"):
        PackedCollator(model)


def test_a_model_keeps_its_own_preprocessing() -> None:
    model = FastEncoder(make_encoder())
    before = vars(model[0]).copy()
    PackedCollator(model)(ROWS)
    assert vars(model[0]) == before
    assert isinstance(model, SentenceTransformer) and "attention_mask" in model.preprocess(["a"])
