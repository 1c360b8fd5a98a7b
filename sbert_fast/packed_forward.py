"""PackedForward: padded inputs in, padded outputs out, packed in between."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.utils import ModelOutput

from sbert_fast import bypass, forking, padded_call, training
from sbert_fast.admission import Admission
from sbert_fast.engine import PackedEncoder, Prepared
from sbert_fast.errors import InvalidWeightsError, UnsupportedModelError
from sbert_fast.models.base import pool
from sbert_fast.norms import aligned
from sbert_fast.packing import PackedBatch
from sbert_fast.padded_call import UseOriginalError as _UseOriginalError
from sbert_fast.transfer import Transfers

logger = logging.getLogger("sbert_fast")

# The key under which calls that ran packed are counted; the other keys are reasons.
PACKED = "packed"
_DROPS = "training mode with dropout"


class StandIn:
    """Stands in for the `forward` of one model, with its signature.

    Attributes:
        model: that model.
        shadowed: whether it had a `forward` of its own, which was that of its class.
    """

    # See `bypass.is_replaced`.
    stands_for_original = True
    model: Any
    shadowed: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        raise NotImplementedError

    def _look_like_original(self) -> None:
        functools.update_wrapper(self, self.original, updated=())
        self.__signature__ = inspect.signature(self.original)
        # torch.export names the source of what it traces by this.
        self.__code__ = type(self.model).forward.__code__

    @property
    def original(self) -> Callable[..., Any]:
        """The forward of the model's class, bound to the model."""
        return types.MethodType(type(self.model).forward, self.model)

    def _run_original(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        # torch.compile traces this, but not the making of a bound method.
        return type(self.model).forward(self.model, *args, **kwargs)

    @property
    def counts(self) -> dict[str, int]:
        """How calls ran."""
        return {}


class PackedForward(StandIn):
    """Stands in for the `forward` of one base model.

    It runs packed where that gives the same result, and calls the original forward where it would
    not; both are counted. Copies and pickles of the model get one of their own, which serves their
    own weights and counts from zero.

    Args:
        engine: the packed forward pass of the base model.
        padding: see :func:`sbert_fast.accelerate`.

    Attributes:
        observer: called with what each call is counted under; copies and pickles have none.

    Raises:
        InvalidWeightsError: by a packed call, where weights have come to hold NaN or infinity.
    """

    def __init__(self, engine: PackedEncoder, padding: str) -> None:
        self.shadowed = "forward" in engine.model.__dict__
        self.use(engine, padding)
        self._start()

    @property
    def model(self) -> Any:  # type: ignore[override]  # noqa: ANN401
        return self.engine.model

    def use(self, engine: PackedEncoder, padding: str) -> None:
        """Run `engine`, of the same model, from now on."""
        self.engine, self.padding = engine, padding

    def _start(self) -> None:
        self._lock = forking.Lock()
        self._counts: Counter[str] = Counter()
        self.observer: Callable[[str], None] | None = None
        self._look_like_original()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("engine", "padding", "shadowed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shadowed = state["shadowed"]
        self.use(state["engine"], state["padding"])
        self._start()

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
            admission = self._check_modes()
            arguments = self._arguments(args, kwargs)
            prepared = None if _records(admission) else self.engine.prepared(admission)
            call = self._read(arguments)
            if prepared is None:
                self._check_recorded(call)
        except _UseOriginalError as error:
            self._count(str(error))
        except InvalidWeightsError:
            raise
        except UnsupportedModelError as error:
            # The parameters of torch.func.functional_call are there for this one call.
            if not bypass.holds_plain_tensors(self.engine.model):
                self._count(f"the model is no longer supported: {error}", logging.WARNING)
        else:
            self._count(PACKED, logging.DEBUG)
            return self._run(call, prepared)
        if padded_call.is_flat(kwargs):
            return self._run_padded(kwargs)
        return self._run_original(*args, **kwargs)

    def _run_padded(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        """The original, of texts that came without padding."""
        padding_id = getattr(self.model.config, "pad_token_id", None)
        arguments = padded_call.padded(arguments, padding_id or 0)
        output = self._run_original(**arguments | {"return_dict": True})
        kept = arguments["attention_mask"].bool()
        output["last_hidden_state"] = output["last_hidden_state"][kept][None]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(x[kept][None] for x in output["hidden_states"])
        return output

    def _count(self, outcome: str, level: int = logging.INFO) -> None:
        with self._lock:
            self._counts[outcome] += 1
            first = self._counts[outcome] == 1
        if self.observer is not None:
            self.observer(outcome)
        if first:
            logger.log(level, "%s, forward: %s", type(self.engine.model).__name__, outcome)

    def refusal(self, *, recorded: bool = False) -> str | None:
        """Why every call runs the original forward now, whatever it asks for; None where that
        depends on the call.

        Args:
            recorded: of calls where gradients are recorded, if anything in the model has any.

        Raises:
            UnsupportedModelError: the model is no longer supported; the message says why.
        """
        device = self.engine.device.type
        if device != "cpu" and self.engine.implementation == "reference":
            return f"the model is on {device}: no kernels run there"
        if torch.is_autocast_enabled(device) and not recorded:
            return "torch.autocast is on"
        if (reason := bypass.global_reason()) is not None:
            return reason
        admission = self.engine.admission(adapted=recorded)
        if recorded and not _records(admission):
            return self.refusal()
        if admission.inside is not None:
            return admission.inside
        if admission.drops_elsewhere or (admission.drops and not recorded):
            return _DROPS
        if recorded and (reason := training.refusal(self.engine)) is not None:
            reason = f"gradients are recorded: {reason}"
            _warn_about_gradients(type(self.engine.model).__name__, reason)
            return reason
        return None

    def _check_modes(self) -> Admission:
        if (reason := self.refusal(recorded=torch.is_grad_enabled())) is not None:
            raise _UseOriginalError(reason)
        return self.engine.admitted

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, those checked that the packed path must not ignore."""
        try:
            arguments = self.__signature__.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise _UseOriginalError("arguments that forward does not take") from error
        arguments |= arguments.pop("kwargs", {})
        padded_call.check_arguments(arguments)
        return arguments

    def _read(self, arguments: dict[str, Any]) -> padded_call.PaddedCall:
        return padded_call.read(self.engine, arguments, self.padding)

    def _check_recorded(self, call: padded_call.PaddedCall) -> None:
        how = call.embeddings, call.states is not None
        if (reason := training.refusal_of_call(self.engine, *how)) is not None:
            raise _UseOriginalError(f"gradients are recorded: {reason}")

    def _states(
        self, call: padded_call.PaddedCall, batch: PackedBatch, prepared: Prepared | None
    ) -> Iterator[Tensor]:
        if prepared is None:
            return training.states(self.engine, batch, call.embeddings)
        if call.embeddings is not None:
            table = aligned(call.embeddings.to(prepared.word.dtype).contiguous())
            prepared = replace(prepared, word=table, scale=None)
        return self.engine.states(batch, prepared)

    def _run(self, call: padded_call.PaddedCall, prepared: Prepared | None) -> Any:  # noqa: ANN401
        """Run a call; its gradients are recorded where there is nothing `prepared`."""
        model, device = self.engine.model, self.engine.device
        with nullcontext() if prepared is None else torch.inference_mode():
            transfers = Transfers(device)
            with transfers.current_device():
                batch, _ = transfers.stage(call.batch, np.zeros(0, dtype=np.int64))
                source = None
                if call.source is not None:
                    source = torch.from_numpy(call.source).to(device)
                states: list[Tensor | None] = []
                for number, x in enumerate(self._states(call, batch, prepared)):
                    asked = call.states is not None and number in call.states
                    states.append(self._padded(x, call, source) if asked else None)
                hidden = self._padded(x, call, source) if states[-1] is None else states[-1]
        output: ModelOutput
        decodes = "past_key_values" in self.__signature__.parameters
        if hasattr(model, "pooler"):
            kind = BaseModelOutputWithPooling
            if decodes:
                kind = BaseModelOutputWithPoolingAndCrossAttentions
            first = hidden if source is not None else hidden[0, batch.first_rows(), None]
            output = kind(hidden, pool(model, first))
        elif self.engine.admitted.architecture.is_decoder:
            output = BaseModelOutputWithPast(hidden)
        elif decodes:
            output = BaseModelOutputWithPastAndCrossAttentions(hidden)
        else:
            output = BaseModelOutput(hidden)
        if call.states is not None:
            output["hidden_states"] = tuple(states)
        return output if call.return_dict else output.to_tuple()

    def _padded(self, x: Tensor, call: padded_call.PaddedCall, source: Tensor | None) -> Tensor:
        """Packed states `[T, E]` where they belong in `[B, S, E]`, zeros everywhere else."""
        # Under autocast, training gives states of the dtype that the original gives.
        model: Any = self.engine.model
        dtype = x.dtype if torch.is_grad_enabled() else model.dtype
        if source is None:
            flat = x[None, : call.batch.num_tokens].to(dtype)
            with torch.inference_mode(False):
                return flat.clone() if flat.is_inference() else flat
        # A tensor made in inference mode could not be saved for the backward pass of a head.
        with torch.inference_mode(False):
            hidden = torch.zeros(*call.shape, x.shape[1], dtype=dtype, device=x.device)
        hidden.view(-1, x.shape[1])[source] = x[: call.batch.num_tokens].to(hidden.dtype)
        return hidden


def _records(admission: Admission) -> bool:
    """Whether a call records gradients; the model's own pooler, which runs as it is, aside."""
    return torch.is_grad_enabled() and (
        admission.records or any(t.requires_grad for t in admission.tensors)
    )


@functools.cache
def _warn_about_gradients(name: str, reason: str) -> None:
    """Once a process, class and reason: programs make many copies of a model."""
    logger.warning(
        "%s runs its original forward, because %s: call it under torch.inference_mode() to run it "
        "packed",
        name,
        reason,
    )
