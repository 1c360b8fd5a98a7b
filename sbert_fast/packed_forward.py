"""PackedForward: padded inputs in, padded outputs out, packed in between."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.utils import ModelOutput

from sbert_fast import bypass, forking
from sbert_fast.engine import PackedEncoder, Prepared
from sbert_fast.errors import InvalidWeightsError, UnsupportedModelError
from sbert_fast.packing import PackedBatch, pack_padded, padded_positions
from sbert_fast.transfer import Transfers

logger = logging.getLogger("sbert_fast")

# The key under which calls that ran packed are counted; the other keys are reasons.
PACKED = "packed"
# What the packed path reads, or knows to change nothing in an encoder.
_KNOWN_ARGUMENTS = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "return_dict",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
}


class _UseOriginalError(Exception):
    """The packed path cannot serve a call; the message is the reason that gets counted."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `forward`, ready to run packed; `source` leads back to the padded layout."""

    batch: PackedBatch
    source: NDArray[np.int64]
    shape: tuple[int, int]
    return_dict: bool


class PackedForward:
    """Stands in for the `forward` of one base model, with its signature.

    It runs packed where that gives the same result, and calls the original forward where it would
    not; both are counted. Copies and pickles of the model get one of their own, which serves their
    own weights and counts from zero.

    Args:
        encoder: the packed forward pass of the base model.

    Raises:
        InvalidWeightsError: by a packed call, where weights have come to hold NaN or infinity.
    """

    # See `bypass.is_replaced`.
    stands_for_original = True

    def __init__(self, encoder: PackedEncoder) -> None:
        self.shadowed = "forward" in encoder.model.__dict__
        self.use(encoder)
        self._start()

    def use(self, encoder: PackedEncoder) -> None:
        """Run `encoder`, of the same model, from now on."""
        self.encoder = encoder

    def _start(self) -> None:
        self._lock = forking.Lock()
        self._counts: Counter[str] = Counter()
        self._warned = False
        functools.update_wrapper(self, self.original, updated=())
        self.__signature__ = inspect.signature(self.original)
        # torch.export names the source of what it traces by this.
        self.__code__ = type(self.encoder.model).forward.__code__

    def __getstate__(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "shadowed": self.shadowed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shadowed = state["shadowed"]
        self.use(state["encoder"])
        self._start()

    @property
    def original(self) -> Callable[..., Any]:
        """The forward of the model's class, bound to the model."""
        model = self.encoder.model
        return types.MethodType(type(model).forward, model)

    @property
    def counts(self) -> dict[str, int]:
        """Calls that ran packed under "packed", and calls of the original forward by reason."""
        with self._lock:
            return dict(self._counts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if bypass.is_transformed():
            return self._run_original(*args, **kwargs)
        forking.settle()
        try:
            self._check_modes()
            arguments = self._arguments(args, kwargs)
            prepared = self.encoder.prepared()
            call = self._read(arguments)
        except _UseOriginalError as error:
            self._count(str(error))
        except InvalidWeightsError:
            raise
        except UnsupportedModelError as error:
            # The parameters of torch.func.functional_call are there for this one call.
            if not bypass.holds_plain_tensors(self.encoder.model):
                self._count(f"the model is no longer supported: {error}", logging.WARNING)
        else:
            self._count(PACKED, logging.DEBUG)
            return self._run(call, prepared)
        return self._run_original(*args, **kwargs)

    def _run_original(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        model = self.encoder.model
        return type(model).forward(model, *args, **kwargs)

    def _count(self, outcome: str, level: int = logging.INFO) -> None:
        with self._lock:
            self._counts[outcome] += 1
            first = self._counts[outcome] == 1
        if first:
            logger.log(level, "%s, forward: %s", type(self.encoder.model).__name__, outcome)

    def _check_modes(self) -> None:
        device = self.encoder.device.type
        if device != "cpu" and self.encoder.implementation == "reference":
            raise _UseOriginalError(f"the model is on {device}: no kernels run there")
        if torch.is_autocast_enabled(device):
            raise _UseOriginalError("torch.autocast is on")
        if (reason := bypass.global_reason()) is not None:
            raise _UseOriginalError(reason)
        admission = self.encoder.admission()
        if admission.inside is not None:
            raise _UseOriginalError(admission.inside)
        if admission.drops:
            raise _UseOriginalError("training mode with dropout")
        if torch.is_grad_enabled():
            # The model's own pooler runs as it is, gradients included.
            if admission.records or any(t.requires_grad for t in admission.tensors):
                self._warn_about_gradients()
                raise _UseOriginalError("gradients are recorded")

    def _warn_about_gradients(self) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            logger.warning(
                "%s runs its original forward, because gradients are recorded: call it under "
                "torch.inference_mode() to run it packed",
                type(self.encoder.model).__name__,
            )

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, those checked that the packed path must not ignore."""
        try:
            arguments = self.__signature__.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise _UseOriginalError("arguments that forward does not take") from error
        arguments |= arguments.pop("kwargs", {})
        for name, value in arguments.items():
            if name not in _KNOWN_ARGUMENTS and value is not None:
                raise _UseOriginalError(f"{name} was given")
        for name in ("output_attentions", "output_hidden_states"):
            if arguments.get(name, getattr(self.encoder.model.config, name, False)):
                raise _UseOriginalError(f"{name} was asked for")
        return arguments

    def _read(self, arguments: dict[str, Any]) -> _Call:
        architecture = self.encoder.architecture
        input_ids = arguments.get("input_ids")
        if type(input_ids) is not Tensor or input_ids.dim() != 2 or not input_ids.numel():
            raise _UseOriginalError("input_ids is not a tensor [B, S] with tokens")
        shape = (input_ids.shape[0], input_ids.shape[1])
        ids = _integers("input_ids", input_ids, shape, architecture.vocab_size)
        keep = _kept(arguments.get("attention_mask"), shape)

        offset, uncounted = architecture.position_offset, architecture.uncounted_id
        room = architecture.max_tokens + offset
        positions: NDArray[Any]
        if arguments.get("position_ids") is not None:
            positions = _integers("position_ids", arguments["position_ids"], shape, room)
        else:
            positions = padded_positions(ids, position_offset=offset, uncounted_id=uncounted)
            if positions.max() >= room:
                raise _UseOriginalError("more tokens than the position table has room for")
        types = arguments.get("token_type_ids")
        if architecture.type_vocab_size == 0:
            types = None
        if types is not None:
            types = _integers("token_type_ids", types, shape, architecture.type_vocab_size)

        batch, source = pack_padded(ids, keep, positions, types)
        config_value = getattr(self.encoder.model.config, "return_dict", True)
        return _Call(batch, source, shape, arguments.get("return_dict", config_value) is not False)

    def _run(self, call: _Call, prepared: Prepared) -> Any:  # noqa: ANN401
        model: Any = self.encoder.model
        width = prepared.architecture.hidden_size
        # A tensor made in inference mode could not be saved for the backward pass of a head.
        with torch.inference_mode(False):
            hidden = torch.zeros(*call.shape, width, dtype=model.dtype, device=prepared.device)
        with torch.inference_mode():
            transfers = Transfers(prepared.device)
            with transfers.current_device():
                batch, _ = transfers.stage(call.batch, np.zeros(0, dtype=np.int64))
                x = self.encoder(batch, prepared)[: call.batch.num_tokens]
            source = torch.from_numpy(call.source).to(prepared.device)
            hidden.view(-1, width)[source] = x.to(hidden.dtype)
        output: ModelOutput
        if hasattr(model, "pooler"):
            pooled = None if model.pooler is None else model.pooler(hidden)
            output = BaseModelOutputWithPoolingAndCrossAttentions(hidden, pooled)
        elif "past_key_values" in self.__signature__.parameters:
            output = BaseModelOutputWithPastAndCrossAttentions(hidden)
        else:
            output = BaseModelOutput(hidden)
        return output if call.return_dict else output.to_tuple()


def _integers(name: str, value: object, shape: tuple[int, int], size: int) -> NDArray[np.int64]:
    """`value` as int64 `[B, S]` on the host, inside a table of `size` rows."""
    if (
        type(value) is not Tensor
        or value.dtype not in (torch.int64, torch.int32)
        or value.dim() != 2
        or value.shape[0] not in (1, shape[0])
        or value.shape[1] != shape[1]
    ):
        raise _UseOriginalError(f"{name} is not an integer tensor [B, S]")
    array = value.cpu().numpy().astype(np.int64, copy=False)
    if array.min() < 0 or array.max() >= size:
        raise _UseOriginalError(f"{name} outside a table of {size} rows")
    return np.broadcast_to(array, shape)


def _kept(mask: object, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The tokens that `attention_mask` keeps, bool `[B, S]`."""
    if mask is None:
        return np.ones(shape, dtype=np.bool_)
    if type(mask) is not Tensor or tuple(mask.shape) != shape:
        raise _UseOriginalError("attention_mask is not a tensor [B, S]")
    keep = mask.to(torch.bool).cpu().numpy()
    # Poolers and heads read the state of column 0, masked or not; the packed path has none for it.
    if not keep[:, 0].all():
        raise _UseOriginalError("the first token of a row is masked")
    return keep
