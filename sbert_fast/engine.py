"""PackedEncoder: prepared weights of a model, and its forward pass over packed batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sbert_fast import bypass, models, ops
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.fingerprint import Fingerprint, derive, settle
from sbert_fast.forking import Lock
from sbert_fast.linears import PreparedLinear, PreparedNorm, Target, aligned, prepare_linear
from sbert_fast.models.base import Linear, check_finite
from sbert_fast.ops.dispatch import FUSING
from sbert_fast.ops.panels import Activation
from sbert_fast.packing import PackedBatch
from sbert_fast.state import Snapshot


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    qkv: PreparedLinear
    attention_output: PreparedLinear
    attention_norm: PreparedNorm
    up: PreparedLinear
    down: PreparedLinear
    output_norm: PreparedNorm


@dataclass(frozen=True, slots=True)
class PoolKernels:
    """What pools hidden states; and, where that is one kernel, what normalises and pools them."""

    pool: ops.Kernel
    norm_pool: ops.Kernel | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything one forward pass needs, derived from the parameters it was `built_from`."""

    architecture: models.Architecture
    dtype: torch.dtype
    device: torch.device
    word: Tensor
    position: Tensor
    token_type: Tensor | None
    embedding_norm: PreparedNorm
    projection: PreparedLinear | None
    layers: tuple[PreparedLayer, ...]
    embed: ops.Kernel
    attend: ops.Kernel
    pooling: PoolKernels


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The last hidden states before the last LayerNorm: `norm(y + bias + residual)`.

    Attributes:
        y, residual: `[T, E]`.
        bias: fp32 `[E]`, or None.
    """

    y: Tensor
    bias: Tensor | None
    residual: Tensor
    norm: PreparedNorm


class Admission:
    """Whether a base model may run packed, and what its adapter has read of it.

    It holds as long as no attribute or buffer of the model and no function that it calls has
    changed.

    Attributes:
        problem: why the engine does not support the model; None where it does.
        inside, around: why the modules in the model, or the model itself and its pooler, are to be
            called all the same: they have hooks or forwards of their own. None where they have not.
        drops: the model is in training mode and has dropout.
        weights, identity: of the parameters, see :class:`sbert_fast.models.EncoderWeights`.
        tensors, buffers: the parameters that a packed pass stands for, and the model's buffers.
        records: a hook that gradient checkpointing has left records gradients where these are on.
    """

    architecture: models.Architecture
    weights: models.EncoderWeights

    def __init__(self, model: nn.Module) -> None:
        self._snapshot = Snapshot(model)
        self._originals = models.originals_of(model)
        self.buffers = list(model.buffers())
        self._buffers = Fingerprint(self.buffers, ())
        self.tensors = [t for name, t in model.named_parameters() if not _is_pooler(name)]
        self._kinds = self._read_kinds()
        self.problem: str | None = None
        inner = [m for name, m in model.named_modules() if name and not _is_pooler(name)]
        pooler = [m for name, m in model.named_modules() if _is_pooler(name)]
        try:
            self.architecture, self.weights = models.read(model)
        except UnsupportedModelError as error:
            self.problem = str(error)
            return
        self.identity = (self.architecture, self.weights.identity())
        self.inside, self.around = bypass.reason(inner), bypass.reason([model, *pooler])
        self.drops = bypass.drops([*inner, model])
        self.records = any(map(bypass.records_gradients, inner))

    def _read_kinds(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(tensor.dtype, tensor.device) for tensor in self.tensors]

    def is_current(self) -> bool:
        """Whether all of it still holds."""
        return (
            self.holds_without_tensors()
            and self._buffers.is_current()
            and self._read_kinds() == self._kinds
        )

    def holds_without_tensors(self) -> bool:
        """Whether it holds where no tensor was written to, moved or cast."""
        return self._snapshot.is_current() and self._originals.is_current()


def _is_pooler(name: str) -> bool:
    return name.partition(".")[0] == "pooler"


@dataclass(frozen=True, slots=True)
class _Current:
    """Prepared weights, and what they were derived from."""

    admission: Admission
    fingerprint: Fingerprint
    prepared: Prepared


def compute_dtype(model: nn.Module, requested: torch.dtype | None) -> torch.dtype:
    """The dtype the engine computes in: the one asked for, else that of the model.

    A float16 model on a CPU computes in float32, which holds every float16 value exactly.
    """
    if requested is not None:
        return requested
    parameter = next(model.parameters())
    if parameter.device.type == "cpu" and parameter.dtype == torch.float16:
        return torch.float32
    return parameter.dtype


class PackedEncoder:
    """The packed forward pass of one base model.

    Prepared weights are derived state: built at the first batch, rebuilt when a parameter changed,
    and left behind by `copy.deepcopy` and `pickle`, whose results prepare weights of their own.

    Args:
        model: a base model of a supported family (see :data:`sbert_fast.models.FAMILIES`).
        dtype: dtype to compute in; None is the dtype of the model.
        impl: implementation of the ops, see :mod:`sbert_fast.ops`.

    Raises:
        UnsupportedModelError: the model cannot be run packed; the message says why.
        ValueError, ImplementationError: `impl` is unknown, or cannot run here.
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype | None = None, impl: str = "auto"
    ) -> None:
        self.model = model
        self.requested_dtype = dtype
        self.impl = impl
        self._start()
        self.architecture = self.admission().architecture
        head_dim = self.architecture.head_dim
        ops.resolve(self.device, self.compute_dtype, impl, head_dim=head_dim)

    def _start(self) -> None:
        self._admission: Admission | None = None
        self._current: _Current | None = None
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_admission", "_current", "_lock")
        return {name: value for name, value in vars(self).items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.model, self.requested_dtype)

    @property
    def implementation(self) -> str:
        """The implementation of the ops that a forward pass uses now, but for those that
        :mod:`sbert_fast.ops.choices` lists."""
        return ops.resolve(self.device, self.compute_dtype, self.impl)

    def bind(self, op: str) -> ops.Kernel:
        """The kernel of `op` that a forward pass uses now."""
        return ops.bind(op, self.device, self.compute_dtype, self.impl, **self.sizes(op))

    def sizes(self, op: str) -> dict[str, int]:
        """What of the model's sizes decides on the kernel of `op`, as :func:`ops.bind` takes it."""
        architecture = self.architecture
        if op == "varlen_attention":
            return {"head_dim": architecture.head_dim}
        widths = {
            "embed_norm": architecture.embedding_size,
            "bias_gelu": architecture.intermediate_size,
        }
        return {"width": widths.get(op, architecture.hidden_size)}

    def admission(self) -> Admission:
        """What reading the model has shown.

        Raises:
            UnsupportedModelError: the model cannot be run packed; the message says why.
        """
        admission = self._admission
        if admission is None or not admission.is_current():
            admission = self._admission = Admission(self.model)
        if admission.problem is not None:
            raise UnsupportedModelError(admission.problem)
        return admission

    @property
    def admitted(self) -> Admission:
        """The latest :meth:`admission`, not looked at again."""
        return self.admission() if self._admission is None else self._admission

    def refresh(self) -> None:
        """Forget prepared weights: needed after writes that no check sees (`p.data[0, 0] = x`)."""
        with self._lock:
            self._current = None

    def current(self) -> Prepared | None:
        """The prepared weights, where the model is what they were derived from."""
        current = self._current
        if (
            current is not None
            and current.admission is self._admission
            and current.admission.holds_without_tensors()
            and current.fingerprint.is_current()
        ):
            return current.prepared
        return None

    def prepared(self) -> Prepared:
        """The prepared weights of the model as it is now."""
        return self.current() or self._prepared_anew()

    def _prepared_anew(self) -> Prepared:
        with self._lock:
            admission, current = self.admission(), self._current
            if (
                current is None
                or current.admission.identity != admission.identity
                or not current.fingerprint.is_current()
            ):
                self._current = current = None
                self.architecture = admission.architecture
                tensors = [*admission.tensors, *admission.buffers]
                prepared, fingerprint = derive(tensors, lambda: self._prepare(admission.weights))
                current = _Current(admission, fingerprint, prepared)
            self._current = replace(current, admission=admission)
            return current.prepared

    def _prepare(self, weights: models.EncoderWeights) -> Prepared:
        with torch.inference_mode(False), torch.no_grad():
            check_finite(self.model)
            prepared = self._lay_out(weights)
        settle(self.device)
        return prepared

    def _lay_out(self, weights: models.EncoderWeights) -> Prepared:
        architecture, device, dtype = self.architecture, self.device, self.compute_dtype
        target = Target(dtype, device, self.impl)
        gelu = Activation.GELU_TANH if architecture.tanh_gelu else Activation.GELU

        def prepare(*parts: Linear, activation: Activation = Activation.NONE) -> PreparedLinear:
            return prepare_linear(parts, target, activation)

        embeddings = weights.embeddings
        types = embeddings.token_type
        # On a CPU fp32 tables serve every dtype as they are: no copy, no rounding before the sum.
        in_place = device.type == "cpu" and embeddings.word.dtype == torch.float32
        embed, norm_pool = self.bind("embed_norm"), self.bind("norm_pool_out")
        vectors = device.type == "cuda" or embed.implementation == "cuda"

        def table(values: Tensor) -> Tensor:
            values = values.detach() if in_place else values.detach().to(dtype)
            values = values.contiguous()
            return aligned(values) if vectors else values

        return Prepared(
            architecture=architecture,
            dtype=dtype,
            device=device,
            word=table(embeddings.word),
            position=table(embeddings.position),
            token_type=None if types is None else table(types),
            embedding_norm=PreparedNorm.of(embeddings.norm),
            projection=None if embeddings.projection is None else prepare(embeddings.projection),
            layers=tuple(
                PreparedLayer(
                    qkv=prepare(layer.query, layer.key, layer.value),
                    attention_output=prepare(layer.attention_output),
                    attention_norm=PreparedNorm.of(layer.attention_norm),
                    up=prepare(layer.up, activation=gelu),
                    down=prepare(layer.down),
                    output_norm=PreparedNorm.of(layer.output_norm),
                )
                for layer in weights.layers
            ),
            embed=embed,
            attend=self.bind("varlen_attention"),
            pooling=PoolKernels(
                self.bind("segment_pool_out"),
                norm_pool if norm_pool.implementation in FUSING else None,
            ),
        )

    def __call__(self, batch: PackedBatch, prepared: Prepared | None = None) -> Tensor:
        """Last hidden states of a packed batch.

        Args:
            batch: on the device of the model, made by :func:`sbert_fast.packing.pack` with this
                architecture's `position_offset` and `uncounted_id`.
            prepared: result of :meth:`prepared`, where a caller of many batches has it at hand.

        Returns:
            `[T, E]` in :attr:`compute_dtype`, rows in packed order; the dead tail means nothing.
        """
        p = self.prepared() if prepared is None else prepared
        with torch.no_grad():
            return _run_layers(p, p.layers, batch)

    def states(self, batch: PackedBatch, prepared: Prepared) -> Iterator[Tensor]:
        """The states `[T, E]` before and after every layer; arguments as in calling the engine."""
        with torch.no_grad():
            yield from _states(prepared, prepared.layers, batch)

    def unfinished(self, batch: PackedBatch, prepared: Prepared) -> Unfinished:
        """What calling the engine returns, before the last LayerNorm; arguments as there."""
        with torch.no_grad():
            *layers, last = prepared.layers
            x = _attend(prepared, last, batch, _run_layers(prepared, layers, batch))
            return Unfinished(*last.down.without_bias(last.up(x)), x, last.output_norm)


