"""What surrounds a call: contexts, threads, processes, settings of torch."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hook_operations import scaled
from model_operations import operation
from walks import Subject, Undo

CHILD_SECONDS = 60
OTHER_PARAMETERS = "other parameters"

# Contexts around the calls


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return scaled(result) if func is torch.nn.functional.layer_norm else result


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return scaled(result) if "layer_norm" in str(func) else result


def _context(name: str, make: Callable[[], Any], **how: Any) -> None:
    def act(s: Subject) -> Undo:
        s.contexts[name] = make
        return lambda s: s.contexts.pop(name, None)

    operation(act, name=f"under {name}", weight=0.3, **how)


_context("autocast", lambda: torch.autocast("cpu", dtype=torch.bfloat16))
_context("inference mode", torch.inference_mode, changes=False)
_context("no_grad", torch.no_grad, changes=False)
_context("another attention kernel", lambda: sdpa_kernel(SDPBackend.MATH), changes=False)
_context("counted FLOPs", lambda: FlopCounterMode(display=False), changes=False)
_context("a function mode", _Functions)
_context("a dispatch mode", _Dispatches)


@operation(weight=0.3)
def other_parameters_for_a_while(s: Subject) -> Undo:
    """As torch.func.functional_call does it."""
    base = s.base
    others = {name: p.detach() * 1.3 for name, p in base.named_parameters() if p.dim() == 2}

    def reparametrized() -> Any:
        # torch does not put back what has two names, or is computed, by then.
        named = {name: others[name] for name, _ in base.named_parameters() if name in others}
        return _reparametrize_module(base, named)

    s.contexts[OTHER_PARAMETERS] = reparametrized
    return lambda s: s.contexts.pop(OTHER_PARAMETERS, None)


# Threads and processes


@operation(changes=False, weight=0.5)
def two_threads(s: Subject) -> None:
    def how(call: Callable[[], Any]) -> list[Any]:
        results: list[Any] = []
        # Random numbers repeat, and parameters are put back, only where calls take turns.
        drops = any(isinstance(m, nn.Dropout) and m.training for m in s.model.modules())
        in_turn = drops or OTHER_PARAMETERS in s.contexts
        turn = threading.Lock() if in_turn else contextlib.nullcontext()

        def run() -> None:
            with turn:
                results.append(call())

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    s.how = how


@operation(changes=False, weight=0.05)
def forked(s: Subject) -> None:
    def how(call: Callable[[], Any]) -> list[Any]:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(CHILD_SECONDS)
            with contextlib.suppress(BaseException), os.fdopen(write, "wb") as stream:
                stream.write(pickle.dumps(call()))
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            data = stream.read()
        os.waitpid(child, 0)
        return [pickle.loads(data) if data else TimeoutError("the child gave nothing back")]

    s.how = how


# Settings of torch


def _of_torch(
    name: str,
    get: Callable[[], Any],
    put: Callable[[Any], None],
    value: Any,
    changes: bool = False,
) -> None:
    def act(s: Subject) -> Undo:
        old = get()

        def restore(*_: Any) -> None:
            put(old)

        s.globals.callback(restore)
        put(value)
        return restore

    operation(act, name=name, changes=changes, weight=0.3)


_of_torch("default dtype double", torch.get_default_dtype, torch.set_default_dtype, torch.float64)
_of_torch(
    "deterministic algorithms",
    torch.are_deterministic_algorithms_enabled,
    torch.use_deterministic_algorithms,
    True,
)
_of_torch(
    "matmul precision",
    torch.get_float32_matmul_precision,
    torch.set_float32_matmul_precision,
    "medium",
    # There torch then multiplies in bfloat16.
    changes=torch.cpu._is_amx_tile_supported(),
)
_of_torch(
    "oneDNN switched off",
    lambda: torch.backends.mkldnn.enabled,
    lambda on: torch.backends.mkldnn.set_flags(on),
    False,
)
_of_torch("gradients off", torch.is_grad_enabled, torch.set_grad_enabled, False)
