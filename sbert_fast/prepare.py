"""Weights prepared for the packed engine, and the fingerprint that tells when they are stale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_fast import ops
from sbert_fast.models.base import Linear, Norm
from sbert_fast.ops import panels
from sbert_fast.ops.content import ContentHash
from sbert_fast.ops.dispatch import requested
from sbert_fast.ops.panels import Activation

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


def panel_linear_preferred(dtype: torch.dtype) -> bool:
    """Whether this CPU runs linears in `dtype` fastest on the panels of the C++ ops.

    In bfloat16 that takes dot products of pairs; AMX, which oneDNN uses, is faster still.
    """
    if not ops.extension.CPU.available:
        return False
    isa = torch.ops.sbert_fast.cpu_isa()
    if dtype == torch.bfloat16:
        return isa == "avx512_bf16" and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 and isa != "generic"


def linear_implementation(dtype: torch.dtype, device: torch.device, impl: str = "auto") -> str:
    """What a linear layer runs on: "panels", "onednn" or "torch"."""
    # The CUDA ops run on a CPU in tests only, beside the linear layers of a GPU.
    if device.type != "cpu" or requested(impl) == "cuda":
        return "torch"
    if ops.resolve(device, dtype, impl) == "cpu" and panel_linear_preferred(dtype):
        return "panels"
    return "onednn" if onednn_linear_available(dtype) else "torch"


def aligned(values: Tensor) -> Tensor:
    """`values`, copied where they begin between the 16 bytes that a kernel loads at once.

    A file that is mapped into memory has its tensors anywhere.
    """
    return values if values.data_ptr() % 16 == 0 else values.clone()


def settle(device: torch.device) -> None:
    """Wait for what was prepared on the current stream: other threads read it on theirs."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@dataclass(frozen=True, slots=True)
class PreparedNorm:
    """LayerNorm parameters in fp32."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: Norm) -> PreparedNorm:
        weight, bias = (part.detach().float().contiguous() for part in (norm.weight, norm.bias))
        return cls(aligned(weight), aligned(bias), norm.eps)


class LinearKernels:
    """The kernels of linear layers in `dtype` on `device`, and of what follows them.

    Args:
        dtype: float32 or bfloat16 on a CPU; any that torch multiplies in elsewhere.
        device: where the weights are.
        impl: implementation of the ops, see :mod:`sbert_fast.ops`.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, impl: str) -> None:
        self.dtype = dtype
        self.device, self.impl = device, impl
        self.implementation = linear_implementation(dtype, device, impl)
        if self.implementation == "panels":
            self.linear = ops.bind("linear", device, dtype, impl)
            self.linear_norm = ops.bind("linear_norm", device, dtype, impl)

    def bind(self, op: str, width: int) -> ops.Kernel:
        """The kernel of `op` for rows `[T, width]` that a linear layer made."""
        return ops.bind(op, self.device, self.dtype, self.impl, width=width)


