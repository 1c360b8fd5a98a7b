"""Whether a model is, attribute for attribute, what its class makes of its config.

An adapter reads weights and sizes; what else a forward reads of its modules it takes for granted.
Here that is checked against a twin: a model of one layer, without weights, made by the constructor.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Set
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sbert_fast.bypass import is_replaced
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.models.base import EncoderWeights, is_in_pooler
from sbert_fast.originals import is_genuine, is_theirs_by_name, names_in

# What adapters read themselves, what bypass.py looks at, and what changes nothing without training.
_FREE = frozenset(
    {
        "_gradient_checkpointing_func",
        "_is_full_backward_hook",
        "_modules",
        "_parameters",
        "attention_dropout",
        "config",
        "eps",
        "forward",
        "gradient_checkpointing",
        "layer_idx",
        "p",
        "padding_idx",
        "pooler",
        "pooler_activation",
        "training",
    }
)
_MISSING = object()
_twins: dict[type, tuple[dict[str, Any], dict[str, nn.Module]]] = {}


def fresh_modules(cls: Any, config: Any) -> dict[str, nn.Module]:
    """The modules of a model that `cls` makes of `config`, by name."""
    known = _twins.get(cls)
    if known is not None and known[0] == vars(config):
        return known[1]
    config = copy.deepcopy(config)
    values = copy.deepcopy(vars(config))
    # Layers of several types have a twin each.
    if getattr(config, "layer_types", None) is None:
        config.num_hidden_layers = 1
    try:
        with torch.device("meta"), torch.no_grad():
            twin = cls(config)
    except Exception as error:
        raise UnsupportedModelError(
            f"{cls.__name__} cannot be made of its config: {type(error).__name__}: {error}"
        ) from error
    modules = dict(twin.named_modules())
    _twins[cls] = values, modules
    return modules


def _check_constructors(model: nn.Module) -> None:
    """Refuse classes whose constructors were replaced: a twin would be what they make of it."""
    for cls in {base for module in model.modules() for base in type(module).__mro__}:
        init = vars(cls).get("__init__")
        if init is None or not is_theirs_by_name(cls.__module__):
            continue
        # torch.compile puts one of its own into nn.Module, for good.
        if not is_genuine(init, None if cls is nn.Module else cls):
            raise UnsupportedModelError(f"{cls.__qualname__}.__init__ was replaced")


def check_attributes(model: nn.Module, cls: type, names: Set[str], weights: EncoderWeights) -> None:
    """Refuse a model whose forward would read another value than in a model fresh from `cls`.

    Args:
        model: a base model.
        cls: its class in transformers.
        names: what the code of its modules mentions; other attributes are never read.
        weights: what its adapter has read.

    Raises:
        UnsupportedModelError: naming the module and the attribute.
    """
    _check_constructors(model)
    known = _twins.get(cls)
    twins = fresh_modules(cls, model.config)
    try:
        _compare(model, cls, names, twins)
    except UnsupportedModelError:
        # What a constructor reads may have been replaced when the twin was made.
        _twins.pop(cls)
        if known is None or known[1] is not twins:
            raise
        _compare(model, cls, names, fresh_modules(cls, model.config))
    _check_buffers(model, weights)


def _compare(model: nn.Module, cls: type, names: Set[str], twins: dict[str, nn.Module]) -> None:
    config: Any = model.config
    for name, module in model.named_modules():
        if is_in_pooler(name):
            continue
        twin = twins.get(name) or twins.get(re.sub(r"\.\d+", ".0", name))
        if twin is None or (type(module) is not type(twin) and name):
            raise UnsupportedModelError(
                f"module {name!r} is a {type(module).__qualname__}, which a fresh "
                f"{cls.__name__} does not have there"
            )
        mine, fresh = vars(module), vars(twin)
        for key in (mine.keys() | fresh.keys()) & names - _FREE:
            values = mine.get(key, _MISSING), fresh.get(key, _MISSING)
            if "_hooks" not in key and not _same(*values, module, key):
                raise UnsupportedModelError(
                    f"{f'{name}.{key}'.lstrip('.')} is not what {type(module).__qualname__} makes "
                    "of the config"
                )
        other = mine.get("config", config)
        for key in vars(config).keys() & names if other is not config else ():
            if getattr(other, key, _MISSING) != getattr(config, key):
                raise UnsupportedModelError(f"{name}.config.{key} is not that of the model")


def _same(mine: Any, fresh: Any, module: nn.Module, key: str) -> bool:
    if fresh is _MISSING:
        # A method that was put back lies on the instance, and changes nothing.
        return callable(getattr(type(module), key, None)) and not is_replaced(module, key)
    if type(mine) is not type(fresh):
        return False
    if isinstance(mine, MethodType):
        is_own = is_genuine(mine.__func__, type(module))
        return mine.__func__ is fresh.__func__ and mine.__self__ is module and is_own
    if isinstance(mine, partial):
        made = (mine.func, mine.args, mine.keywords) == (fresh.func, fresh.args, fresh.keywords)
        return made and _is_own(mine, module)
    if callable(mine) and not isinstance(mine, (type, nn.Module)):
        return mine is fresh and _is_own(mine, module)
    if isinstance(mine, dict) and key == "_buffers":
        return mine.keys() == fresh.keys()
    if isinstance(mine, (Tensor, nn.Module)):
        return isinstance(mine, nn.Module)
    return bool(mine is fresh or mine == fresh)


def _is_own(function: Any, module: nn.Module) -> bool:
    """Whether a function that a constructor put into `module` is one that the constructor names:
    where a name was patched, a twin holds the same function as the model."""
    makers = (vars(base).get("__init__") for base in type(module).__mro__)
    codes = (maker.__code__ for maker in makers if isinstance(maker, FunctionType))
    names = frozenset().union(*map(names_in, codes))
    if isinstance(function, partial):
        return partial.__name__ in names and _is_own(function.func, module)
    if not isinstance(function, BuiltinFunctionType) and not is_genuine(function):
        return False
    # Those of transformers may come from a table.
    package = str(function.__module__).partition(".")[0]
    return package == "transformers" or (package == "torch" and function.__name__ in names)


def _check_buffers(model: nn.Module, weights: EncoderWeights) -> None:
    """Refuse tables of positions and token types that are not those of a fresh model, and any
    other buffer that an adapter has not read."""
    known = {id(tensor) for tensor in weights.tensors()}
    for name, buffer in model.named_buffers():
        kind = name.rpartition(".")[2]
        # Of rotary positions that depend on the length of the text, which adapters refuse.
        if id(buffer) in known or kind.endswith("original_inv_freq"):
            continue
        expected = torch.zeros_like(buffer)
        if kind == "position_ids":
            expected = torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer)
        elif kind != "token_type_ids":
            raise UnsupportedModelError(f"unknown buffer {name!r}")
        if not torch.equal(buffer, expected):
            raise UnsupportedModelError(f"the buffer {name} was changed")
