"""From the modules of a SentenceTransformer to pooling and what follows it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_fast import ops
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.fingerprint import Fingerprint, derive, settle
from sbert_fast.heads import Head, Rows
from sbert_fast.layers import PoolKernels, Unfinished
from sbert_fast.linears import PreparedLinear, prepare_linear
from sbert_fast.models.base import linear
from sbert_fast.models.checks import check_finite
from sbert_fast.packing import ROW_ALIGNMENT, PackedBatch
from sbert_fast.target import Target

# sentence-transformers' names of the modes, and ours.
_MODES = {
    "mean": "mean",
    "cls": "cls",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
}

# Modes that read one token of a sequence.
_SINGLE: dict[tuple[str, ...], Rows] = {
    ("cls",): PackedBatch.first_rows,
    ("last_token",): PackedBatch.last_rows,
}
# What a `Dense` may end in: a row of the result depends on no other row, nor on training mode.
ACTIVATIONS = frozenset(
    getattr(nn, name)
    for name in (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid "
        "Mish PReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink "
        "Threshold"
    ).split()
)


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """What happens between the last hidden state and the embedding.

    Attributes:
        modes: names of :data:`sbert_fast.ops.POOLING_MODES`, concatenated in this order.
        include_prompt: False leaves out the tokens of the prompt.
        tail: the `Dense` and `Normalize` modules that follow, in order, by name.
        width: hidden size of the tokens.
    """

    modes: tuple[str, ...]
    include_prompt: bool
    tail: dict[str, nn.Module]
    width: int

    @property
    def dimension(self) -> int:
        """Components of an embedding, before truncation."""
        for module in reversed(self.tail.values()):
            if is_module(module, "Dense"):
                dense: Any = module
                return int(dense.linear.out_features)
        return self.width * len(self.modes)

    @property
    def has_dense(self) -> bool:
        return any(is_module(module, "Dense") for module in self.tail.values())


def is_module(module: nn.Module, name: str) -> bool:
    """Whether `module` is sentence-transformers' own class `name`, not a subclass."""
    cls = type(module)
    return cls.__name__ == name and cls.__module__.startswith("sentence_transformers.")


def read_pooling(modules: dict[str, nn.Module], width: int) -> PoolingSpec:
    """The pooling spec of the modules that follow the transformer.

    Args:
        modules: everything after the first module, by name.
        width: hidden size of the transformer.

    Raises:
        UnsupportedModelError: a module, or an option of one, that is not supported.
    """
    first, *names = modules or [""]
    pooling: Any = modules.get(first)
    if pooling is None or not is_module(pooling, "Pooling"):
        found = "nothing" if pooling is None else type(pooling).__name__
        raise UnsupportedModelError(f"the second module must be Pooling, got {found}")
    tail = {name: modules[name] for name in names}
    modes = pooling.pooling_mode
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [mode for mode in modes if mode not in _MODES]
    if unknown:
        raise UnsupportedModelError(
            f"pooling mode must be one of {', '.join(_MODES)}, got {unknown}"
        )
    _check_tail("Pooling", tail, width * len(modes))
    return PoolingSpec(tuple(_MODES[mode] for mode in modes), pooling.include_prompt, tail, width)


def mean_of_tokens(modules: dict[str, nn.Module], width: int) -> PoolingSpec:
    """The pooling spec of a StaticEmbedding, which pools itself; arguments and errors as for
    :func:`read_pooling`."""
    _check_tail("StaticEmbedding", modules, width)
    return PoolingSpec(("mean",), True, modules, width)


def _check_tail(first: str, modules: dict[str, nn.Module], width: int) -> None:
    """Refuse modules behind `first`, which gives `width` components, that are not supported."""
    for module in modules.values():
        if not (is_module(module, "Dense") or is_module(module, "Normalize")):
            raise UnsupportedModelError(
                f"modules after {first} must be Dense or Normalize, got {type(module).__name__}"
            )
        width = _check_part(module, width)


def _check_part(module: Any, width: int) -> int:
    """Check a module that takes embeddings of `width` components; return how many it gives."""
    name = type(module).__name__
    for attribute in ("module_input_name", "module_output_name"):
        key = getattr(module, attribute, "sentence_embedding")
        if key != "sentence_embedding":
            raise UnsupportedModelError(
                f"{name}.{attribute} must be 'sentence_embedding', got {key!r}"
            )
    if not is_module(module, "Dense"):
        return width
    if module.use_residual and (module.in_features == module.out_features) == hasattr(
        module, "residual"
    ):
        raise UnsupportedModelError(f"{name} has a residual that does not fit its features")
    activation = module.activation_function
    if type(activation) not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{name}.activation_function must be one of torch.nn that acts on each value alone, "
            f"got {type(activation).__name__}"
        )
    found = linear(module.linear).weight.shape
    if found[1] != width:
        raise UnsupportedModelError(
            f"{name} must take the {width} components that come before it, got {found[1]}"
        )
    return int(found[0])


