"""Argument checks of the public ops: name, what was expected, what came; before any allocation.

What each op asks of its arguments is in :mod:`sbert_fast.ops.contracts`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbert_fast.values import shown

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INT64_MAX = 2**63 - 1
_LARGEST = sys.float_info.max


def shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Check that `tensor` is one, and its shape: integers must match, strings are free."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested one" if tensor.is_nested else str(tensor.layout)[6:]
        raise TypeError(f"{name} must be a dense torch.Tensor, got {kind}")
    sizes = tensor.shape
    if len(sizes) == len(expected):
        for want, got in zip(expected, sizes, strict=True):
            if not isinstance(want, str) and got != want:
                break
        else:
            return
    wanted = ", ".join(map(str, expected))
    raise ValueError(f"{name} must have shape [{wanted}], got {list(sizes)}")


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be {either(allowed)}, got {str(tensor.dtype)[6:]}")


def either(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d)[6:] for d in dtypes)


def device(name: str, tensor: Tensor, expected: torch.device) -> None:
    if tensor.device != expected:
        raise ValueError(f"{name} must be on {expected}, got {tensor.device}")


def contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def apart(name: str, out: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """Check that a tensor that is written shares no memory with one that is read.

    Rows with gaps may lie in the gaps of others: those pass.
    """
    for other, tensor in inputs.items():
        if not _in_one_piece(out) or tensor is None or not _in_one_piece(tensor):
            continue
        (begin, end), (first, last) = _bytes(out), _bytes(tensor)
        if max(begin, first) < min(end, last):
            raise ValueError(f"{name} must share no memory with {other}, but overlaps it")


def _in_one_piece(tensor: Tensor) -> bool:
    return addressed(tensor) and tensor.is_contiguous() and tensor.device.type != "meta"


def addressed(tensor: Tensor) -> bool:
    """Whether a tensor has memory to look at: no graph, and no transform of torch.func, has."""
    # Fake and functional tensors are subclasses.
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _bytes(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + tensor.nbytes


def activations(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    shape(name, tensor, expected)
    dtype(name, tensor, FLOATS)
    contiguous(name, tensor)


def like(name: str, tensor: Tensor, expected: Sequence[int | str], x: Tensor) -> None:
    """Check a tensor that goes with `x`: its dtype, its device."""
    shape(name, tensor, expected)
    dtype(name, tensor, (x.dtype,))
    device(name, tensor, x.device)
    contiguous(name, tensor)


def parameter(name: str, tensor: Tensor, expected: Sequence[int | str], x: Tensor) -> None:
    """Check a parameter that goes with `x`: fp32, or also fp64 beside fp64."""
    shape(name, tensor, expected)
    wide = x.dtype == torch.float64
    dtype(name, tensor, (torch.float32, torch.float64) if wide else (torch.float32,))
    device(name, tensor, x.device)
    contiguous(name, tensor)


def integers(name: str, tensor: Tensor, expected: Sequence[int | str], where: torch.device) -> None:
    shape(name, tensor, expected)
    dtype(name, tensor, (torch.int32,))
    device(name, tensor, where)
    contiguous(name, tensor)


def columns(name: str, tensor: Tensor) -> int:
    """Check that the rows of `tensor` `[T, E]` hold something, and return E."""
    width = tensor.shape[1]
    if width == 0:
        raise ValueError(f"{name} must have at least one column, got shape {list(tensor.shape)}")
    return width


def integer(name: str, value: Any, least: int | None, *, optional: bool = False) -> int:
    """Check a whole number; `least` None leaves its value to the graph that is being captured."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    none = "None or " if optional else ""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be {none}an int, got {describe(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be {none}at least {least}, got {shown(value)}")
    if least is not None and value > _INT64_MAX:
        raise ValueError(f"{name} must be below 2^63, got {shown(value)}")
    return value if isinstance(value, int) else int(value)


def number(name: str, value: Any, least: float = -math.inf) -> float:
    """Check a finite number of at least `least`."""
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, (float, int, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if isinstance(value, np.generic):
        value = value.item()
    if not (least <= value and -_LARGEST <= value <= _LARGEST):
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {shown(value)}")
    return value if isinstance(value, float) else float(value)


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {describe(value)}")


def describe(value: Any) -> str:
    """What came where a scalar was expected."""
    if value is None or isinstance(value, Tensor):
        return "None" if value is None else f"a tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {shown(value)}"
