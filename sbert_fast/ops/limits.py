"""What the CUDA kernels take of what the ops allow: csrc/cuda/ops*.cpp refuses the rest.

`auto` passes over a kernel that would refuse the call; a kernel asked for by name does refuse it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from sbert_fast.ops import validation

# Bytes of one access, and the 16-bit numbers in them.
ALIGNMENT, STEP = 16, 8
_MAX_ROWS = 2**31 - 1
_MAX_WIDTH = 4096
MAX_HEAD_DIM = 128

# Arguments that are read sixteen bytes at a time, by their names in the schema.
_NORM = ("x", "bias", "residual", "weight", "ln_bias")
_VECTORS = {
    "varlen_attention": ("qkv",),
    "embed_norm": ("word", "position_table", "type_table", "weight", "bias"),
    "add_norm": _NORM,
    "bias_gelu": ("x", "bias"),
    "segment_pool": ("x",),
    "segment_pool_out": ("x",),
    "norm_pool": _NORM,
    "norm_pool_out": _NORM,
}


def refusal_of_size(op: str, head_dim: int | None = None, width: int | None = None) -> str | None:
    """Why the CUDA kernel of `op` cannot run a model of a size; None if it can.

    Args:
        op: name of an op.
        head_dim: D of attention, None where it is not known.
        width: columns of a row of the other ops, None where they are not known.
    """
    if op == "varlen_attention":
        name, size, largest = "head dim D", head_dim, MAX_HEAD_DIM
    elif op == "bias_gelu":
        name, size, largest = "width F", width, _MAX_ROWS
    else:
        name, size, largest = "width E", width, _MAX_WIDTH
    if size is not None and 0 < size <= largest and size % STEP == 0:
        return None
    found = "an unknown one" if size is None else size
    return f"its {name} must be a multiple of {STEP}, at most {largest}, got {found}"


def takes(op: str, args: Sequence[Any]) -> bool:
    """Whether the CUDA kernel of `op` takes the tensors of a call.

    Args:
        op: name of an op.
        args: arguments of its schema, as the contract has them, of a size that the kernel takes.

    Returns:
        False also where tensors have no addresses, or a graph will meet others than these.
    """
    if _is_capturing():
        return False
    given = dict(zip(_names(op), args, strict=True))
    vectors = (given[name] for name in _VECTORS[op])
    return args[0].shape[0] <= _MAX_ROWS and all(t is None or _in_vectors(t) for t in vectors)


def _is_capturing() -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return torch.compiler.is_compiling() or tracing or get_proxy_mode() is not None


@lru_cache
def _names(op: str) -> tuple[str, ...]:
    schema = getattr(torch.ops.sbert_fast, op).cuda._schema
    return tuple(argument.name for argument in schema.arguments)


def _in_vectors(tensor: Tensor) -> bool:
    """Whether every row begins at a multiple of sixteen bytes."""
    if not validation.addressed(tensor) or tensor.data_ptr() % ALIGNMENT:
        return False
    several = tensor.dim() > 1 and tensor.shape[0] > 1
    return not several or tensor.stride(0) * tensor.element_size() % ALIGNMENT == 0
