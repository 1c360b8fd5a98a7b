"""Adapted linear layers: what stands in the place of one, and makes each row of one row alone.

A pass that records gradients calls them as they are. What a hook of a caller computes is not known
to keep to rows; such a model is left as it is, and refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sbert_fast import bypass

# Layers of peft that change each row alone; those of their models that do not come with hooks.
_ADAPTERS = tuple(f"peft.tuners.{kind}." for kind in ("ia3", "loha", "lokr", "lora"))
_PARTS = (nn.Dropout, nn.Identity, nn.Linear, nn.ModuleDict, nn.ParameterDict)
# Hooks that make a weight of other parameters: weight_norm, spectral_norm, prune.
_WEIGHT_HOOKS = "torch.nn.utils."


def skeleton(model: nn.Module) -> nn.Module:
    """`model` as its class makes it: a plain linear layer, which calls what is there, in the place
    of each adapted one.

    Returns:
        A copy that shares all other modules and tensors; `model` itself where nothing is adapted.
        Weights and biases of adapted layers have a shape there, and no values.
    """
    known: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in known:
            known[id(module)] = _plain(module, model) or _with(module, copied)
        return known[id(module)]

    return copied(model)


def _with(module: nn.Module, copied: Any) -> nn.Module:  # noqa: ANN401
    """`module` with copies of its children, where these are not the children themselves."""
    children = {name: part and copied(part) for name, part in module._modules.items()}
    if all(part is module._modules[name] for name, part in children.items()):
        return module
    clone: nn.Module = object.__new__(type(module))
    vars(clone).update(vars(module), _modules=children)
    return clone


class _Call:
    """The forward of a plain layer that calls another module."""

    # See `bypass.is_replaced`.
    stands_for_original = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


def _plain(module: nn.Module, model: nn.Module) -> nn.Module | None:
    """A linear layer that calls `module`, where that is an adapted one."""
    linear = _linear_in(module)
    if linear is None or (linear is module and not _makes_weight(linear)):
        return None
    like = next(model.parameters())
    layer: Any = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = linear.in_features, linear.out_features
    layer.training = False
    shapes: dict[str, tuple[int, ...]] = {"weight": (linear.out_features, linear.in_features)}
    has_bias = is_parametrized(linear, "bias") or hasattr(linear, "bias_orig")
    if has_bias or linear._parameters.get("bias") is not None:
        shapes["bias"] = (linear.out_features,)
    layer.bias = None
    for name, shape in shapes.items():
        values = torch.empty((), dtype=like.dtype, device=like.device).expand(shape)
        setattr(layer, name, nn.Parameter(values, requires_grad=False))
    layer.forward = _Call(module)
    return layer


def _linear_in(module: nn.Module) -> nn.Linear | None:
    """The linear layer in `module`, where that is one, adapted or not; else None."""
    kind = type(module)
    if kind is nn.Linear or (is_parametrized(module) and kind.__bases__ == (nn.Linear,)):
        assert isinstance(module, nn.Linear)
        pre = module._forward_pre_hooks.values()
        own = all(type(hook).__module__.startswith(_WEIGHT_HOOKS) for hook in pre)
        called = module._forward_hooks or bypass.is_replaced(module, "forward")
        return module if own and not called and module._compiled_call_impl is None else None
    if kind.__name__ != "Linear" or not kind.__module__.startswith(_ADAPTERS):
        return None
    linear = _linear_in(module.get_submodule("base_layer"))
    parts = [] if linear is None else _without(module.modules(), linear)
    known = all(type(m) in _PARTS or type(m).__module__.startswith(_ADAPTERS) for m in parts)
    return linear if known and bypass.reason(parts) is None else None


def _without(modules: Iterable[nn.Module], linear: nn.Module) -> list[nn.Module]:
    inside = set(map(id, linear.modules()))
    return [module for module in modules if id(module) not in inside]


def _makes_weight(linear: nn.Linear) -> bool:
    """Whether a weight or bias is computed anew at every call."""
    return bool(linear._forward_pre_hooks) or is_parametrized(linear)
