"""Linear layers of the packed engine: a class for each kernel, and what chooses between them.

A gated layer gives `f(a) * b`, `a` and `b` being the halves of its columns, f its activation.

On panels a row of the result depends on no other row, bit for bit; elsewhere that holds where the
number of rows is a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_fast import ops
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.models.base import Linear
from sbert_fast.norms import PreparedNorm
from sbert_fast.ops import panels
from sbert_fast.ops.dispatch import requested
from sbert_fast.ops.reference import Activation
from sbert_fast.packing import ROW_ALIGNMENT
from sbert_fast.target import BF16_ISAS, Target, tiles_refusal

# Rows oneDNN lays prepacked weights out for; any other number of rows works too.
_PREPACK_ROWS = 512
_NOT_ASKED = "not asked for"


class PreparedLinear(Protocol):
    """`activation(x @ weight.T + bias)`, gated where it is asked for, laid out for its kernel."""

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, N]` of `x` `[T, K]`."""

    def add_norm(self, x: Tensor, residual: Tensor, norm: PreparedNorm) -> Tensor:
        """The norm of the output plus `residual` `[T, N]`."""

    def add_norm_sum(
        self, x: Tensor, residual: Tensor, norm: PreparedNorm
    ) -> tuple[Tensor, Tensor]:
        """What `add_norm` gives, and the sum."""

    def normed(self, x: Tensor, norm: PreparedNorm) -> Tensor:
        """The norm of the output."""

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output, and the bias fp32 `[N]` that is still to be added; None where it has been."""


class _Linear:
    """What all kinds share; the arguments are those of :func:`prepare_linear`."""

    def __init__(
        self,
        parts: tuple[Linear, ...],
        target: Target,
        activation: Activation = Activation.NONE,
        first: bool | None = None,
    ) -> None:
        self.target, self.activation, self.first = target, activation, first
        self.features = sum(part.weight.shape[0] for part in parts) // (1 if first is None else 2)
        self._kernels: dict[tuple[str, bool], ops.Kernel] = {}
        self.take(parts)

    def take(self, parts: tuple[Linear, ...]) -> None:
        raise NotImplementedError

    def kernel(self, op: str, rms: bool = False) -> ops.Kernel:
        """Bound by its first use: a linear layer alone may run where LayerNorm does not."""
        if (op, rms) not in self._kernels:
            options = {"rms": rms}
            self._kernels[op, rms] = self.target.bind(op, width=self.features, options=options)
        return self._kernels[op, rms]

    def activated(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer makes of the products `y`, where the activation is an op of its own."""
        if self.first is not None:
            gated: Tensor = self.kernel("gated_activation")(y, bias, self.activation, self.first)
            return gated
        is_tanh = self.activation == Activation.GELU_TANH
        activated: Tensor = self.kernel("bias_gelu")(y, bias, is_tanh)
        return activated

    def normed(self, x: Tensor, norm: PreparedNorm) -> Tensor:
        return self._add_norm(x, None, norm)

    def add_norm(self, x: Tensor, residual: Tensor, norm: PreparedNorm) -> Tensor:
        return self._add_norm(x, residual, norm)

    def _add_norm(self, x: Tensor, residual: Tensor | None, norm: PreparedNorm) -> Tensor:
        rest = residual, norm.weight, norm.bias, norm.eps
        normed: Tensor = self.kernel("add_norm", norm.rms)(*self.without_bias(x), *rest)
        return normed

    def add_norm_sum(
        self, x: Tensor, residual: Tensor, norm: PreparedNorm
    ) -> tuple[Tensor, Tensor]:
        rest = residual, norm.weight, norm.bias, norm.eps
        normed, total = self.kernel("add_norm_sum", norm.rms)(*self.without_bias(x), *rest)
        return normed, total

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self(x), None


