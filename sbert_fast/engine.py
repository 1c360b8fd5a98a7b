"""PackedEncoder: prepared weights of a model, and its forward pass over packed batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbert_fast import mapping, models, ops
from sbert_fast.admission import Admission
from sbert_fast.errors import ImplementationError, UnsupportedModelError
from sbert_fast.fingerprint import Fingerprint, derive, settle
from sbert_fast.forking import Lock
from sbert_fast.layers import PoolKernels, Stack, Unfinished
from sbert_fast.linears import LinearChoice, choose, row_alignment
from sbert_fast.models.checks import check_finite
from sbert_fast.norms import PreparedNorm
from sbert_fast.ops.dispatch import FUSING
from sbert_fast.packing import ROW_ALIGNMENT, PackedBatch
from sbert_fast.preparation import (
    embedding_op,
    prepare_projection,
    prepare_stack,
    prepare_table,
    required_ops,
)
from sbert_fast.target import Target, compute_dtype, int8_refusal, takes_high


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a forward pass needs of a model; its rows must be a multiple of `row_alignment`."""

    architecture: models.Architecture
    target: Target
    word: Tensor
    position: Tensor | None
    token_type: Tensor | None
    embedding_norm: PreparedNorm | None
    projection: Callable[[Tensor], Tensor] | None
    scale: Tensor | None
    stack: Stack
    embed: ops.Kernel
    pooling: PoolKernels
    row_alignment: int


@dataclass(frozen=True, slots=True)
class _Current:
    """Prepared weights, and what they were derived from."""

    admission: Admission
    fingerprint: Fingerprint
    prepared: Prepared

    def is_current(self) -> bool:
        return self.prepared.target.holds() and self.fingerprint.is_current()