# A `Dense`: its layer, and the projection of its residual if it has one.
_PreparedDense = tuple[PreparedLinear, PreparedLinear | None]


class PoolingHead(Head):
    """Pools packed hidden states into rows of an output array.

    The weights of `Dense` modules are prepared like the encoder's: derived state, rebuilt when they
    change, never copied or pickled. Everything computes in fp32.
    """

    takes_empty = True

    def __init__(self, spec: PoolingSpec) -> None:
        self.spec = spec
        self.dimension, self.include_prompt = spec.dimension, spec.include_prompt
        # Older versions of sentence-transformers find the first token by its column.
        if spec.include_prompt and not {"cls", "weighted_mean"} & {*spec.modes}:
            self.padding_sides = ("right", "left")
        self._dense: dict[str, tuple[_PreparedDense, Fingerprint]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["spec"])  # type: ignore[misc]

    def __call__(
        self,
        x: Tensor | Unfinished,
        batch: PackedBatch,
        kernels: PoolKernels,
        out: Tensor,
        rows: Tensor,
        *,
        normalize: bool,
        skip: int,
    ) -> None:
        spec, dimension = self.spec, out.shape[1]
        if self.fuses(dimension):
            ends_normalized = any(is_module(m, "Normalize") for m in spec.tail.values())
            mode = ops.POOLING_MODES.index(spec.modes[0])
            last = batch.cu_seqlens, mode, ends_normalized or normalize, skip, None, out, rows
            if isinstance(x, Unfinished):
                assert kernels.norm_pool is not None
                norm = x.norm.weight, x.norm.bias, x.norm.eps
                kernels.norm_pool(x.y, x.bias, x.residual, *norm, *last)
            else:
                kernels.pool(x, *last)
            return
        assert isinstance(x, Tensor)
        pooled = torch.empty(
            (batch.num_sequences, spec.width * len(spec.modes)),
            device=x.device,
            dtype=torch.float32,
        )
        for i, mode_name in enumerate(spec.modes):
            part = pooled[:, i * spec.width : (i + 1) * spec.width]
            mode = ops.POOLING_MODES.index(mode_name)
            kernels.pool(x, batch.cu_seqlens, mode, False, skip, None, part, None)
        for name, module in spec.tail.items():
            if is_module(module, "Normalize"):
                pooled = F.normalize(pooled, dim=1)
            else:
                pooled = self._apply_dense(name, module, pooled)
        pooled = pooled[:, :dimension]
        out[rows.long()] = F.normalize(pooled, dim=1) if normalize else pooled

    def reads(self, skip: int) -> Rows | None:
        return _SINGLE.get(self.spec.modes) if skip == 0 else None

    def fuses(self, dimension: int) -> bool:
        """Whether embeddings of `dimension` components are made in one pass over the tokens."""
        spec = self.spec
        return len(spec.modes) == 1 and not spec.has_dense and dimension == spec.dimension

    def prepare(self, dtype: torch.dtype, device: torch.device, impl: str) -> None:
        """Lay out the weights of every `Dense`, see :meth:`Head.prepare`."""
        for name, module in self.spec.tail.items():
            if not is_module(module, "Dense"):
                continue
            if any(parameter.dtype != dtype for parameter in module.parameters()):
                raise UnsupportedModelError("parameters have several dtypes")
            entry = self._dense.get(name)
            if entry is None or not entry[1].is_current():
                target = Target(torch.float32, device, impl)
                prepare = partial(_prepare_dense, name, module, target)
                self._dense[name] = derive(module.parameters(), prepare)

    def _apply_dense(self, name: str, module: Any, x: Tensor) -> Tensor:
        """`Dense` on rows padded to a multiple of 16, so that a row depends on no other row."""
        (layer, residual), _ = self._dense[name]
        count = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -count % ROW_ALIGNMENT))
        y = module.activation_function(layer(padded))
        if getattr(module, "use_residual", False):
            y = y + (padded if residual is None else residual(padded))
        return y[:count]


def _prepare_dense(name: str, module: Any, target: Target) -> _PreparedDense:
    check_finite(module, f"{name}.")
    with torch.inference_mode(False), torch.no_grad():
        layer = prepare_linear((linear(module.linear),), target)
        projection = getattr(module, "residual", None)
        residual = None
        if projection is not None:
            residual = prepare_linear((linear(projection),), target)
    settle(target.device)
    return layer, residual
