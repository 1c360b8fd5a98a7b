"""The trainers of sentence-transformers, unchanged, train our models as they train stock ones."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.cross_encoder import losses as scoring
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sparse_encoder import losses as sparse
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

import families
from checks import assert_same_vectors
from sbert_fast import FastCrossEncoder, FastEncoder, counts
from trained import (
    NO_DROPOUT,
    Make,
    Trained,
    accelerated,
    assert_trains_packed,
    flat_parameters,
    runs,
    train,
)

TEXTS = families.make_texts(24, max_words=30)
PAIRS = {"a": TEXTS[:8], "b": TEXTS[8:16]}
TRIPLES = PAIRS | {"c": TEXTS[16:]}
CLASSES = PAIRS | {"label": [0, 1, 2, 0, 1, 2, 0, 1]}
MATCHES = PAIRS | {"label": [0, 1] * 4}
SCORES = PAIRS | {"label": [random.Random(seed).random() for seed in range(8)]}
MARGINS = TRIPLES | {"label": SCORES["label"]}
VECTORS = {"a": TEXTS[:8], "label": torch.randn(8, 64, generator=torch.manual_seed(0)).tolist()}


def make_encoder(seed: int = 0) -> SentenceTransformer:
    return families.make_sentence_transformer("bert", seed=seed, overrides=NO_DROPOUT)


def fit(how: tuple[Make, dict[str, Any]], kind: str = "embeddings", **options: Any) -> Any:
    return lambda model: train(model, *how, kind, **options)


def _guided(model: Any) -> Any:
    return losses.GISTEmbedLoss(model, families.make_sentence_transformer("bert", seed=5))


def _two(model: Any) -> dict[str, Any]:
    ranking = losses.MultipleNegativesRankingLoss(model)
    return {"ranked": ranking, "scored": losses.CoSENTLoss(model)}


LOSSES: dict[str, tuple[Make, dict[str, Any]]] = {
    "Contrastive": (losses.ContrastiveLoss, MATCHES),
    "OnlineContrastive": (losses.OnlineContrastiveLoss, MATCHES),
    "Triplet": (losses.TripletLoss, TRIPLES),
    "CosineSimilarity": (losses.CosineSimilarityLoss, SCORES),
    "CoSENT": (losses.CoSENTLoss, SCORES),
    "Softmax": (lambda model: losses.SoftmaxLoss(model, 64, 3), CLASSES),
    "MultipleNegativesRanking": (losses.MultipleNegativesRankingLoss, PAIRS),
    "CachedMultipleNegativesRanking": (
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
        PAIRS,
    ),
    "Matryoshka": (
        lambda model: losses.MatryoshkaLoss(
            model, losses.MultipleNegativesRankingLoss(model), [64, 16]
        ),
        PAIRS,
    ),
    "GIST": (_guided, PAIRS),
    "MSE": (losses.MSELoss, VECTORS),
    "MarginMSE": (losses.MarginMSELoss, MARGINS),
    "two datasets": (_two, {"ranked": PAIRS, "scored": SCORES}),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_an_encoder_trains_as_in_stock(loss: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sbert_fast"):
        model = assert_trains_packed(make_encoder, FastEncoder, fit(LOSSES[loss]))
        vectors = model.encode(TEXTS)
    assert not caplog.records
    assert_same_vectors(vectors, SentenceTransformer(modules=[*model], device="cpu").encode(TEXTS))
    assert model.stats.fallbacks == {}


@pytest.mark.parametrize("loss", ["CoSENT", "CachedMultipleNegativesRanking", "Matryoshka"])
def test_an_accelerated_model_trains_as_in_stock(loss: str) -> None:
    model = assert_trains_packed(make_encoder, accelerated, fit(LOSSES[loss]))
    packed = counts(model)["packed"]
    model.encode(TEXTS)
    assert counts(model) == {"packed": packed + 1}


RERANKING: dict[str, tuple[Make, dict[str, Any]]] = {
    "BinaryCrossEntropy": (scoring.BinaryCrossEntropyLoss, SCORES),
    "MSE": (scoring.MSELoss, SCORES),
    "CachedMultipleNegativesRanking": (
        lambda model: scoring.CachedMultipleNegativesRankingLoss(
            model, num_negatives=2, mini_batch_size=4
        ),
        PAIRS,
    ),
}


@pytest.mark.parametrize("ours", [FastCrossEncoder, accelerated])
@pytest.mark.parametrize("loss", RERANKING)
def test_a_reranker_trains_as_in_stock(loss: str, ours: Make) -> None:
    def make() -> Any:
        return families.make_cross_encoder("bert", **NO_DROPOUT, classifier_dropout=0.0)

    model = assert_trains_packed(make, ours, fit(RERANKING[loss], "scores"))
    before = runs(model)[1]
    model.predict(list(zip(*PAIRS.values(), strict=True)))
    assert runs(model)[1] == before


def test_a_sparse_model_trains_as_in_stock() -> None:
    def loss(model: Any) -> Any:
        ranking = sparse.SparseMultipleNegativesRankingLoss(model)
        return sparse.SpladeLoss(
            model, ranking, query_regularizer_weight=0.1, document_regularizer_weight=0.1
        )

    def make() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            families.save_model("bert", folder, head="AutoModelForMaskedLM", **NO_DROPOUT)
            modules = [Transformer(folder, transformer_task="fill-mask"), SpladePooling()]
        return SparseEncoder(modules=modules, device="cpu")

    assert_trains_packed(make, accelerated, fit((loss, PAIRS), "sparse"))


def test_the_routes_of_a_router_train_as_in_stock() -> None:
    def make() -> Any:
        query, document = make_encoder(), make_encoder(seed=1)
        router = Router.for_query_document([*query], [*document])
        return SentenceTransformer(modules=[router], device="cpu")

    routes = {"router_mapping": {"a": "query", "b": "document"}}
    how = LOSSES["MultipleNegativesRanking"]
    assert_trains_packed(make, FastEncoder, fit(how, **routes))


# The trainer of transformers, and no trainer at all

LENGTHS = [5, 9, 20, 13]


def collate(numbers: list[int], of_tokens: bool = False) -> dict[str, Any]:
    """A batch with a label for each text, or for each token."""
    batch = families.make_batch("bert", [LENGTHS[n % 4] + n for n in numbers])
    labels = torch.tensor([number % 3 for number in numbers])
    if of_tokens:
        labels = (batch["input_ids"] % 3).where(batch["attention_mask"].bool(), -100)
    return batch | {"labels": labels}


def by_trainer(model: Any) -> Trained:
    found: list[Any] = []
    handle = model.register_forward_hook(lambda *told: found.append(told[2].loss.detach()[None]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=2,
            per_device_train_batch_size=4,
            optim="sgd",
            learning_rate=0.5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        Trainer(model, arguments, collate, list(range(8))).train()
    handle.remove()
    return Trained(model, found, flat_parameters(model))


def by_hand(model: Any, of_tokens: bool = False) -> Trained:
    """The step that a large epsilon leaves is nearly in proportion to the gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1.0)
    found = []
    for numbers in ([0, 1, 2, 3], [4, 5, 6, 7]):
        optimizer.zero_grad()
        loss = model.train()(**collate(numbers, of_tokens)).loss
        loss.backward()
        optimizer.step()
        found.append(loss.detach()[None])
    return Trained(model, found, flat_parameters(model))


