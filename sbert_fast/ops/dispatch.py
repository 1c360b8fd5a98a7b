"""Which implementation of an op runs, why, and how often it ran."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import sbert_fast.kernels as kernels
from sbert_fast.errors import ImplementationError
from sbert_fast.ops import choices, extension, limits, schemas
from sbert_fast.stats import Tally

logger = logging.getLogger("sbert_fast")

_launches: dict[tuple[str, str], Tally] = {}
_REFERENCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float16, torch.bfloat16)
_PREFERENCES = {"cpu": ("cpu", "reference"), "cuda": ("triton", "torch", "reference")}

_NAMES = {"cpu": "the C++ ops", "triton": "the Triton kernels", "cuda": "the CUDA ops"}

# Implementations that have the last layer's LayerNorm and pooling in one kernel.
FUSING = ("triton", "cuda")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of one op, callable with the arguments of its schema."""

    op: str
    implementation: str
    overload: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        if not torch.compiler.is_compiling():
            key = self.op, self.implementation
            (_launches.get(key) or _launches.setdefault(key, Tally())).add()
        return self.overload(*args, **self.options, **options)


def refusal(
    implementation: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None = None,
    op: str | None = None,
    needs: Iterable[str] = (),
) -> str | None:
    """Why `implementation` cannot run on `device` in `dtype`; None where it can.

    `head_dim` is D of the attention that it is to run, `op` the op, `needs` what the op is to have
    of what :data:`sbert_fast.ops.schemas.LACKED` names; each where it is known.
    """
    reason = _refusal_of_place(implementation, device, dtype, head_dim)
    if reason is None and op is not None:
        reason = _refusal_of_op(implementation, op, needs)
    if reason is None and implementation == "cuda" and (head_dim or 0) > limits.MAX_HEAD_DIM:
        reason = f"the CUDA ops take head dims up to {limits.MAX_HEAD_DIM}, not {head_dim}"
    return reason


def _refusal_of_op(implementation: str, op: str, needs: Iterable[str]) -> str | None:
    name = _NAMES.get(implementation, f"impl={implementation!r}")
    if implementation not in schemas.implementations(op):
        return f"{name} have no {op} yet"
    lacked = schemas.LACKED.get(implementation, {}).get(op, ())
    for need in needs:
        if need in lacked:
            return f"{name} have no {op} {need if ' ' in need else f'with {need}'} yet"
    return None