def _embed(p: Prepared, batch: PackedBatch) -> Tensor:
    x = p.embed(
        batch.input_ids,
        batch.position_ids,
        batch.token_type_ids,
        p.word,
        p.position,
        p.token_type,
        p.embedding_norm.weight,
        p.embedding_norm.bias,
        p.embedding_norm.eps,
        p.dtype,
    )
    return x if p.projection is None else p.projection(x)


def _run_layers(p: Prepared, layers: Sequence[PreparedLayer], batch: PackedBatch) -> Tensor:
    """The embeddings, and `layers` over them."""
    (x,) = deque(_states(p, layers, batch), maxlen=1)
    return x


def _states(p: Prepared, layers: Sequence[PreparedLayer], batch: PackedBatch) -> Iterator[Tensor]:
    """The embeddings, and what every one of `layers` makes of what came before it."""
    x = _embed(p, batch)
    yield x
    for layer in layers:
        x = _attend(p, layer, batch, x)
        x = layer.down.add_norm(layer.up(x), x, layer.output_norm)
        yield x


def _attend(p: Prepared, layer: PreparedLayer, batch: PackedBatch, x: Tensor) -> Tensor:
    """The first half of a layer."""
    tokens, heads, dim = x.shape[0], p.architecture.num_heads, p.architecture.head_dim
    attended = p.attend(
        layer.qkv(x).view(tokens, 3, heads, dim),
        batch.cu_seqlens,
        batch.max_seqlen,
        dim**-0.5,
        None,
        -1,
        None,
        None,
        batch.tiles,
    )
    return layer.attention_output.add_norm(attended.view(tokens, -1), x, layer.attention_norm)