@pytest.mark.parametrize(
    ("name", "head", "trainer"),
    [
        ("bert", "SequenceClassification", by_trainer),
        ("bert", "SequenceClassification", by_hand),
        ("roberta", "SequenceClassification", by_hand),
        ("bert", "TokenClassification", partial(by_hand, of_tokens=True)),
        ("electra", "MaskedLM", partial(by_hand, of_tokens=True)),
    ],
)
def test_a_head_trains_as_in_stock(name: str, head: str, trainer: Callable[[Any], Trained]) -> None:
    def make() -> Any:
        return families.make_model(name, head=f"AutoModelFor{head}", num_labels=3, **NO_DROPOUT)

    assert_trains_packed(make, accelerated, trainer)


# What a trainer does besides steps


def _evaluator() -> Any:
    return EmbeddingSimilarityEvaluator(TEXTS[:8], TEXTS[8:16], SCORES["label"], name="dev")


def test_early_stopping_with_an_evaluator(tmp_path: Path) -> None:
    """Nothing is learnt, so nothing gets better; the best checkpoint is loaded."""
    trained = train(
        FastEncoder(make_encoder()),
        *LOSSES["CoSENT"],
        output_dir=str(tmp_path),
        evaluator=_evaluator(),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        learning_rate=0.0,
        max_steps=9,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_dev_spearman_cosine",
    )
    assert trained.trainer.state.global_step == 2
    assert trained.trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    stats = trained.model.stats
    assert stats.texts == 2 * 16
    assert stats.fallbacks == {}


