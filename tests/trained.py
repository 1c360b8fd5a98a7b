"""A model of ours beside stock in fp32 and in fp64, all trained in the same way."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from torch import Tensor, nn

from checks import assert_same_vectors
from sbert_fast import FastCrossEncoder, FastEncoder, accelerate
from sbert_fast.patching import counts
from sbert_fast.testing import assert_close_to_oracle

TRAINERS: dict[str, tuple[Any, Any]] = {
    "embeddings": (SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
    "scores": (CrossEncoderTrainer, CrossEncoderTrainingArguments),
    "sparse": (SparseEncoderTrainer, SparseEncoderTrainingArguments),
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Make = Callable[[Any], Any]
Fit = Callable[[Any], "Trained"]
# The gradient of the bias of keys is nothing but rounding: compared beside those of its siblings.
_PARTS = re.compile(r"\.(query|key|value)\.")
# A bias of one number, whose error may be none by luck, is compared beside its weights.
_OF_HEADS = re.compile(r"(classifier|out_proj)\.(weight|bias)$")


@dataclass
class Trained:
    """What training has left behind.

    Attributes:
        model: as it is now.
        losses: of every step.
        parameters: of the model and of the loss, by name, flat.
        trainer: what trained it, if anything did.
    """

    model: Any
    losses: list[Tensor]
    parameters: dict[str, Tensor]
    trainer: Any = None


def flat_parameters(*modules: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, each once."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in nn.ModuleList(modules).named_parameters():
        name = _OF_HEADS.sub(r"\1", _PARTS.sub(".qkv.", name))
        parts.setdefault(name, []).append(parameter.detach().flatten())
    return {name: torch.cat(some) for name, some in parts.items()}


def _losses_of(made: Any) -> list[nn.Module]:
    return list(made.values()) if isinstance(made, dict) else [made]


def dataset(columns: dict[str, Any]) -> Any:
    """Of columns, or of several datasets of columns by name."""
    if all(isinstance(column, dict) for column in columns.values()):
        return DatasetDict({name: Dataset.from_dict(each) for name, each in columns.items()})
    return Dataset.from_dict(columns)


def train(
    model: Any,
    make_loss: Make,
    columns: dict[str, Any],
    kind: str = "embeddings",
    *,
    resumed_from: str | None = None,
    **options: Any,
) -> Trained:
    """Train a model by the trainer of its kind, for two steps of four rows unless told otherwise.

    Args:
        model: of any dtype; the loss gets the same.
        make_loss: makes a loss of the model, or a dict of them by dataset.
        columns: see :func:`dataset`.
        kind: a key of `TRAINERS`.
        resumed_from: a checkpoint.
        **options: of the trainer, and of its arguments.
    """
    trainer_class, arguments_class = TRAINERS[kind]
    apart = {"callbacks", "evaluator", "data_collator", "eval_dataset"} & options.keys()
    own = {name: options.pop(name) for name in apart}
    torch.manual_seed(0)
    loss = make_loss(model)
    losses: list[Tensor] = []

    def record(_: Any, __: Any, result: Any) -> None:
        total = sum(result.values()) if isinstance(result, dict) else result
        losses.append(total.detach().flatten())

    for each in _losses_of(loss):
        each.to(next(model.parameters()).dtype)
        each.register_forward_hook(record)
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_class(**{"output_dir": folder, **settings, **options})
        trainer = trainer_class(model, arguments, train_dataset=dataset(columns), loss=loss, **own)
        trainer.train(resume_from_checkpoint=resumed_from)
    parameters = flat_parameters(model, *_losses_of(loss))
    return Trained(model, losses, parameters, trainer)


def _assert_trained_as_stock(ours: Trained, make: Callable[[], Any], fit: Fit) -> None:
    """Every parameter within the 2x rule of stock in fp64, the peer is stock in fp32; the losses
    within the budget: two numbers of stock may be exact by chance."""
    before = flat_parameters(make())
    peer, expected = fit(make()), fit(make().double())
    assert ours.parameters.keys() == peer.parameters.keys() == expected.parameters.keys()
    assert any((expected.parameters[name] - p).abs().max() > 1e-3 for name, p in before.items())
    for name, parameter in ours.parameters.items():
        wanted, theirs = expected.parameters[name], peer.parameters[name]
        assert_close_to_oracle(parameter, wanted, theirs, torch.float32)
    assert_same_vectors(*(torch.cat(each.losses) for each in (ours, expected)))


def runs(model: Any) -> tuple[int, dict[str, int]]:
    """Calls of base models that ran packed, and those that did not, by reason."""
    if isinstance(model, (FastEncoder, FastCrossEncoder)):
        return model.stats.forwards, model.stats.fallbacks
    told = counts(model)
    return told.pop("packed", 0), told


def assert_trains_packed(make: Callable[[], Any], ours: Make, fit: Fit) -> Any:
    """A model that `ours` makes of a stock one trains packed, and becomes what that would.

    Returns:
        The model.
    """
    model = ours(make())
    trained = fit(model)
    packed, others = runs(model)
    assert packed > 0
    assert others == {}
    _assert_trained_as_stock(trained, make, fit)
    return model


def accelerated(model: Any) -> Any:
    return accelerate(copy.deepcopy(model))