class PreparedLinear:
    """A linear layer, `activation(x @ weight.T + bias)`, its weights laid out for its kernel.

    On panels a row of the result depends on no other row, bit for bit; elsewhere that holds where
    the rows of `x` are a multiple of 16.

    Args:
        linears: layers of the same input, whose outputs stand side by side.
        kernels: what they run on.
        activation: fused into the layer.
    """

    def __init__(
        self,
        linears: tuple[Linear, ...],
        kernels: LinearKernels,
        activation: Activation = Activation.NONE,
    ) -> None:
        self.kernels, self.activation = kernels, activation
        self.implementation = kernels.implementation
        dtype = kernels.dtype
        weight = torch.cat([part.weight.detach().to(dtype) for part in linears])
        self.features, inputs = weight.shape
        if self.implementation == "panels" and dtype == torch.bfloat16 and inputs % 2:
            self.implementation = "onednn" if onednn_linear_available(dtype) else "torch"
        bias = _side_by_side(linears)
        if self.implementation == "panels":
            self.bias = None if bias is None else bias.float()
            self.weight = panels.pack(weight)
            return
        self.bias = None if bias is None else bias.to(dtype)
        self._wide_bias = None if bias is None else bias.float()
        self.weight = weight.contiguous()
        if self.implementation == "onednn":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, _PREPACK_ROWS)

    # Bound by their first use: a linear layer alone may run where these do not.
    @cached_property
    def gelu_kernel(self) -> ops.Kernel:
        return self.kernels.bind("bias_gelu", self.features)

    @cached_property
    def norm_kernel(self) -> ops.Kernel:
        return self.kernels.bind("add_norm", self.features)

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, N]` of `x` `[T, K]`."""
        gelu, tanh = self.activation != Activation.NONE, self.activation == Activation.GELU_TANH
        if self.implementation == "panels":
            return self.kernels.linear(x, self.weight, self.bias, self.features, self.activation)
        if self.implementation == "onednn":
            approximate = "" if not gelu else "tanh" if tanh else "none"
            return torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "gelu" if gelu else "none", [], approximate
            )
        if gelu:
            return self.gelu_kernel(F.linear(x, self.weight), self._wide_bias, tanh)
        return F.linear(x, self.weight, self.bias)

    def add_norm(self, x: Tensor, residual: Tensor, norm: PreparedNorm) -> Tensor:
        """LayerNorm of the layer's output plus `residual` `[T, N]`."""
        last = (residual, norm.weight, norm.bias, norm.eps)
        if self.implementation == "panels":
            return self.kernels.linear_norm(x, self.weight, self.bias, *last)
        return self.norm_kernel(*self.without_bias(x), *last)

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output, and the bias fp32 `[N]` that is still to be added: None where it has been."""
        if self.implementation != "torch":
            return self(x), None
        return F.linear(x, self.weight), self._wide_bias


def _side_by_side(linears: tuple[Linear, ...]) -> Tensor | None:
    """The biases of some layers, zeros where one has none; None where none has any."""
    if all(part.bias is None for part in linears):
        return None
    return torch.cat(
        [
            part.weight.new_zeros(part.weight.shape[0]) if part.bias is None else part.bias.detach()
            for part in linears
        ]
    )


def tensors_in(node: object) -> Iterator[Tensor]:
    """Every tensor of prepared weights."""
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, tuple):
        for part in node:
            yield from tensors_in(part)
    elif isinstance(node, PreparedLinear):
        yield from tensors_in(tuple(vars(node).values()))
    elif is_dataclass(node):
        for entry in fields(node):
            yield from tensors_in(getattr(node, entry.name))


_version_of = Tensor._version.__get__  # type: ignore[attr-defined]


class Fingerprint:
    """Tells whether any of some tensors was written to, or given another storage.

    Args:
        tensors: parameters and buffers. Each is asked for its count of writes, address, dtype,
            shape and strides.
        shared: what was derived of them. Those of `tensors` that are among it are read live; what
            the others hold is hashed, because many writers are not counted: those through
            `.data`, fused optimizers, views of numpy.
    """

    def __init__(self, tensors: Iterable[Tensor], shared: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        # They keep the storages alive, so that an address cannot be used again unseen.
        self._held = [tensor.detach() for tensor in self._tensors]
        # Those in the layout of oneDNN have none, and are copies.
        addresses = {t.data_ptr() for t in shared if t.layout == torch.strided}
        live = [t for t in self._tensors if t.data_ptr() in addresses]
        self._hash = ContentHash([t for t in self._tensors if t.data_ptr() not in addresses], live)
        self._counted = [t for t in self._tensors if not t.is_inference()]
        # Inference tensors count no writes: a hash of all their bits tells of them.
        self._uncounted = [t for t in self._tensors if t.is_inference()]
        self._values = self._read()

    def _read(self) -> tuple[object, ...]:
        return (
            self._hash(),
            list(map(_version_of, self._counted)),
            [torch.hash_tensor(tensor).item() for tensor in self._uncounted],
        )

    def is_current(self) -> bool:
        return self._read() == self._values
