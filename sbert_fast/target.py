"""What layers are prepared for: what they compute in, and where their weights may be int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sbert_fast import ops

# Ops on what linear layers give, before it is added to anything.
_INNER = ("bias_gelu", "gated_activation", "varlen_attention")

BF16_ISAS = ("amx_bf16", "avx512_bf16")
INT8_ISAS = (*BF16_ISAS, "avx512_vnni", "avx_vnni")
TILE_ISAS = ("amx_bf16",)


@dataclass(frozen=True, slots=True)
class Target:
    """What layers are prepared for.

    Attributes:
        dtype: what they compute in, whatever their weights are kept in.
        device: where the weights are.
        impl: implementation of the ops, see :mod:`sbert_fast.ops`.
        live: the model's own modules are called: nothing of their weights is copied.
        int8: weights are rounded to int8, and what they multiply is, row by row.
        high: float32 products may be as exact as :func:`takes_high` says.
        drops: modules of dropout act, those in training mode; only beside `live`.
        autocast: what live linear layers give under torch.autocast, whatever `dtype` is; or None.
    """

    dtype: torch.dtype
    device: torch.device
    impl: str = "auto"
    live: bool = False
    int8: bool = False
    high: bool = False
    drops: bool = False
    autocast: torch.dtype | None = None

    def holds(self) -> bool:
        """Whether torch's precision is still the one that it was made for, where that counts."""
        return takes_high(self.dtype, self.device) == self.high or tiles_refusal() is not None

    def bind(self, op: str, **how: Any) -> ops.Kernel:
        """The kernel of `op`; sizes and options as :func:`ops.bind` takes them."""
        dtype = (self.autocast if op in _INNER else None) or self.dtype
        return ops.bind(op, self.device, dtype, self.impl, **how)


def compute_dtype(
    model: nn.Module, requested: torch.dtype | None, device: torch.device
) -> torch.dtype:
    """The dtype asked for, else that of the model; float32 instead of float16 on a CPU.

    Beside int8 weights it is bfloat16 where this CPU has dot products in it, else float32.
    """
    if requested == torch.int8:
        return torch.bfloat16 if _isa() in BF16_ISAS else torch.float32
    if requested is not None:
        return requested
    dtype = next(model.parameters()).dtype
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def takes_high(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `dtype` may be as exact as `torch.set_float32_matmul_precision("high")`
    documents: it was set to that or to "medium", and `dtype` is float32, on a CPU."""
    if dtype != torch.float32 or device.type != "cpu":
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return False  # torch's older and newer settings contradict one another


def tiles_refusal() -> str | None:
    """Why products of bfloat16 cannot run on tiles; None where they can."""
    return None if _isa() in TILE_ISAS else f"high precision needs AMX, this CPU runs {_isa()}"


def int8_refusal(device: torch.device, impl: str) -> str | None:
    """Why int8 weights cannot run on a device; None where they can."""
    if device.type != "cpu":
        return f"int8 weights run on a CPU, not on {device}"
    if (ops.requested(impl) not in ("auto", "cpu")) or _isa() is None:
        return "int8 weights need the C++ ops (impl='cpu'), which do not run"
    if _isa() not in INT8_ISAS:
        return f"int8 weights need AVX512-VNNI or AVX-VNNI, this CPU runs {_isa()}"
    return None


def _isa() -> str | None:
    """The instruction set of the C++ ops; None where they do not run."""
    return str(torch.ops.sbert_fast.cpu_isa()) if ops.extension.CPU.available else None
