"""explain: what runs, where, and why."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from sbert_fast import ops, packing
from sbert_fast.assembly import Unsupported
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import ImplementationError, SbertFastError, UnsupportedModelError
from sbert_fast.ops import choices, limits
from sbert_fast.ops.dispatch import preference
from sbert_fast.packed_forward import PACKED, PackedForward
from sbert_fast.patching import candidates, forward_of, refusal
from sbert_fast.routes import routes
from sbert_fast.sentence_transformers.packed_model import PackedModel


def explain(model: nn.Module | None = None) -> str:
    """Tell which implementation runs and why, how often it ran, and what ran elsewhere.

    Args:
        model: a model of transformers or sentence-transformers, accelerated or not, or any module
            that holds some; a FastEncoder or a FastCrossEncoder. None explains the installation.

    Returns:
        Several lines for people to read. A model that is not supported is explained, not refused.

    Raises:
        TypeError: `model` is neither None nor a torch.nn.Module.
    """
    if model is None:
        return "\n".join(_installation())
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}")
    lines = [type(model).__name__]
    if isinstance(model, PackedModel):
        lines += [f"  {line}" for line in _packed_model(model)]
    found = candidates(model)
    for name, module in found.items():
        if isinstance(model, PackedModel) and forward_of(module) is None:
            continue
        title = type(module).__name__
        lines.append(f"  {name}: {title}" if name else f"  {title}")
        lines += [f"    {line}" for line in _base_model(module)]
    if not found and not isinstance(model, PackedModel):
        lines.append("  not supported: it contains no transformers model")
    return "\n".join(lines)


def _installation() -> list[str]:
    cpu = ops.extension.CPU
    native = packing.HAS_NATIVE_PLANNER
    planner = "native" if native else "numpy (sbert_fast/_host was not built)"
    return [
        "device dtype     implementation",
        *ops.explain_ops().splitlines(),
        f"C++ ops: {cpu.path if cpu.available else cpu.reason}",
        f"CUDA ops: {_cuda_ops()}",
        f"batch planner: {planner}",
    ]


def _cuda_ops() -> str:
    library, reason = ops.extension.CUDA, ops.extension.cuda_refusal(torch.device("cuda"))
    if not library.available:
        return str(reason)
    targets = f" (CUDA {library.cuda}, for {', '.join(library.targets)})" if library.targets else ""
    loaded = f"{library.path}{targets}"
    return loaded if reason is None else f"{loaded}, not usable on this machine: {reason}"


def _packed_model(model: Any) -> list[str]:  # noqa: ANN401
    stats = model.stats
    lines = [f"{model.method}{_of_route(model, route)}" for route in routes(model)]
    lines.append(
        f"so far: {stats.texts} texts, {stats.tokens} tokens, {stats.batches} batches, "
        f"{stats.truncated} texts truncated"
    )
    return lines + _tally("calls in sentence-transformers", stats.fallbacks)


def _of_route(model: Any, route: str | None) -> str:  # noqa: ANN401
    """How texts on a route run; the name of the route comes first."""
    name = "" if route is None else f", route {route!r}"
    try:
        found = model._session.pipeline(model, route)
    except (SbertFastError, ValueError) as error:
        return f"{name}: refused: {error}"
    if isinstance(found, Unsupported):
        return f"{name}: sentence-transformers: {found.reason}"
    if (reason := found.engine.admitted.bypassed) is not None:
        return f"{name}: sentence-transformers now: {reason}"
    return f"{name}: packed, {_engine(found.engine)}"


def _base_model(module: nn.Module) -> list[str]:
    """What there is to say about one base model."""
    forward, reason = forward_of(module), refusal(module)
    lines = [] if reason is None else [f"not supported: {reason}"]
    if forward is None:
        return lines or ["supported, not accelerated: sbert_fast.accelerate(model) does that"]
    engine, refused = "", None
    try:
        engine = f": {_engine(forward.engine)}"
        refused = forward.refusal()
    except UnsupportedModelError as error:
        engine, refused = "", str(error)
    except ImplementationError:
        pass  # the line about the engine tells it
    lines.append(f"accelerated ({forward.engine.architecture.family}){engine}")
    if refused is not None:
        which = " that records no gradients" if _runs_recorded(forward) else ""
        lines.append(f"every call{which} runs the original forward now: {refused}")
    counts = forward.counts
    lines.append(f"packed calls: {counts.pop(PACKED, 0)}")
    return lines + _tally("calls of the original forward", counts)


def _runs_recorded(forward: PackedForward) -> bool:
    """Whether calls that record gradients may run packed."""
    try:
        with torch.enable_grad():
            return forward.refusal(recorded=True) is None
    except (SbertFastError, ValueError):
        return False


def _engine(engine: PackedEncoder) -> str:
    dtype = str(engine.compute_dtype).removeprefix("torch.")
    try:
        name = engine.implementation
    except (SbertFastError, ValueError) as error:
        return f"{dtype} on {engine.device}, ops: none ({error})"
    if engine.impl != "auto":
        why = f"asked for by impl={engine.impl!r}"
    elif os.environ.get("SBERT_FAST_IMPL", "auto") != "auto":
        why = "asked for by SBERT_FAST_IMPL"
    else:
        passed = [
            f"{other}: {reason}"
            for other in preference(engine.device)
            if (reason := ops.refusal(other, engine.device, engine.compute_dtype)) is not None
        ]
        why = "; ".join(["picked by auto", *passed, *_cuda_kernels(engine)])
    linears = "; ".join(map(str, engine.linears()))
    lines = [*_ops_elsewhere(engine, name), *([f"linear: {linears}"] if linears else [])]
    rest = "".join(f"; {line}" for line in lines)
    return f"{dtype} on {engine.device}, ops: {name} ({why}){rest}"


def _ops_elsewhere(engine: PackedEncoder, implementation: str) -> list[str]:
    """The ops that `implementation` lacks for this model: what runs them, and why."""
    lines = []
    for op, how in engine.required_ops():
        needs = (*how.get("needs", ()), *(n for n, v in how.get("options", {}).items() if v))
        place = engine.device, engine.compute_dtype, how.get("head_dim")
        if (reason := ops.refusal(implementation, *place, op, needs)) is not None:
            lines.append(f"{op}: {engine.bind(op).implementation} ({reason})")
    return list(dict.fromkeys(lines))


def _cuda_kernels(engine: PackedEncoder) -> list[str]:
    """The ops that `auto` would run on their CUDA kernels; where it does not, why."""
    device, dtype = engine.device, engine.compute_dtype
    if device.type != "cuda":
        return []
    if (reason := ops.refusal("cuda", device, dtype)) is not None:
        return [f"cuda: {reason}"]
    lines = []
    for op, how in engine.required_ops():
        sizes = {name: how[name] for name in ("head_dim", "width") if name in how}
        if choices.prefers_cuda(op, device, dtype, sizes.get("head_dim")):
            reason = limits.refusal_of_size(op, **sizes)
            taken = "cuda, by sbert_fast/ops/choices.py"
            lines.append(f"{op}: {taken if reason is None else f'not cuda: {reason}'}")
    lines = list(dict.fromkeys(lines))
    return lines or ["cuda: sbert_fast/ops/choices.py lists no op for this GPU, dtype and head dim"]


def _tally(title: str, reasons: dict[str, int]) -> list[str]:
    lines = [f"{title}: {sum(reasons.values())}"]
    for reason, times in sorted(reasons.items(), key=lambda item: -item[1]):
        lines.append(f"  {times} x {reason}")
    return lines