def test_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    how: dict[str, Any] = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    whole = train(FastEncoder(make_encoder()), *LOSSES["MultipleNegativesRanking"], **how)
    rest = train(
        FastEncoder(make_encoder()),
        *LOSSES["MultipleNegativesRanking"],
        resumed_from=str(tmp_path / "checkpoint-1"),
        **how,
    )
    assert len(rest.losses) == 1
    for name, parameter in whole.parameters.items():
        assert torch.equal(rest.parameters[name], parameter), name
    SentenceTransformer(str(tmp_path / "checkpoint-2"), device="cpu")


def test_gradient_checkpointing_trains_as_in_stock() -> None:
    how = fit(LOSSES["MultipleNegativesRanking"], gradient_checkpointing=True)
    assert_trains_packed(make_encoder, FastEncoder, how)


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1, "evaluator": _evaluator()},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss", ["CoSENT", "Matryoshka"])
def test_what_an_option_leaves_behind_is_seen_through(loss: str, options: dict[str, Any]) -> None:
    """The model is as fast as before: what it does in training is another matter."""
    model = train(FastEncoder(make_encoder()), *LOSSES[loss], **options).model
    before = model.stats
    vectors = model.encode(TEXTS)
    assert model.stats.fallbacks == before.fallbacks
    assert model.stats.texts == before.texts + len(TEXTS)
    assert_same_vectors(vectors, SentenceTransformer(modules=[*model], device="cpu").encode(TEXTS))


# The length of a run


@pytest.mark.parametrize("kind", [FastEncoder, FastCrossEncoder])
def test_a_step_whose_embeddings_are_not_finite_names_the_texts(
    kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    make = families.make_cross_encoder if kind is FastCrossEncoder else make_encoder
    model = kind(make()).train()
    texts = [("sea", "sun"), ("wind", "tree"), ("road", "sea")]
    inputs = texts if kind is FastCrossEncoder else [a for a, _ in texts]
    token = model.tokenizer.convert_tokens_to_ids("wind")
    with torch.no_grad():
        model[0].auto_model.get_input_embeddings().weight[token] = float("inf")
    model(model.preprocess(inputs))
    assert "hold NaN or infinity, for inputs[1]" in caplog.text


@pytest.mark.slow
def test_curves_of_losses_lie_on_one_another() -> None:
    texts, rng = families.make_texts(200, max_words=20), random.Random(0)
    columns = {"a": texts[:100], "b": texts[100:], "label": [rng.random() for _ in range(100)]}
    steps = {"max_steps": 200, "optim": "adamw_torch", "learning_rate": 1e-4}
    stock, ours = (
        torch.cat(train(model, losses.CoSENTLoss, columns, **steps).losses)
        for model in (make_encoder(), FastEncoder(make_encoder()))
    )
    assert len(stock) == 200
    assert stock[-50:].mean() < stock[:50].mean()
    assert ((ours - stock).abs() / stock).max() < 1e-4
