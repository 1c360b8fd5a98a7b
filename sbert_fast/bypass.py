"""What a packed pass would bypass: transforms, modes and hooks that act on a model's modules."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

# transformers leaves these hooks behind; they do nothing unless gradients are recorded.
_IDLE_HOOKS = "transformers.utils.output_capturing"
_GRADIENT_HOOK = "make_inputs_require_grads"
# The code of whatever torch.autocast decorates.
_AUTOCAST = torch.autocast("cpu")(lambda: None).__code__


def is_transformed() -> bool:
    """Whether the caller wants to see the model's own operations: tracing, compiling, a functorch
    transform, forward-mode differentiation, or a mode of torch such as fake tensors."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or (
            torch._C._len_torch_function_stack() > 0
            and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
        )
    )


def global_reason() -> str | None:
    """Why no model at all runs packed now; None if one may."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "forward hooks are registered on all modules"
    return None


def gradient_reason(modules: Iterable[nn.Module]) -> str | None:
    """Why a packed pass, which calls none of `modules`, cannot record gradients; None if it can."""
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return "backward hooks are registered on all modules"
    for module in modules:
        if module._backward_hooks or module._backward_pre_hooks:
            return f"{type(module).__name__} has backward hooks"
    return None


def is_computed_again() -> bool:
    """Whether a backward pass runs a model for the second time, after a run that recorded nothing:
    a reentrant checkpoint, or gradients that are cached. The other checkpoints have hooks."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch._C._current_graph_task_id() != -1 and hooks is None


def records_gradients(module: nn.Module) -> bool:
    """Whether a hook of gradient checkpointing makes the output of `module` record gradients."""
    return any(_GRADIENT_HOOK in _name(hook) for hook in module._forward_hooks.values())


def _name(hook: Callable[..., Any]) -> str:
    return str(getattr(hook, "__qualname__", ""))


def _is_idle(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__module__", "") == _IDLE_HOOKS or (
        _GRADIENT_HOOK in _name(hook) and hook.__module__.startswith("transformers.")
    )


def collects_states(module: nn.Module) -> int:
    """How many hooks of transformers collect what `module` returns among the hidden states."""
    return sum(
        getattr(hook, "__module__", "") == _IDLE_HOOKS
        and inspect.getclosurevars(hook).nonlocals.get("key") == "hidden_states"
        for hook in module._forward_hooks.values()
    )


def reason(modules: Iterable[nn.Module], *, in_any_dtype: bool = False) -> str | None:
    """Why a packed pass, which calls none of `modules`, cannot replace them; None if it can.

    Args:
        modules: of a model.
        in_any_dtype: see :func:`is_replaced`.
    """
    for module in modules:
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not all(map(_is_idle, hooks)):
            return f"{type(module).__name__} has forward hooks"
        if is_replaced(module, "forward", in_any_dtype=in_any_dtype):
            return f"forward of {type(module).__name__} was replaced on an instance"
        if module._compiled_call_impl is not None:
            return f"{type(module).__name__} was compiled"
    return None


def drops(modules: Sequence[nn.Module], names: Set[str]) -> bool:
    """Whether any of `modules` is in training mode and any of them drops values.

    Args:
        modules: of a model.
        names: what the code of the modules mentions; other attributes are never read.
    """
    # Slicing a ModuleList makes a new one in training mode; it does nothing with that flag.
    return any(m.training for m in modules if type(m) is not nn.ModuleList) and any(
        rate != 0 for module in modules for rate in _dropout_rates(module, names)
    )


def _dropout_rates(module: nn.Module, names: Set[str]) -> Iterator[float]:
    """The rate of a dropout module, and those that `module` or its config has under a name of its
    own and hands to a function."""
    if isinstance(module, _DropoutNd):
        yield module.p
    for holder in (module, getattr(module, "config", None)):
        for name, value in getattr(holder, "__dict__", {}).items():
            if "drop" in name and name in names and isinstance(value, (int, float)):
                yield value


def is_replaced(instance: object, name: str, *, in_any_dtype: bool = False) -> bool:
    """Whether an instance has a method `name` other than the one of its class.

    Args:
        instance: any object.
        name: of the method.
        in_any_dtype: the method of the class is itself under an autocast that it brings along, as a
            trainer in mixed precision leaves it behind: the caller computes in a dtype of its own.
    """
    method = vars(instance).get(name)
    if method is None or getattr(type(method), "stands_for_original", False):
        return False
    if not (isinstance(method, MethodType) and method.__self__ is instance):
        return True
    function = _without_autocast(method.__func__) if in_any_dtype else method.__func__
    return function is not getattr(type(instance), name, None)


def _without_autocast(function: Any) -> Any:  # noqa: ANN401
    """What is inside of autocast, and of accelerate's conversion of its results to float32."""
    # accelerate is optional; where it has wrapped something, it is there.
    casts = getattr(sys.modules.get("accelerate.utils.operations"), "convert_outputs_to_fp32", None)
    converted = () if casts is None else casts.__code__.co_consts
    while (code := getattr(function, "__code__", None)) is not None:
        held = inspect.getclosurevars(function).nonlocals
        if code is _AUTOCAST and isinstance(held["autocast_instance"], torch.autocast):
            function = held["func"]
        elif any(code is each for each in converted):
            function = held["model_forward"].model_forward
        else:
            break
    return function


def holds_plain_tensors(model: nn.Module) -> bool:
    """Whether other tensors stand in for parameters, as under torch.func.functional_call."""
    return any(
        type(tensor) is Tensor
        for module in model.modules()
        for tensor in module._parameters.values()
    )
