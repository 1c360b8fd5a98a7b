"""Packed training under what surrounds a step: autocast, checkpoints, compilation, processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import families
from checks import assert_same_vectors
from patched import LENGTHS, pair
from sbert_fast import accelerate
from sbert_fast.patching import counts
from sbert_fast.testing import assert_close_to_oracle
from test_training import NAMES, check_gradients, exact, loss, train

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Change = Callable[[Any], Any]


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["query", "value"], init_lora_weights=False, lora_alpha=1
    )
    return peft.get_peft_model(model, config)


def halved(model: Any) -> Any:
    return model.bfloat16()


def same(model: Any) -> Any:
    return model


AUTOCAST = [
    *((name, same) for name in NAMES),
    ("bert", adapted),
    ("bert", halved),
    ("bert", lambda model: adapted(halved(model))),
    *((name, halved) for name in ("modernbert", "gemma3_text", "qwen3") if name in NAMES),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "change"), AUTOCAST)
def test_autocast(name: str, change: Change) -> None:
    """Every gradient within the 2x rule of the original under autocast; and the states."""
    batch, kept = families.make_batch(name, LENGTHS), []
    original, model = map(change, pair(name))
    around = torch.autocast("cpu", torch.bfloat16)
    expected = train(exact(original), batch)
    ours, peer = train(model, batch, around), train(original, batch, around)
    assert ours.keys() == peer.keys() == expected.keys()
    for key, gradient in ours.items():
        assert gradient.dtype == peer[key].dtype
        assert_close_to_oracle(gradient, expected[key], peer[key], torch.bfloat16)
    for each in (model, exact(original), original):
        with around if each.dtype != torch.float64 else torch.autocast("cpu", enabled=False):
            kept.append(each(**batch)[0][batch["attention_mask"].bool()])
    assert kept[0].dtype == kept[2].dtype
    assert_close_to_oracle(*kept, torch.bfloat16)
    assert counts(model) == {"packed": 2}


@pytest.mark.parametrize(
    ("dtype", "impl", "reason"),
    [
        (torch.float16, "auto", "in torch.float16"),
        (torch.bfloat16, "reference", "reaches the products of the reference"),
    ],
)
def test_another_autocast_runs_the_original(dtype: torch.dtype, impl: str, reason: str) -> None:
    original, model = pair("bert")
    batch, around = families.make_batch("bert", LENGTHS), torch.autocast("cpu", dtype)
    results = [train(each, batch, around) for each in (accelerate(model, impl=impl), original)]
    for ours, theirs in zip(*map(dict.values, results), strict=True):
        assert torch.equal(ours, theirs)
    assert counts(model) == {f"gradients are recorded: torch.autocast {reason}": 1}


def test_nothing_to_train_under_autocast() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        states = [each.requires_grad_(False)(**batch)[0] for each in (original, model)]
    assert torch.equal(*states)
    assert counts(model) == {"torch.autocast is on": 1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [same, adapted])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, change: Change) -> None:
    original, model = map(change, pair("bert", **NO_DROPOUT))
    for each in (original, model):
        each.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    check_gradients(families.make_batch("bert", LENGTHS), original, model)
    assert counts(model) == {"packed": 1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_under_gradient_checkpointing_keep_less() -> None:
    _, model = pair("bert")
    batch, kept = families.make_batch("bert", LENGTHS), []
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    for layer in (None, *model.encoder.layer):
        if layer is not None:
            layer.gradient_checkpointing = False
        tensors: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(tensors.append, lambda x: x):
            model(**batch)
        kept.append(len(tensors))
    assert kept == sorted(set(kept))
    assert counts(model) == {"packed": len(kept)}


def accumulated(model: Any, batch: Any) -> None:
    for start in (0, 2):
        loss(model, {name: value[start : start + 2] for name, value in batch.items()}).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def scaled(model: Any, batch: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.scale(loss(model, batch)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def evaluated_between(model: Any, batch: Any) -> None:
    for step in (model.train, model.eval):
        step()
        loss(model, batch).backward()
        with torch.no_grad():
            model(**batch)


def edited(model: Any, batch: Any) -> None:
    """States that are written to before the backward pass."""
    states = model(**batch)[0]
    states.mul_(0.5)[:, 0].add_(1.0)
    states.square().mul_(batch["attention_mask"][:, :, None]).sum().backward()


def twice(model: Any, batch: Any) -> None:
    total = loss(model, batch)
    total.backward(retain_graph=True)
    total.backward()


STEPS = {accumulated: 2, scaled: 1, evaluated_between: 4, edited: 1, twice: 1}


@pytest.mark.parametrize("step", STEPS)
def test_steps(step: Callable[[Any, Any], None]) -> None:
    batch = families.make_batch("bert", LENGTHS)
    original, model = pair("bert", **NO_DROPOUT)
    found: list[dict[str, Any]] = []
    for each in (model, copy.deepcopy(original).double(), original):
        step(each, batch)
        named = {n: p.grad for n, p in each.named_parameters() if ".key.bias" not in n}
        found.append({name: grad for name, grad in named.items() if grad is not None})
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name in found[0]:
        assert_close_to_oracle(*(grads[name] for grads in found), torch.float32)
    assert counts(model) == {"packed": STEPS[step]}


def labels_out_of_range(model: Any, batch: Any) -> None:
    states = model(**batch)[0][:, 0]
    labels = torch.full((len(states),), states.shape[1])
    torch.nn.functional.cross_entropy(states, labels).backward()


def frozen(model: Any, batch: Any) -> None:
    loss(model.requires_grad_(False), batch).backward()


def stepped_too_early(model: Any, batch: Any) -> None:
    """A step between the forward and the backward pass of a batch."""
    total = loss(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    total.backward()


def on_two_devices(model: Any, batch: Any) -> None:
    loss(model, {name: value.to("meta") for name, value in batch.items()}).backward()


@pytest.mark.parametrize("step", [labels_out_of_range, frozen, stepped_too_early, on_two_devices])
def test_errors_are_those_of_the_original(step: Callable[[Any, Any], None]) -> None:
    batch, told = families.make_batch("bert", LENGTHS), []
    for model in pair("bert"):
        with pytest.raises((RuntimeError, IndexError, NotImplementedError)) as caught:
            step(model, batch)
        # What follows tells of tensors.
        told.append((caught.type, str(caught.value).split(":")[0][:40]))
    assert told[0] == told[1]


@pytest.mark.slow
def test_a_compiled_loss() -> None:
    """Compilers see the original's own operations."""
    batch, results = families.make_batch("bert", LENGTHS), []
    for each in pair("bert"):
        compiled = torch.compile(partial(loss, each, batch), backend="eager")
        compiled().backward()
        results.append({n: p.grad for n, p in each.named_parameters()})
    for name, theirs in results[0].items():
        assert torch.equal(results[1][name], theirs), name


def _process(rank: int, folder: Path, model: Any, batch: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    ours = DistributedDataParallel(accelerate(model))
    half = {name: value[rank::2] for name, value in batch.items()}
    (ours(**half).last_hidden_state * half["attention_mask"][:, :, None]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    torch.save((grads, counts(model)), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Gradients are the mean of those of both."""
    model, batch = families.make_model("bert"), families.make_batch("bert", [7, 30, 12, 23])
    model.pooler = None
    mp.spawn(_process, (tmp_path, copy.deepcopy(model), batch), nprocs=2)
    (model(**batch).last_hidden_state * batch["attention_mask"][:, :, None]).sum().div(2).backward()
    for rank in range(2):
        ours, ran = torch.load(tmp_path / f"{rank}.pt")
        assert ran == {"packed": 1}
        for name, parameter in model.named_parameters():
            if ".key.bias" not in name:
                assert_same_vectors(ours[name].flatten()[None], parameter.grad.flatten()[None])
