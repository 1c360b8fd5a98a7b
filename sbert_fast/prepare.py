"""Weights prepared for the packed engine, and the fingerprint that tells when they are stale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_fast import ops
from sbert_fast.models.base import Linear, Norm

# Rows oneDNN lays prepacked weights out for; any other number of rows works too.
_PREPACK_ROWS = 512


def onednn_linear_available(dtype: torch.dtype) -> bool:
    """Whether torch's prepacked oneDNN linears run in `dtype` on this CPU."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class PreparedLinear:
    """A linear layer with an optional fused GELU: `gelu(x @ weight.T + bias)`.

    Prepacked through oneDNN on a CPU that has it, `F.linear` elsewhere. Rows of `x` should be a
    multiple of 16: then a row of the result depends on no other row, bit for bit.
    """

    def __init__(
        self,
        linears: tuple[Linear, ...],
        dtype: torch.dtype,
        gelu: ops.Kernel | None = None,
        tanh: bool = False,
    ) -> None:
        """Fuse `linears` (same input, outputs side by side) into one, in `dtype`."""
        weight = torch.cat([part.weight.detach().to(dtype) for part in linears])
        biases = [part.bias for part in linears]
        self.bias = None
        if any(bias is not None for bias in biases):
            self.bias = torch.cat(
                [
                    part.weight.new_zeros(part.weight.shape[0]).to(dtype)
                    if part.bias is None
                    else part.bias.detach().to(dtype)
                    for part in linears
                ]
            )
        self.gelu, self.tanh = gelu, tanh
        self.prepacked = weight.device.type == "cpu" and onednn_linear_available(dtype)
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PREPACK_ROWS)
            if self.prepacked
            else weight.contiguous()
        )
        self._attributes: tuple[str, list[float], str] = (
            ("none", [], "") if gelu is None else ("gelu", [], "tanh" if tanh else "none")
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self.prepacked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self._attributes)
        y = F.linear(x, self.weight, self.bias)
        return y if self.gelu is None else self.gelu(y, None, self.tanh)


@dataclass(frozen=True, slots=True)
class PreparedNorm:
    """LayerNorm parameters in fp32."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: Norm) -> PreparedNorm:
        return cls(norm.weight.detach().float(), norm.bias.detach().float(), norm.eps)


class Fingerprint:
    """Tells whether any parameter or submodule of a model was added, replaced or written to.

    It keeps the tensors it was taken from alive, so that an address cannot be used again unseen.

    Attributes:
        modules: the model and every module inside it, as they were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules = list(model.modules())
        self._children = [(module._modules, dict(module._modules)) for module in modules]
        self._parameters = [module._parameters for module in modules]
        self._held = [parameter.detach() for parameter in model.parameters()]
        self._values = self._read()

    def _read(self) -> list[tuple[str, tuple[Any, ...] | None]]:
        return [
            (name, _state(parameter))
            for parameters in self._parameters
            for name, parameter in parameters.items()
        ]

    def is_current(self) -> bool:
        # Modules compare by identity.
        return all(now == then for now, then in self._children) and self._read() == self._values


def _state(parameter: Tensor | None) -> tuple[Any, ...] | None:
    if parameter is None:
        return None
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device
