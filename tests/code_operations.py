"""What people do to the code of all models: functions replaced on classes and in modules."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hook_operations import bent
from model_operations import Act, operation
from walks import NotNow, Subject, Undo

# Functions replaced on classes and in modules


def _patched(s: Subject, target: Any, name: str, wrap: Callable[[Any], Any]) -> Undo:
    old = target.__dict__[name]

    def restore(*_: Any) -> None:
        setattr(target, name, old)

    s.globals.callback(restore)
    setattr(target, name, wrap(old))
    return restore


def _on_class(find: Callable[[Subject], type], name: str, wrap: Callable[[Any], Any]) -> Act:
    def act(s: Subject) -> Undo:
        for cls in find(s).__mro__:
            if name in cls.__dict__:
                return _patched(s, cls, name, wrap)
        raise NotNow

    return act


CLASSES: dict[str, Callable[[Subject], type]] = {
    "base model": lambda s: type(s.base),
    "embeddings": lambda s: type(s.base.embeddings),
    "layer": lambda s: type(s.layer()),
    "attention": lambda s: type(s.attention()),
    "list of layers": lambda s: type(s._stack()[0]),
    "Linear": lambda _: nn.Linear,
    "LayerNorm": lambda _: nn.LayerNorm,
    "Embedding": lambda _: nn.Embedding,
    "Transformer": lambda _: Transformer,
    "Pooling": lambda _: Pooling,
    "SentenceTransformer": lambda _: SentenceTransformer,
}
for _place, _find in CLASSES.items():
    operation(_on_class(_find, "forward", bent), name=f"{_place}.forward patched", weight=0.25)
operation(
    _on_class(CLASSES["layer"], "feed_forward_chunk", bent),
    name="feed_forward_chunk patched",
    weight=0.25,
)
operation(
    _on_class(CLASSES["attention"], "__call__", bent),
    name="attention.__call__ patched",
    weight=0.25,
)


def _prefixed_method(preprocess: Any) -> Any:
    def prefix(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return preprocess(self, [f"sea {text}" for text in inputs], *args, **kwargs)

    return functools.wraps(preprocess)(prefix)


for _place in ("Transformer", "SentenceTransformer"):
    operation(
        _on_class(CLASSES[_place], "preprocess", _prefixed_method),
        name=f"{_place}.preprocess patched",
        weight=0.25,
    )


@operation(weight=0.5)
def attention_function_registered(s: Subject) -> Undo:
    name = s.base.config._attn_implementation
    if name == "eager":
        raise NotNow
    old = ALL_ATTENTION_FUNCTIONS[name]

    def restore(*_: Any) -> None:
        ALL_ATTENTION_FUNCTIONS.register(name, old)

    s.globals.callback(restore)
    ALL_ATTENTION_FUNCTIONS.register(name, bent(old))
    return restore


@operation(weight=0.5)
def own_attention_function(s: Subject) -> Undo:
    old = s.base.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("bent", bent(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    s.base.set_attn_implementation("bent")
    return lambda s: s.base.set_attn_implementation(old)


@operation(changes=False, weight=0.5)
def eager_attention_patched(s: Subject) -> Undo:
    """The function of the model's module; the walk makes it count by switching to eager."""
    return _patched(s, _modeling(s), "eager_attention_forward", bent)


@operation(weight=0.5)
def eager_attention_patched_and_used(s: Subject) -> Undo:
    restore = _patched(s, _modeling(s), "eager_attention_forward", bent)
    s.base.set_attn_implementation("eager")
    return restore


@operation(weight=0.5)
def mask_function_patched(s: Subject) -> Undo:
    def without_mask(make: Any) -> Any:
        return lambda *args, **kwargs: None

    if "create_bidirectional_mask" not in vars(_modeling(s)):
        raise NotNow
    return _patched(s, _modeling(s), "create_bidirectional_mask", without_mask)


def _modeling(s: Subject) -> Any:
    return importlib.import_module(type(s.base).__module__)


_FUNCTIONAL = {
    "scaled_dot_product_attention": 0.25,
    "linear": 0.25,
    "layer_norm": 0.25,
    "embedding": 0.25,
    "gelu": 0.25,
}
for _name, _weight in _FUNCTIONAL.items():
    operation(
        lambda s, name=_name: _patched(s, torch.nn.functional, name, bent),
        name=f"torch.nn.functional.{_name} patched",
        weight=_weight,
        changes=_name != "gelu",
    )


@operation(changes=False, weight=0.3)
def activation_table_written(s: Subject) -> Undo:
    old = dict.__getitem__(ACT2FN, "gelu")

    def restore(*_: Any) -> None:
        dict.__setitem__(ACT2FN, "gelu", old)

    s.globals.callback(restore)
    dict.__setitem__(ACT2FN, "gelu", nn.ReLU)
    return restore


@operation(weight=0.5)
def class_of_a_layer_swapped(s: Subject) -> Undo:
    layer = s.layer()
    old = type(layer)
    if old.__name__ == "Bent":
        raise NotNow
    layer.__class__ = type("Bent", (old,), {"forward": bent(old.forward)})

    def undo(s: Subject) -> None:
        for module in s.layers:
            if type(module).__name__ == "Bent":
                module.__class__ = old

    return undo
