"""Admission: whether a model may run packed, and whether what was read of it still holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sbert_fast import bypass, models
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.fingerprint import Fingerprint
from sbert_fast.models.adapted import skeleton
from sbert_fast.models.base import is_in_pooler
from sbert_fast.state import Snapshot

Reader = Callable[[nn.Module], tuple[models.Architecture, models.EncoderWeights]]


class Admission:
    """Whether a base model may run packed, and what its adapter has read of it.

    It holds as long as no attribute or buffer of the model and no function that it calls has
    changed.

    Args:
        model: the base model.
        read: the adapter; raises UnsupportedModelError.

    Attributes:
        reason: why the engine does not support the model; None where it does.
        adapted: why only passes that record gradients, which call linear layers as they are, may
            run packed; None where all may.
        inside, around: why the modules in the model, or the model itself and its pooler, must
            still be called: they have hooks or forwards of their own. None where they have not.
        drops: the model is in training mode and has dropout.
        drops_elsewhere: some of it is none that the adapter has read.
        weights, identity: of the parameters, see :class:`sbert_fast.models.EncoderWeights`.
        tensors, buffers: the parameters that a packed pass stands for, and the model's buffers.
        records: gradient checkpointing has left a hook, which makes the embeddings require
            gradients wherever these are recorded.
    """

    architecture: models.Architecture
    weights: models.EncoderWeights

    def __init__(self, model: nn.Module, read: Reader = models.read) -> None:
        self._snapshot = Snapshot(model)
        seen = skeleton(model)
        self._originals = models.originals_of(seen)
        self.buffers = list(seen.buffers())
        self._buffers = Fingerprint(self.buffers, ())
        self.tensors = [t for name, t in model.named_parameters() if not is_in_pooler(name)]
        self._kinds = self._read_kinds()
        self.reason: str | None = None
        self.adapted = None if seen is model else _refusal(model, read)
        inner = [m for name, m in seen.named_modules() if name and not is_in_pooler(name)]
        pooler = [m for name, m in seen.named_modules() if is_in_pooler(name)]
        try:
            self.architecture, self.weights = read(seen)
        except UnsupportedModelError as error:
            self.reason = str(error)
            return
        self.identity = (self.architecture, self.weights.identity())
        self.inside, self.around = bypass.reason(inner), bypass.reason([model, *pooler])
        modules, names, known = [*inner, model], self._originals.names, self.weights.dropouts()
        self.drops = bypass.drops(modules, names)
        # What code reads by these names are modules and rates that are known, none in a config.
        called = {n for m in modules for n, child in m.named_children() if child in known}
        others = [module for module in modules if module not in known]
        self.drops_elsewhere = bypass.drops(others, names - called - self.weights.rates())
        self.records = any(map(bypass.records_gradients, inner))

    @property
    def bypassed(self) -> str | None:
        """Why what replaces the whole model and its pooler cannot run now; None if it can."""
        return self.adapted or self.inside or self.around or bypass.global_reason()

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


def _refusal(model: nn.Module, read: Reader) -> str:
    """Why a model with adapted linear layers is not read as it is."""
    try:
        read(model)
    except UnsupportedModelError as error:
        return str(error)
    return "linear layers are adapted"
