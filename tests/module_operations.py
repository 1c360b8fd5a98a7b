"""What people do to the modules of a base model, and the adapters they put in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from model_operations import Act, operation
from walks import NotNow, Subject, Undo

# Modules inside the base model


def _layers(change: Callable[[list[Any]], list[Any]]) -> Act:
    def act(s: Subject) -> Undo:
        kept = list(s.layers)
        s.layers = nn.ModuleList(change(kept))

        def undo(s: Subject) -> None:
            if len(kept) > len(s.layers):
                s.layers = nn.ModuleList([*s.layers, copy.deepcopy(kept[-1])])

        return undo

    return act


operation(_layers(lambda layers: layers[:-1] or layers), name="layer deleted", weight=0.5)
operation(_layers(lambda layers: layers[::-1]), name="layers reversed")
operation(_layers(lambda layers: [layers[0]] * len(layers)), name="layers shared", weight=0.5)


@operation
def layer_deleted_from_list(s: Subject) -> Undo:
    if len(s.layers) < 2:
        raise NotNow
    layer = s.layers[-1]
    del s.layers[-1]
    return lambda s: s.layers.append(layer)


@operation
def weights_tied(s: Subject) -> None:
    a, b = s.layers[0], s.layers[-1]
    for name, module in a.named_modules():
        if name.endswith(("dense", "lin1")):
            other = b.get_submodule(name)
            module.weight = other.weight
            return


@operation
def linear_replaced(s: Subject) -> None:
    old = s.module(nn.Linear)
    new = nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
    _put(s, old, new)


@operation(weight=0.5)
def linear_wrapped(s: Subject) -> Undo:
    old = s.attention().get_submodule("q_lin" if hasattr(s.attention(), "q_lin") else "query")
    if not isinstance(old, nn.Linear):
        raise NotNow
    wrapped = nn.Sequential(old, nn.Tanh())
    _put(s, old, wrapped)

    def undo(s: Subject) -> None:
        for module in list(s.base.modules()):
            if type(module) is nn.Sequential:
                _put(s, module, module[0])

    return undo


def _put(s: Subject, old: nn.Module, new: nn.Module) -> None:
    for module in list(s.model.modules()):
        for name, child in list(module.named_children()):
            if child is old:
                setattr(module, name, new)


@operation(weight=0.5)
def layer_norm_subclassed(s: Subject) -> Undo:
    class RootMeanSquare(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    norm = s.module(nn.LayerNorm)
    norm.__class__ = RootMeanSquare

    def undo(s: Subject) -> None:
        for module in s.model.modules():
            if type(module).__name__ == "RootMeanSquare":
                module.__class__ = nn.LayerNorm

    return undo


@operation
def bias_removed(s: Subject) -> None:
    linear = s.module(nn.Linear)
    if linear.bias is None or isinstance(linear.bias, bool):
        raise NotNow
    linear.bias = None


@operation(weight=0.5)
def dropout_replaced(s: Subject) -> Undo:
    """In inference it does nothing; what stands in its place may."""
    old = s.module(nn.Dropout)
    new = s.rng.choice([nn.Tanh(), nn.Identity(), nn.Hardtanh()])
    _put(s, old, new)

    def undo(s: Subject) -> None:
        for module in list(s.model.modules()):
            for name, child in list(module.named_children()):
                if name == "dropout" and not isinstance(child, nn.Dropout):
                    setattr(module, name, nn.Dropout(0.1))

    return undo


@operation
def modules_exchanged(s: Subject) -> None:
    attention = s.attention()
    if hasattr(attention, "q_lin"):
        raise NotNow
    attention.query, attention.value = attention.value, attention.query


@operation(weight=0.5)
def layer_replaced(s: Subject) -> Undo:
    class Passes(nn.Module):
        def forward(self, states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return states

    old = s.layers[-1]
    s.layers[-1] = Passes()
    return lambda s: s.layers.__setitem__(-1, old)


@operation(changes=False)
def pooler_removed(s: Subject) -> None:
    if not hasattr(s.base, "pooler"):
        raise NotNow
    s.base.pooler = None


@operation(changes=False)
def inputs_require_gradients(s: Subject) -> Undo:
    s.base.enable_input_require_grads()
    return lambda s: s.base.disable_input_require_grads()


@operation(changes=False)
def extra_module_added(s: Subject) -> Undo:
    s.layer().add_module("unused", nn.Linear(2, 2))
    return lambda s: [layer._modules.pop("unused", None) for layer in s.layers]


@operation
def input_embeddings_replaced(s: Subject) -> None:
    old = s.base.get_input_embeddings()
    new = nn.Embedding.from_pretrained(old.weight.detach().flip(1), padding_idx=old.padding_idx)
    s.base.set_input_embeddings(new)


@operation(changes=False)
def embeddings_resized(s: Subject) -> None:
    size = s.base.get_input_embeddings().num_embeddings + s.rng.choice([1, 8])
    s.base.resize_token_embeddings(size)


@operation(weight=0.5)
def embedding_with_max_norm(s: Subject) -> Undo:
    s.base.get_input_embeddings().max_norm = 2.0
    return lambda s: setattr(s.base.get_input_embeddings(), "max_norm", None)


@operation(weight=0.5)
def layer_pruned(s: Subject) -> Undo:
    module = s.module(nn.Linear)
    prune.random_unstructured(module, "weight", amount=0.5)

    def undo(s: Subject) -> None:
        for module in s.model.modules():
            if hasattr(module, "weight_mask"):
                prune.remove(module, "weight")

    return undo


@operation
def pruned_for_good(s: Subject) -> None:
    module = s.module(nn.Linear)
    prune.l1_unstructured(module, "weight", amount=0.5)
    prune.remove(module, "weight")


def _unparametrize(s: Subject) -> None:
    for module in list(s.model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def _parametrized(attach: Callable[[nn.Module], Any]) -> Act:
    def act(s: Subject) -> Undo:
        attach(s.module(nn.Linear))
        return _unparametrize

    return act


operation(_parametrized(parametrizations.weight_norm), name="weight norm", changes=False)
operation(_parametrized(parametrizations.spectral_norm), name="spectral norm", weight=0.5)
operation(
    _parametrized(lambda m: parametrize.register_parametrization(m, "weight", Doubled())),
    name="parametrized",
    weight=0.5,
)


@operation
def parametrized_and_back(s: Subject) -> None:
    parametrize.register_parametrization(s.module(nn.Linear), "weight", Doubled())
    _unparametrize(s)


@operation(weight=0.3)
def quantized(s: Subject) -> Undo:
    kept = s.first.model
    s.first.model = torch.ao.quantization.quantize_dynamic(kept, {nn.Linear}, dtype=torch.qint8)
    return lambda s: setattr(s.first, "model", kept)