class LiveLinear(_Linear):
    """The model's own modules, called as they are.

    Raises:
        UnsupportedModelError: a part has no module.
    """

    name = "live"

    def take(self, parts: tuple[Linear, ...]) -> None:
        self.modules: list[nn.Module] = []
        self.dropout = parts[0].dropout if self.target.drops else None
        for part in parts:
            if part.module is None:
                shape = tuple(part.weight.shape)
                raise UnsupportedModelError(
                    f"live weights need a module for every linear layer; that of {shape} has none"
                )
            self.modules.append(part.module)

    @staticmethod
    def refusal(target: Target, inputs: int) -> str | None:
        return None if target.live else f"live weights were {_NOT_ASKED}"

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [module(x) for module in self.modules]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        y = y if self.activation == Activation.NONE else self.activated(y, None)
        return y if self.dropout is None else self.dropout(y)

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self(x).to(self.target.dtype), None


class StackedLinear(_Linear):
    """A layer whose weights are copied, those of several parts into one matrix."""

    read_as: torch.dtype | None = None  # what weights are laid out from; None: the compute dtype

    def take(self, parts: tuple[Linear, ...]) -> None:
        dtype = self.read_as or self.target.dtype
        weight = torch.cat([part.weight.detach().to(dtype) for part in parts])
        self.weight = self.lay_out(self.ordered(weight))
        bias = _side_by_side(parts)
        self.wide_bias = None if bias is None else self.ordered(bias.float())
        self.bias = None if bias is None else bias.to(self.target.dtype)

    def ordered(self, rows: Tensor) -> Tensor:
        """The rows of a weight, or a bias, in the order in which the kernel reads them."""
        return rows

    def lay_out(self, weight: Tensor) -> Tensor:
        return weight.contiguous()


class PanelLinear(StackedLinear):
    """The C++ ops: activation, gate, residual and LayerNorm are part of the product."""

    name = "panels"

    @staticmethod
    def refusal(target: Target, inputs: int) -> str | None:
        if target.device.type != "cpu" or requested(target.impl) == "cuda":
            return "panels run on a CPU only"
        if ops.resolve(target.device, target.dtype, target.impl) != "cpu":
            return "the C++ ops do not run"
        isa = torch.ops.sbert_fast.cpu_isa()
        if target.dtype == torch.float32:
            return "oneDNN is faster without AVX2" if isa == "generic" else None
        if isa not in BF16_ISAS:
            return "oneDNN is faster without bf16 dot products"
        # Where Linux refuses the tiles, oneDNN has none either.
        if isa != "amx_bf16" and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
            return "oneDNN is faster when only it can use AMX"
        return f"the number of inputs ({inputs}) is odd" if inputs % 2 else None

    def ordered(self, rows: Tensor) -> Tensor:
        return rows if self.first is None else panels.interleave(rows, self.first)

    def lay_out(self, weight: Tensor) -> Tensor:
        return panels.pack(weight)

    def __call__(self, x: Tensor) -> Tensor:
        how = self.features, self.activation, self.first is not None
        y: Tensor = self.kernel("linear")(x, self.weight, self.wide_bias, *how)
        return y

    def add_norm(self, x: Tensor, residual: Tensor, norm: PreparedNorm) -> Tensor:
        if norm.rms:
            return super().add_norm(x, residual, norm)
        rest = residual, norm.weight, norm.bias, norm.eps
        normed: Tensor = self.kernel("linear_norm")(x, self.weight, self.wide_bias, *rest)
        return normed


class Int8Linear(PanelLinear):
    """The C++ ops on int8 panels."""

    name = "int8"
    read_as = torch.float32

    @staticmethod
    def refusal(target: Target, inputs: int) -> str | None:
        if not target.int8:
            return f"int8 was {_NOT_ASKED}"
        if inputs % panels.INT8_GROUP:
            return f"the number of inputs ({inputs}) is not a multiple of {panels.INT8_GROUP}"
        return None

    def lay_out(self, weight: Tensor) -> Tensor:
        return panels.pack_int8(weight)


class SplitLinear(PanelLinear):
    """The C++ ops on tiles, float32 as sums of two bfloat16: what torch documents for `high`."""

    name = "split"

    @staticmethod
    def refusal(target: Target, inputs: int) -> str | None:
        if not target.high:
            return f"high precision was {_NOT_ASKED}"
        reason = PanelLinear.refusal(target, inputs) or tiles_refusal()
        if reason is None and inputs % panels.SPLIT_GROUP:
            reason = f"the number of inputs ({inputs}) is not a multiple of {panels.SPLIT_GROUP}"
        return reason

    def lay_out(self, weight: Tensor) -> Tensor:
        return panels.pack_split(weight)