class PackedEncoder:
    """The packed forward pass of one base model.

    Prepared weights are derived state: built at the first batch, rebuilt when a parameter changed,
    and left behind by `copy.deepcopy` and `pickle`, whose results prepare weights of their own.

    Args:
        model: a base model of a supported family (see :data:`sbert_fast.models.FAMILIES`).
        dtype: dtype to compute in; None is the dtype of the model.
        impl: implementation of the ops, see :mod:`sbert_fast.ops`.
        live: call the model's own linear layers instead of copying their weights: less memory,
            fewer fused operations.
        adapted: take a model with adapted linear layers, too, for passes that record gradients.
        device: where the model will be when it runs; None is where it is.
        low_memory: keep weights that are prepared in another form in pages of files, out of memory.

    Raises:
        UnsupportedModelError: the model cannot be run packed; the message says why.
        ValueError, ImplementationError: `impl` is unknown, or cannot run this model here.
        ValueError: `live` with another `dtype` than that of the weights.
    """

    # What stands before the names of its parameters in the model around it.
    prefix = ""

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        live: bool = False,
        adapted: bool = False,
        device: torch.device | None = None,
        low_memory: bool = False,
    ) -> None:
        self.model = model
        self.requested_dtype = dtype
        self.impl, self.live, self.low_memory = impl, live, low_memory
        self._start()
        self.architecture = self.admission(adapted=adapted).architecture
        self.check(self.device if device is None else device)

    def check(self, device: torch.device) -> str:
        """Refuse a device on which the ops of a forward pass do not run.

        Returns:
            The :attr:`implementation` there.

        Raises:
            ValueError, ImplementationError: as the constructor.
        """
        self._check_live(device)
        if self.requested_dtype == torch.int8 and (reason := int8_refusal(device, self.impl)):
            raise ImplementationError(f"dtype='int8' cannot run: {reason}")
        if self.low_memory and (reason := mapping.refusal(device)):
            raise ImplementationError(f"low_memory=True cannot run: {reason}")
        dtype = compute_dtype(self.model, self.requested_dtype, device)
        implementation = ops.resolve(device, dtype, self.impl)
        for op, how in self.required_ops():
            ops.bind(op, device, dtype, self.impl, **how)
        return implementation

    def _check_live(self, device: torch.device) -> None:
        weights, requested = next(self.model.parameters()).dtype, self.requested_dtype
        dtype = compute_dtype(self.model, requested, device)
        if self.live and (dtype != weights or requested == torch.int8):
            why = "" if requested else f", the default for {weights} on a CPU"
            raise ValueError(f"dtype must be {weights}, that of live weights, got {dtype}{why}")

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
        return compute_dtype(self.model, self.requested_dtype, self.device)

    @property
    def implementation(self) -> str:
        """What runs the ops now, but for those that :mod:`sbert_fast.ops.choices` lists."""
        return ops.resolve(self.device, self.compute_dtype, self.impl)

    def bind(self, op: str) -> ops.Kernel:
        """The kernel of `op` that a forward pass uses now, for the last kind of it."""
        how = dict(self.required_ops())[op]
        return ops.bind(op, self.device, self.compute_dtype, self.impl, **how)

    def required_ops(self) -> list[tuple[str, dict[str, Any]]]:
        """The ops that a forward pass runs, and what it asks of them, as :func:`ops.bind` takes it.

        An op comes once for every kind of it; linear layers are in :meth:`linears`.
        """
        weights = self.admitted.weights
        width, found = weights.layers[0].attention.output.weight.shape[0], []
        last = weights.final_norm or weights.layers[-1].feed_forward_norm
        for each in (
            embedding_op(weights.embeddings),
            *required_ops(weights),
            ("norm_pool_out", {"width": width, "options": {"rms": last.rms}}),
            ("segment_pool_out", {"width": width}),
        ):
            if each not in found:
                found.append(each)
        return found

    def _target(self) -> Target:
        dtype, device, int8 = self.compute_dtype, self.device, self.requested_dtype == torch.int8
        return Target(dtype, device, self.impl, self.live, int8, takes_high(dtype, device))

    def linears(self) -> list[LinearChoice]:
        """The kernels of the linear layers of a forward pass: each choice once."""
        target = self._target()
        sizes = dict.fromkeys(part.weight.shape[1] for part in self.admitted.weights.linears())
        choices: list[LinearChoice] = []
        for inputs in sizes:
            if (choice := choose(target, inputs)) not in choices:
                choices.append(choice)
        return choices

    def admission(self, *, adapted: bool = False) -> Admission:
        """What reading the model has shown; `adapted` as for the constructor.

        Raises:
            UnsupportedModelError: the model cannot be run packed; the message says why.
        """
        admission = self._admission
        if admission is None or not admission.is_current():
            admission = self._admission = self._admit()
        if reason := admission.reason or (None if adapted else admission.adapted):
            raise UnsupportedModelError(reason)
        return admission

    def _admit(self) -> Admission:
        return Admission(self.model)

    @property
    def admitted(self) -> Admission:
        """The latest :meth:`admission`, not looked at again; one that was refused is."""
        known = self._admission
        return self.admission() if known is None or known.reason is not None else known

    def refresh(self) -> None:
        """Forget prepared weights: needed after writes that no check sees (`p.data[0, 0] = x`)."""
        with self._lock:
            self._current = None

    def current(self, admission: Admission | None = None) -> Prepared | None:
        """The prepared weights, if the model is what they were derived from.

        Args:
            admission: one that the caller has just been given; it is not compared again.
        """
        current = self._current
        if (
            current is not None
            and current.admission is self._admission
            and (current.admission is admission or current.admission.holds_without_tensors())
            and current.is_current()
        ):
            return current.prepared
        return None

    def prepared(self, admission: Admission | None = None) -> Prepared:
        """The prepared weights of the model as it is now; `admission` as for :meth:`current`."""
        return self.current(admission) or self._prepared_anew()

    def _prepared_anew(self) -> Prepared:
        with self._lock:
            admission, current = self.admission(), self._current
            self._check_live(self.device)
            tensors = [*admission.tensors, *admission.buffers]
            if (
                current is None
                or current.admission.identity != admission.identity
                or not (current.fingerprint.is_of(tensors) and current.is_current())
            ):
                self._current = current = None
                if self.low_memory and mapping.map_weights(self.model.parameters()):
                    admission = self._admission = self._admit()
                self.architecture, weights = admission.architecture, admission.weights
                make, tables = partial(self._prepare, weights), weights.tabulated()
                prepared, fingerprint = derive(tensors, make, tables, self.low_memory)
                current = _Current(admission, fingerprint, prepared)
            self._current = replace(current, admission=admission)
            return current.prepared

    def _prepare(self, weights: models.EncoderWeights) -> Prepared:
        with torch.inference_mode(False), torch.no_grad():
            check_finite(self.model, self.prefix)
            prepared = self._lay_out(weights)
        settle(self.device)
        return prepared

    def _lay_out(self, weights: models.EncoderWeights) -> Prepared:
        target, embeddings = self._target(), weights.embeddings
        norm, scale = embeddings.norm, embeddings.scale
        embed, norm_pool = self.bind("embed_norm"), self.bind("norm_pool_out")

        def table(values: Tensor | None) -> Tensor | None:
            return None if values is None else prepare_table(values, target, embed)

        return Prepared(
            architecture=self.architecture,
            target=target,
            word=prepare_table(embeddings.word, target, embed),
            position=table(embeddings.position),
            token_type=table(embeddings.token_type),
            embedding_norm=None if norm is None else PreparedNorm.of(norm),
            projection=prepare_projection(embeddings, target),
            scale=None if scale is None else scale.detach().to(target.dtype),
            stack=prepare_stack(weights, target),
            embed=embed,
            pooling=PoolKernels(
                self.bind("segment_pool_out"),
                norm_pool if norm_pool.implementation in FUSING else None,
            ),
            row_alignment=row_alignment(self.linears()),
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
        (x,) = deque(self.states(batch, p), maxlen=1)
        return x

    def states(
        self, batch: PackedBatch, prepared: Prepared, kept: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The states `[T, E]` before and after every layer; of the last, only the rows `kept`."""
        with torch.no_grad():
            yield from prepared.stack.states(_embed(prepared, batch), batch, kept)

    def single_states(self, batch: PackedBatch, prepared: Prepared, rows: Tensor) -> Tensor:
        """The last states of some tokens, `rows` of `[T]`: `[B, E]` padded to 16 rows."""
        kept = F.pad(rows, (0, -rows.shape[0] % ROW_ALIGNMENT))
        (x,) = deque(self.states(batch, prepared, kept), maxlen=1)
        return x

    def unfinished(self, batch: PackedBatch, prepared: Prepared) -> Unfinished:
        """What calling the engine returns, before the last norm; arguments as there."""
        with torch.no_grad():
            return prepared.stack.unfinished(_embed(prepared, batch), batch)


def _embed(p: Prepared, batch: PackedBatch) -> Tensor:
    norm = p.embedding_norm
    x: Tensor = p.embed(
        batch.input_ids,
        None if p.position is None else batch.position_ids,
        None if p.token_type is None else batch.token_type_ids,
        p.word,
        p.position,
        p.token_type,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        0.0 if norm is None else norm.eps,
        p.target.dtype,
    )
    if p.scale is not None:
        x.mul_(p.scale)
    return x if p.projection is None else p.projection(x)