def _refusal_of_place(
    implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> str | None:
    if implementation == "cpu":
        if not extension.CPU.available:
            return extension.CPU.reason
        if device.type != "cpu":
            return f"the C++ ops run on cpu, not on {device.type}"
        if dtype not in _CPU_DTYPES:
            return f"the C++ ops take float32 and bfloat16, not {dtype}"
        return None
    if implementation == "triton":
        return _refusal_of_triton(device, dtype)
    if implementation == "cuda":
        return _refusal_of_cuda(device, dtype, head_dim)
    if implementation == "torch" and device.type != "cuda":
        return f"torch's packed attention runs on cuda, not on {device.type}"
    if dtype not in _REFERENCE_DTYPES:
        return f"no op takes {dtype}"
    return None


def _refusal_of_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = kernels.refusal(device)
    if reason is not None:
        return reason
    ours = [op for op in schemas.SCHEMAS if "triton" in schemas.implementations(op)]
    missing = [op for op in ours if op not in kernels.LAUNCHERS]
    if missing:
        return f"there is no Triton kernel for {', '.join(missing)}"
    if dtype not in kernels.DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    return None


def _refusal_of_cuda(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    reason = extension.cuda_refusal(device)
    if reason is not None:
        return reason
    if dtype not in _CUDA_DTYPES:
        return f"the CUDA ops take float16 and bfloat16, not {dtype}"
    if head_dim is not None and head_dim % limits.STEP:
        return f"the CUDA ops need a head_dim that is a multiple of {limits.STEP}, got {head_dim}"
    return None


def preference(device: torch.device) -> tuple[str, ...]:
    """Implementations that `auto` tries on `device`, best first.

    On CUDA `cuda` comes before them for the ops that :mod:`sbert_fast.ops.choices` lists, where
    :mod:`sbert_fast.ops.limits` lets it.
    """
    return _PREFERENCES.get(device.type, ("reference",))


def requested(impl: str) -> str:
    """The implementation asked for: `SBERT_FAST_IMPL` takes the place of "auto"."""
    return os.environ.get("SBERT_FAST_IMPL", "auto") if impl == "auto" else impl


def resolve(
    device: torch.device,
    dtype: torch.dtype,
    impl: str = "auto",
    *,
    op: str | None = None,
    head_dim: int | None = None,
    width: int | None = None,
    args: Sequence[Any] | None = None,
    needs: Sequence[str] = (),
) -> str:
    """The implementation that will run.

    Args:
        device: where the tensors are.
        dtype: dtype of the activations.
        impl: "auto", or the name of an implementation, which is then used or refused, never
            replaced. `SBERT_FAST_IMPL` takes the place of "auto".
        op: the op to run; None is any that :mod:`sbert_fast.ops.choices` does not list.
        head_dim: D of the attention to run, where that is known.
        width: columns of the rows that any other op is to run on, where they are known.
        args: arguments of the op's schema, checked. None is a caller whose tensors all begin at
            multiples of 16 bytes, rows of x included.
        needs: what it must have of what :data:`sbert_fast.ops.schemas.LACKED` names.

    Raises:
        ValueError: `impl` names no implementation.
        ImplementationError: the named implementation cannot run here.
    """
    asked = "SBERT_FAST_IMPL" if impl == "auto" else "impl"
    impl = requested(impl)
    if impl == "auto":
        names = preference(device)
        if op is not None and _picks_cuda(op, device, dtype, head_dim, width, args):
            names = ("cuda", *names)
        for name in names:
            if refusal(name, device, dtype, head_dim, op, needs) is None:
                return name
        raise ImplementationError(f"no implementation runs on {device} in {dtype}")
    if impl not in schemas.IMPLEMENTATIONS:
        expected = ", ".join(("auto", *schemas.IMPLEMENTATIONS))
        raise ValueError(f"{asked} must be one of {expected}, got {impl!r}")
    reason = refusal(impl, device, dtype, head_dim, op, needs)
    if reason is not None:
        raise ImplementationError(f"{asked}={impl!r} was asked for, but {reason}")
    return impl


def _picks_cuda(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    width: int | None,
    args: Sequence[Any] | None,
) -> bool:
    """Whether `auto` tries the CUDA kernel of `op` first: it is listed, and takes the call."""
    # Before a graph can come to depend on sizes.
    if args is not None and torch.compiler.is_compiling():
        return False
    return (
        choices.prefers_cuda(op, device, dtype, head_dim)
        and (args is None or limits.takes(op, args))
        and limits.refusal_of_size(op, head_dim, width) is None
    )


def bind(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    impl: str = "auto",
    *,
    head_dim: int | None = None,
    width: int | None = None,
    options: Mapping[str, Any] | None = None,
    needs: Sequence[str] = (),
) -> Kernel:
    """The kernel of `op` that runs on `device` in `dtype`: resolved once, called many times.

    The tensors of those calls begin at multiples of 16 bytes. `head_dim` is D of the attention,
    `width` the columns of the rows of any other op; under `auto` a CUDA kernel needs to know.
    `options` go into every call, `needs` are as for :func:`resolve`.
    """
    given = _given(options)
    sizes: Any = {"head_dim": head_dim, "width": width}
    name = resolve(device, dtype, impl, op=op, needs=(*needs, *given), **sizes)
    return _kernel(op, name, given)


def _given(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that are not at their defaults, which all are false or None."""
    given = (options or {}).items()
    return {name: value for name, value in given if isinstance(value, torch.Tensor) or value}


def run(
    op: str,
    dtype: torch.dtype,
    impl: str,
    args: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    needs: Sequence[str] = (),
    *,
    head_dim: int | None = None,
    width: int | None = None,
) -> Any:
    """Run `op` on arguments of its schema that are checked, wherever they lie in memory.

    `dtype` is that of the activations; options, needs and sizes are as for :func:`bind`.
    """
    device, given = args[0].device, _given(options)
    sizes: Any = {"head_dim": head_dim, "width": width}
    name = resolve(device, dtype, impl, op=op, args=args, needs=(*needs, *given), **sizes)
    return _kernel(op, name, given)(*args)


def _kernel(op: str, implementation: str, options: dict[str, Any]) -> Kernel:
    packet = getattr(torch.ops.sbert_fast, op)
    return Kernel(op, implementation, getattr(packet, implementation), options)


def explain_ops() -> str:
    """A table: device, dtype, what `auto` picks, and why the others were passed over."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = []
    for device in map(torch.device, devices):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            try:
                chosen = resolve(device, dtype)
            except (ImplementationError, ValueError) as error:
                lines.append(f"{device.type:5} {str(dtype)[6:]:9} none  ({error})")
                continue
            passed = [
                f"{name}: {why}"
                for name in preference(device)
                if (why := refusal(name, device, dtype)) is not None
            ]
            note = f"  ({'; '.join(passed)})" if passed else ""
            lines.append(f"{device.type:5} {str(dtype)[6:]:9} {chosen}{note}")
    return "\n".join(lines)


def launches() -> dict[tuple[str, str], int]:
    """How often each (op, implementation) ran in this process: the proof of which side ran."""
    counts = {key: tally.value() for key, tally in list(_launches.items())}
    return {key: count for key, count in counts.items() if count}


def reset_launches() -> None:
    """Set every launch counter to zero."""
    for tally in list(_launches.values()):
        tally.reset()
