"""Weights written in the ways people write them: the next call serves the model as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor, nn

from checks import MAX_DISTANCE, assert_same_vectors, bits, cosine_distances
from families import make_sentence_transformer, randomize
from sbert_fast import FastEncoder, attention, linears, pooling, preparation
from sbert_fast.errors import InvalidWeightsError
from surfaces import SURFACES, TEXTS
from weight_writers import ADAPTERS, OPTIMIZERS, WRITERS, value

EVERY = OPTIMIZERS | ADAPTERS | WRITERS


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("writer", EVERY)
def test_written_weights_are_served(surface: str, writer: str) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    before = model.check()
    EVERY[writer](st)
    after = model.check()
    assert cosine_distances(after, before).max() > MAX_DISTANCE
    assert model.fallbacks() == {} or surface == "accelerate"


@pytest.mark.parametrize("where", ["encoder", "dense"])
def test_written_to_while_they_are_prepared(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread: what was prepared is not what the weights are then."""
    st = make_sentence_transformer()
    st.append(randomize(Dense(64, 32)))
    weight = value(st).weight if where == "encoder" else st[-1].linear.weight
    encoder, prepare = FastEncoder(st), linears.prepare_linear

    def prepare_and_write(*args: Any) -> Any:
        prepared = prepare(*args)
        weight.data.mul_(-1.5)
        return prepared

    for module in (attention, pooling, preparation):
        monkeypatch.setattr(module, "prepare_linear", prepare_and_write)
    encoder.refresh()
    encoder.encode(TEXTS)
    monkeypatch.undo()
    stock = SentenceTransformer(modules=list(st), device="cpu")
    assert_same_vectors(encoder.encode(TEXTS), stock.encode(TEXTS))


def test_the_trainer_with_its_default_optimizer(tmp_path: Path) -> None:
    encoder = FastEncoder(make_sentence_transformer())
    before = encoder.encode(TEXTS)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.05, use_cpu=True, save_strategy="no"
    )
    data = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    loss = MultipleNegativesRankingLoss(encoder)
    trainer = SentenceTransformerTrainer(encoder, arguments, train_dataset=data, loss=loss)
    trainer.train()
    after = encoder.encode(TEXTS)
    stock = SentenceTransformer(modules=list(encoder), device="cpu")
    assert_same_vectors(after, stock.encode(TEXTS))
    assert cosine_distances(after, before).max() > MAX_DISTANCE


@pytest.mark.parametrize("surface", SURFACES)
def test_data_in_a_parameter_that_counts_no_writes(surface: str) -> None:
    """Made in inference mode, given ordinary data later: it has no version; torch may refuse it."""
    st = make_sentence_transformer()
    model, base = SURFACES[surface](st), st[0].auto_model
    with torch.inference_mode():
        state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        base.load_state_dict(state, assign=True)
    model.check()
    weight = value(st).weight
    weight.data = -weight.detach().clone()
    try:
        expected = model.stock()
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)):
            model.ours()
    else:
        assert_same_vectors(model.ours(), expected)
    (reason,) = model.fallbacks()
    assert reason.endswith("a tensor made in inference mode was given other data")


# Weights that live elsewhere, written from there


def _flat(st: SentenceTransformer, tmp_path: Path) -> Callable[[], object]:
    """As flat master parameters (apex, ZeRO) have it: every parameter a view of one vector."""
    vector = nn.utils.parameters_to_vector(st.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, st.parameters())
    return lambda: vector.mul_(1.3)


def _mapped(st: SentenceTransformer, tmp_path: Path) -> Callable[[], object]:
    """As another process has it that trains on shared memory: pages change."""
    weight = value(st).weight
    weight.detach().numpy().tofile(tmp_path / "weight")
    here, there = (np.memmap(tmp_path / "weight", np.float32, "r+", shape=(64, 64)) for _ in "ab")
    weight.data = torch.from_numpy(here)
    return lambda: np.negative(there, out=there)


def _attribute(st: SentenceTransformer, tmp_path: Path) -> Callable[[], object]:
    """As meta-learning has it: a plain tensor in place of the parameter."""
    linear = value(st)
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.weight = weight
    return lambda: setattr(linear, "weight", -weight)


def _buffer(st: SentenceTransformer, tmp_path: Path) -> Callable[[], object]:
    """Frozen: a buffer in place of the parameter."""
    linear = value(st)
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.register_buffer("weight", weight)
    return lambda: linear.weight.neg_()


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("move", [_flat, _mapped, _attribute, _buffer])
def test_weights_that_live_elsewhere(
    surface: str, move: Callable[[Any, Path], Callable[[], object]], tmp_path: Path
) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    model.check()
    write = move(st, tmp_path)
    before = model.check()
    write()
    assert cosine_distances(model.check(), before).max() > MAX_DISTANCE


# One row of any matrix


def _negate(rows: Tensor) -> None:
    rows[5] = -rows[5]


def _exchange(rows: Tensor) -> None:
    rows[[2, 7]] = rows[[7, 2]]


def _shuffle(rows: Tensor) -> None:
    rows[9] = rows[9].roll(1)


def _nudge(rows: Tensor) -> None:
    rows[-1] *= 1.1


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("write", [_negate, _exchange, _shuffle, _nudge])
def test_one_row_of_any_matrix(surface: str, write: Callable[[Tensor], None]) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    before = model.check()
    base = st[0].auto_model
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("pooler"):
            write(module.weight.data)
            after = model.check()
            # What keys are multiplied with may be too weak to turn a vector by a bit of fp32.
            assert ".key" in name or (bits(after) != bits(before)).any(), name
            before = after


def test_one_row_of_a_dense_module() -> None:
    dense = randomize(Dense(64, 24))
    st = SentenceTransformer(modules=[*make_sentence_transformer(normalize=False), dense])
    model = SURFACES["encode"](st.cpu())
    before = model.check()
    dense.linear.weight.data[3] *= -1
    assert cosine_distances(model.check(), before).max() > MAX_DISTANCE


HALF_NAMES = ("word_embeddings.weight", "position_embeddings.weight", "0.output.LayerNorm.weight")


@pytest.mark.parametrize("name", HALF_NAMES)
def test_what_is_a_copy_in_another_dtype_only(name: str) -> None:
    st = make_sentence_transformer().half()
    encoder = FastEncoder(st)
    before = encoder.encode(TEXTS)
    (parameter,) = (p for found, p in st.named_parameters() if found.endswith(name))
    parameter.data.mul_(-1)
    after = encoder.encode(TEXTS)
    assert_same_vectors(after, FastEncoder(st).encode(TEXTS))
    assert cosine_distances(after, before).max() > MAX_DISTANCE


@pytest.mark.parametrize("surface", SURFACES)
def test_weights_written_to_nan_are_refused(surface: str) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    model.check()
    value(st).weight.data[3] = float("nan")
    with pytest.raises(InvalidWeightsError, match=r"value\.weight"):
        model.ours()
