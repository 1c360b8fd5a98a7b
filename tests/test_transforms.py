"""Under transforms and modes of torch an accelerated model is the model it was, uncounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from families import make_batch, make_sentence_transformer
from patched import pair
from sbert_fast.patching import counts
from surfaces import SURFACES

IDS = make_batch("bert", [6, 6, 6])["input_ids"]
NAME = "encoder.layer.1.output.dense.bias"
Transform = Callable[[Any], Any]


def states(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).last_hidden_state


def _of_bias(model: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The states of a text as a function of one bias, and that bias."""

    def call(bias: Tensor) -> Tensor:
        return functional_call(model, {NAME: bias}, (IDS[:1, :3],)).last_hidden_state

    return call, model.get_parameter(NAME).detach().clone()


def _jvp(model: Any) -> Any:
    call, bias = _of_bias(model)
    return jvp(call, (bias,), (torch.ones_like(bias),))


def _linearize(model: Any) -> Any:
    call, bias = _of_bias(model)
    out, push = linearize(call, bias)
    return out, push(torch.ones_like(bias))


def _vjp(model: Any) -> Any:
    call, bias = _of_bias(model)
    out, pull = vjp(call, bias)
    return out, pull(torch.ones_like(out))


def _derivative(of: Callable[..., Any]) -> Transform:
    def transform(model: Any) -> Any:
        call, bias = _of_bias(model)
        return of(lambda b: call(b).square().sum())(bias)

    return transform


def _dual(model: Any) -> Any:
    call, bias = _of_bias(model)
    with fwad.dual_level():
        return fwad.unpack_dual(call(fwad.make_dual(bias, torch.ones_like(bias))))[:2]


def _dual_attribute(model: Any) -> Any:
    """As in torch's tutorial on forward-mode AD: duals in the place of parameters."""
    linear = model.encoder.layer[1].output.dense
    bias = linear.bias
    with fwad.dual_level():
        del linear.bias
        linear.bias = fwad.make_dual(bias.detach(), torch.ones_like(bias))
        result = fwad.unpack_dual(states(model))[:2]
    del linear.bias
    linear.bias = bias
    return result


def _vmap_over_models(model: Any) -> Any:
    """An ensemble, as `stack_module_state` has it."""
    stacked = torch.stack([model.get_parameter(NAME).detach() * k for k in (1, 2, 3)])
    return vmap(lambda b: functional_call(model, {NAME: b}, (IDS,)).last_hidden_state)(stacked)


def _fake(model: Any) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = states(model, mode.from_tensor(IDS))
    return type(out).__name__, tuple(out.shape), out.dtype


def _fake_of_real_ids(model: Any) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = states(model)
    return type(out).__name__, tuple(out.shape), out.dtype


def _traced(mode: str) -> Transform:
    def transform(model: Any) -> Any:
        trace = make_fx(
            lambda ids: states(model, ids), tracing_mode=mode, _allow_non_fake_inputs=True
        )
        graph = trace(IDS)
        return Counter(str(node.target) for node in graph.graph.nodes if node.op != "get_attr")

    return transform


def _functional(model: Any) -> Any:
    changed = {NAME: model.get_parameter(NAME).detach() * 3}
    return functional_call(model, changed, (IDS,)).last_hidden_state


class _Seen(TorchDispatchMode):
    """Counts what reaches the dispatcher, as memory trackers and loggers do."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **kwargs or {})


class _Shifted(TorchFunctionMode):
    """Changes what a function of torch returns, as emulators of other numbers do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        return out + 1 if func is nn.functional.layer_norm else out


def _dispatched(model: Any) -> Any:
    with _Seen() as seen:
        states(model)
    return seen.found


def _flops(model: Any) -> Any:
    with FlopCounterMode(display=False) as counter:
        states(model)
    assert counter.get_total_flops() > 0
    return counter.get_flop_counts()["Global"]


@contextmanager
def _global_hook() -> Iterator[None]:
    """Doubles what every LayerNorm returns."""

    def double(module: nn.Module, args: Any, out: Any) -> Any:
        return out * 2 if isinstance(module, nn.LayerNorm) else None

    handle = register_module_forward_hook(double)
    try:
        yield
    finally:
        handle.remove()


def _within(mode: Callable[[], AbstractContextManager[Any]]) -> Transform:
    def transform(model: Any) -> Any:
        with mode():
            return states(model)

    return transform


TRANSFORMS: dict[str, Transform] = {
    "vmap": lambda model: vmap(lambda ids: states(model, ids[None])[0])(IDS),
    "vmap in chunks": lambda m: vmap(lambda ids: states(m, ids[None])[0], chunk_size=2)(IDS),
    "vmap over models": _vmap_over_models,
    "jvp": _jvp,
    "linearize": _linearize,
    "vjp": _vjp,
    "grad": _derivative(grad),
    "jacrev": _derivative(jacrev),
    "jacfwd": _derivative(jacfwd),
    "hessian": _derivative(hessian),
    "dual": _dual,
    "dual attribute": _dual_attribute,
    "fake": _fake,
    "fake of real ids": _fake_of_real_ids,
    "make_fx real": _traced("real"),
    "make_fx symbolic": _traced("symbolic"),
    "functionalize": lambda model: torch.func.functionalize(lambda i: states(model, i))(IDS),
    "functional_call": _functional,
    "dispatch mode": _dispatched,
    "function mode": _within(_Shifted),
    "FLOPs": _flops,
    "global hook": _within(_global_hook),
}


# These are not transforms: they run in the original too, and may be counted.
COUNTED = ("functional_call", "global hook")


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal(mine, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_accelerated_model_under(transform: str) -> None:
    original, model = pair("bert", num_hidden_layers=2)
    for each in (original, model):
        each.requires_grad_(False)
    states(model)
    expected = TRANSFORMS[transform](original)
    assert_equal(TRANSFORMS[transform](model), expected)
    assert counts(model)["packed"] == 1
    assert len(counts(model)) == 1 or transform in COUNTED


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": _Seen,
    "function mode": _Shifted,
    "FLOPs": lambda: FlopCounterMode(display=False),
    "global hook": _global_hook,
}


@pytest.mark.parametrize("mode", MODES)
def test_encode_under(mode: str) -> None:
    model = SURFACES["encode"](make_sentence_transformer())
    model.check()
    before = model.packed()
    with MODES[mode]() as ours:
        vectors = model.ours()
    with MODES[mode]() as theirs:
        assert (vectors == model.stock()).all()
    if isinstance(ours, _Seen):
        # What checks the result may come on top.
        assert ours.found >= theirs.found
    if isinstance(ours, FlopCounterMode):
        assert ours.get_flop_counts()["Global"] == theirs.get_flop_counts()["Global"]
    assert model.packed() == before
    assert model.fallbacks() == {} or mode in COUNTED


def test_modes_that_change_no_operation_run_packed() -> None:
    """A default device is a mode that stays on, and must not cost the packed path."""
    model = SURFACES["encode"](make_sentence_transformer())
    with torch.device("cpu"), torch.profiler.profile():
        model.check()
    assert model.packed() > 0
    assert model.fallbacks() == {}
