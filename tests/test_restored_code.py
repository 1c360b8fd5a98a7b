"""Code that was put back, and idle hooks, run packed; global hooks are called as in stock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import accelerate as hf_accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    CoSENTLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
)
from torch import nn
from torch.nn.modules import module as hooks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTION
from transformers.models.bert.modeling_bert import BertLayer

from changed import TEXTS, WAYS, ours, packed_runs, tiny
from checks import assert_same_vectors
from families import randomize


def bound_forwards(model: Any) -> None:
    for module in model.modules():
        if "forward" not in module.__dict__:
            module.forward = module.forward


def with_loss(make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    """One step of a loss, without an optimizer."""

    def change(model: Any) -> None:
        features = [model.preprocess(TEXTS[:2]), model.preprocess(TEXTS[1:])]
        model.train()
        with torch.enable_grad():
            make(model)(features, torch.tensor([0.2, 0.9])).backward()
        model.zero_grad()
        model.eval()

    return change


def checkpointing(model: Any, *, off: bool = True) -> None:
    base = model[0].auto_model
    base.gradient_checkpointing_enable()
    if off:
        base.gradient_checkpointing_disable()


def hooks_of_accelerate(model: Any) -> None:
    for module in (model[0].auto_model.encoder, *model[0].auto_model.encoder.layer):
        add_hook_to_module(module, ModelHook())
        remove_hook_from_module(module)
        assert "forward" in module.__dict__


def prepared_by_accelerate(model: Any) -> None:
    accelerator = hf_accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    assert "forward" in model.__dict__
    assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    AcceleratorState._reset_state(reset_partial_state=True)


def hidden_states_once(model: Any) -> None:
    base = model[0].auto_model
    with torch.no_grad():
        base(torch.tensor([[2, 20, 3]]), output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in base.modules())


def hook_added_and_removed(model: Any) -> None:
    for module in model.modules():
        module.register_forward_hook(lambda *_: None).remove()


def class_patched_and_put_back(_: Any) -> None:
    own, sdpa = BertLayer.forward, ATTENTION["sdpa"]
    BertLayer.forward = lambda *args, **how: own(*args, **how)
    ATTENTION.register("sdpa", lambda *args, **how: sdpa(*args, **how))
    BertLayer.forward = own
    ATTENTION.register("sdpa", sdpa)


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "bound forwards": bound_forwards,
    "Matryoshka": with_loss(lambda m: MatryoshkaLoss(m, CoSENTLoss(m), [64, 16])),
    "AdaptiveLayer": with_loss(lambda m: AdaptiveLayerLoss(m, CoSENTLoss(m))),
    "Matryoshka2d": with_loss(lambda m: Matryoshka2dLoss(m, CoSENTLoss(m), [64, 16])),
    "checkpointing": checkpointing,
    "checkpointing, still on": lambda m: checkpointing(m, off=False),
    "input gradients": lambda m: m[0].auto_model.enable_input_require_grads(),
    "hooks of accelerate": hooks_of_accelerate,
    "Accelerator, bf16": prepared_by_accelerate,
    "hidden states once": hidden_states_once,
    "hooks that were removed": hook_added_and_removed,
    "classes put back": class_patched_and_put_back,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_what_changes_nothing_runs_packed(change: str, way: str) -> None:
    model, expected = ours(tiny, HARMLESS[change], way), tiny().encode(TEXTS)
    packed, elsewhere = packed_runs(model)
    assert_same_vectors(model.encode(TEXTS), expected)
    assert packed_runs(model) == (packed + 1, elsewhere)


def test_a_bound_forward_of_a_copy_is_its_own() -> None:
    encoder = ours(tiny, bound_forwards, "used before")
    twin = copy.deepcopy(encoder)
    randomize(twin[0].auto_model, seed=3)
    expected = SentenceTransformer(modules=[*tiny()], device="cpu")
    randomize(expected[0].auto_model, seed=3)
    assert_same_vectors(twin.encode(TEXTS), expected.encode(TEXTS))
    assert_same_vectors(encoder.encode(TEXTS), tiny().encode(TEXTS))


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """The modules that a global hook, of which the encoder knows nothing, has seen."""
    seen: list[str] = []
    handle = hooks.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_global_hooks_see_every_module(way: str, calls: list[str]) -> None:
    stock, model = tiny(), ours(tiny, lambda _: None, way)
    calls.clear()
    expected = stock.encode(TEXTS)
    in_stock = list(calls)
    calls.clear()
    runs = packed_runs(model)
    assert_same_vectors(model.encode(TEXTS), expected)
    assert [name.replace("FastEncoder", "SentenceTransformer") for name in calls] == in_stock
    assert packed_runs(model)[1] == runs[1] + 1


def shift_norms(module: nn.Module, _: Any, output: Any) -> Any:
    return output + (output > 0) * 0.5 if isinstance(module, nn.LayerNorm) else output


def shift_inputs(module: nn.Module, args: tuple[Any, ...]) -> Any:
    return (args[0] * 0.5, *args[1:]) if isinstance(module, nn.Linear) else None


GLOBAL = {
    "forward hook": (hooks.register_module_forward_hook, shift_norms),
    "forward pre-hook": (hooks.register_module_forward_pre_hook, shift_inputs),
}


@pytest.mark.parametrize("way", WAYS[::2])
@pytest.mark.parametrize("kind", GLOBAL)
def test_global_hooks_change_results(kind: str, way: str) -> None:
    stock, model = tiny(), ours(tiny, lambda _: None, way)
    before, runs = stock.encode(TEXTS), packed_runs(model)
    register, hook = GLOBAL[kind]
    handle = register(hook)
    try:
        expected, got = stock.encode(TEXTS), model.encode(TEXTS)
    finally:
        handle.remove()
    assert np.abs(expected - before).max() > 1e-4, "the hook does nothing"
    assert_same_vectors(got, expected)
    assert packed_runs(model) == (runs[0], runs[1] + 1)
    assert_same_vectors(model.encode(TEXTS), before)
    assert packed_runs(model) == (runs[0] + 1, runs[1] + 1)