class OneDnnLinear(StackedLinear):
    """Torch's oneDNN on weights that are laid out ahead; GELU is part of the product."""

    name = "onednn"

    @staticmethod
    def refusal(target: Target, inputs: int) -> str | None:
        if target.device.type != "cpu" or requested(target.impl) == "cuda":
            return "oneDNN multiplies on a CPU only"
        if not torch.backends.mkldnn.is_available() or not hasattr(
            torch.ops.mkldnn, "_linear_pointwise"
        ):
            return "this torch was built without oneDNN"
        bf16 = target.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if bf16 or target.dtype == torch.float32:
            return None
        return f"it does not multiply {target.dtype} on this CPU"

    def lay_out(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PREPACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        function, variant = {
            Activation.NONE: ("none", ""),
            Activation.GELU: ("gelu", "none"),
            Activation.GELU_TANH: ("gelu", "tanh"),
        }[self.activation if self.first is None else Activation.NONE]
        multiply = torch.ops.mkldnn._linear_pointwise
        y: Tensor = multiply(x, self.weight, self.bias, function, [], variant)
        return y if self.first is None else self.activated(y, None)


class TorchLinear(StackedLinear):
    """`F.linear`, the bias left to the op that follows."""

    name = "torch"

    @staticmethod
    def refusal(target: Target, inputs: int) -> str | None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        if self.activation == Activation.NONE:
            return F.linear(x, self.weight, self.bias)
        return self.activated(*self.without_bias(x))

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return F.linear(x, self.weight), self.wide_bias


KINDS = (LiveLinear, Int8Linear, SplitLinear, PanelLinear, OneDnnLinear, TorchLinear)


@dataclass(frozen=True, slots=True)
class LinearChoice:
    """The kind of layer that runs; and why the kinds before it do not, by their names."""

    kind: type[LiveLinear | PanelLinear | OneDnnLinear | TorchLinear]
    refusals: dict[str, str]

    def __str__(self) -> str:
        """The kernel, and why no faster one runs, of those that might."""
        refusals = self.refusals.items()
        faster = [f"{name}: {why}" for name, why in refusals if not why.endswith(_NOT_ASKED)]
        return f"{self.kind.name} ({'; '.join(faster)})" if faster else self.kind.name


def choose(target: Target, inputs: int = 0) -> LinearChoice:
    """The kind of layer that is fastest for `target`, of those that take rows of `inputs`."""
    refusals: dict[str, str] = {}
    for kind in KINDS:
        if (reason := kind.refusal(target, inputs)) is None:
            break
        refusals[kind.name] = reason
    return LinearChoice(kind, refusals)


def row_alignment(choices: Iterable[LinearChoice]) -> int:
    """What the number of rows must be a multiple of, so that a row's bits depend on no other."""
    return 1 if all(issubclass(each.kind, PanelLinear) for each in choices) else ROW_ALIGNMENT


def prepare_linear(
    parts: tuple[Linear, ...],
    target: Target,
    activation: Activation = Activation.NONE,
    first: bool | None = None,
) -> PreparedLinear:
    """Layers of the same input as one, laid out for the kernel that suits `target`.

    Args:
        parts: their outputs stand side by side.
        target: what to prepare them for.
        activation: fused into the layer.
        first: of a gated layer, whether the first half is the one that is activated; else None.
    """
    return choose(target, parts[0].weight.shape[1]).kind(parts, target, activation, first)


def _side_by_side(parts: tuple[Linear, ...]) -> Tensor | None:
    """The biases of some layers, zeros where one has none; None where none has any."""
    if all(part.bias is None for part in parts):
        return None
    zeros = (part.weight.new_zeros(part.weight.shape[0]) for part in parts)
    pairs = zip(parts, zeros, strict=True)
    return torch.cat([zero if part.bias is None else part.bias.detach() for part, zero in pairs])
