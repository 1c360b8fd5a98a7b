"""What people do to the code of one model: hooks, and functions replaced on instances."""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from model_operations import Act, operation
from walks import NotNow, Subject, Undo

Where = Callable[[Subject], Any]

CHILD_SECONDS = 60


def scaled(value: Any) -> Any:
    """A result, each of its tensors bent: a normalisation behind would take back a factor."""
    if isinstance(value, torch.Tensor):
        return value + (value > 0) * value * 0.5 if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(scaled, value))
    if isinstance(value, MutableMapping):
        for name in list(value):
            value[name] = scaled(value[name])
    return value


PLACES: dict[str, Where] = {
    "encoder": lambda s: s.model,
    "Transformer": lambda s: s.first,
    "base model": lambda s: s.base,
    "embeddings": lambda s: s.base.embeddings,
    "layer": Subject.layer,
    "attention": Subject.attention,
    "linear": lambda s: s.module(nn.Linear),
    "norm": lambda s: s.module(nn.LayerNorm),
    "table": lambda s: s.base.get_input_embeddings(),
    "dropout": lambda s: s.module(nn.Dropout),
    "Pooling": lambda s: s.part("Pooling"),
    "Dense": lambda s: s.part("Dense"),
}


# Hooks


def _hooked(where: Where, register: str, hook: Callable[..., Any], **options: Any) -> Act:
    def act(s: Subject) -> Undo:
        getattr(where(s), register)(hook, **options)
        dictionary = {
            "register_forward_hook": "_forward_hooks",
            "register_forward_pre_hook": "_forward_pre_hooks",
        }.get(register, "_backward_hooks")
        return lambda s: [getattr(module, dictionary).clear() for module in s.model.modules()]

    return act


def _hook(module: nn.Module, arguments: Any, output: Any) -> Any:
    return scaled(output)


def _pre_hook(module: nn.Module, arguments: Any) -> Any:
    return scaled(arguments)


def _watch(module: nn.Module, *arguments: Any) -> None:
    """A hook that changes nothing."""


for _place, _where in PLACES.items():
    operation(
        _hooked(_where, "register_forward_hook", _hook),
        name=f"hook on {_place}",
        # sentence-transformers calls its forward, and so no hook of it.
        changes=_place != "base model",
        weight=0.25,
    )
for _place in ("Transformer", "layer", "linear"):
    operation(
        _hooked(PLACES[_place], "register_forward_pre_hook", _pre_hook),
        name=f"hook before {_place}",
        changes=_place != "Transformer",
        weight=0.25,
    )
operation(
    _hooked(PLACES["layer"], "register_forward_hook", _watch),
    name="hook that watches",
    changes=False,
    weight=0.5,
)
operation(
    _hooked(PLACES["layer"], "register_full_backward_hook", _watch),
    name="backward hook",
    changes=False,
    weight=0.5,
)


def _global_hook(register: Callable[..., Any], hook: Callable[..., Any]) -> Act:
    def act(s: Subject) -> Undo:
        handle = register(hook)
        s.globals.callback(handle.remove)
        return lambda s: handle.remove()

    return act


def _global_forward_hook(module: nn.Module, arguments: Any, output: Any) -> Any:
    return scaled(output) if isinstance(module, nn.LayerNorm) else None


def _global_pre_hook(module: nn.Module, arguments: Any) -> Any:
    return scaled(arguments) if isinstance(module, nn.LayerNorm) else None


operation(
    _global_hook(nn_module.register_module_forward_hook, _global_forward_hook),
    name="global hook",
    weight=0.5,
)
operation(
    _global_hook(nn_module.register_module_forward_pre_hook, _global_pre_hook),
    name="global hook before",
    weight=0.5,
)


# Functions replaced on an instance


def _replaced(where: Where, name: str, wrap: Callable[[Any], Any]) -> Act:
    def act(s: Subject) -> Undo:
        target = where(s)
        old = target.__dict__.get(name)
        setattr(target, name, wrap(getattr(target, name)))

        def undo(s: Subject) -> None:
            target = where(s)
            target.__dict__.pop(name, None)
            if old is not None:
                target.__dict__[name] = old

        return undo

    return act


def bent(function: Any) -> Any:
    @functools.wraps(function)
    def bend(*args: Any, **kwargs: Any) -> Any:
        return scaled(function(*args, **kwargs))

    return bend


def _transparent(function: Any) -> Any:
    """As accelerate and the Trainer wrap a forward."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


for _place, _where in PLACES.items():
    operation(_replaced(_where, "forward", bent), name=f"forward of {_place} replaced", weight=0.25)
for _place in ("encoder", "Transformer", "base model", "layer"):
    operation(
        _replaced(PLACES[_place], "forward", _transparent),
        name=f"forward of {_place} wrapped",
        changes=False,
        weight=0.25,
    )
    operation(
        _replaced(PLACES[_place], "forward", lambda forward: forward),
        name=f"forward of {_place} restored",
        changes=False,
        weight=0.25,
    )


def _prefixed(preprocess: Any) -> Any:
    @functools.wraps(preprocess)
    def prefix(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return preprocess([f"sea {text}" for text in inputs], *args, **kwargs)

    return prefix


for _place in ("encoder", "Transformer"):
    operation(
        _replaced(PLACES[_place], "preprocess", _prefixed),
        name=f"preprocess of {_place} replaced",
        weight=0.5,
    )


@operation(weight=0.5)
def feed_forward_chunk_replaced(s: Subject) -> Undo:
    if not hasattr(s.layer(), "feed_forward_chunk"):
        raise NotNow
    s.layer()
    return _replaced(Subject.layer, "feed_forward_chunk", bent)(s)
