"""From the modules of a SentenceTransformer to the pipeline that runs them packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import nn
from transformers import BatchEncoding

from sbert_fast import bypass, ops
from sbert_fast.admission import Admission
from sbert_fast.classification import ClassificationHead
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import InvalidWeightsError, UnsupportedModelError
from sbert_fast.generation import ChatTokenizer, LogitHead
from sbert_fast.heads import Head
from sbert_fast.inference import Pipeline
from sbert_fast.originals import SYNTAX, originals
from sbert_fast.pairs import PairTokenizer
from sbert_fast.pooling import PoolingHead, is_module, mean_of_tokens, read_pooling
from sbert_fast.routes import modules_off, modules_on
from sbert_fast.state import Snapshot
from sbert_fast.static import StaticEncoder, StaticTokenizer
from sbert_fast.tokenization import TextTokenizer
from sbert_fast.transformer_module import (
    EMBEDDING,
    GENERATING,
    KNOWN,
    SCORING,
    check_transformer,
    formats,
    max_length,
)

DEVICES = ("cpu", "cuda")
# The methods that encoding calls.
_ROOTS = (*SYNTAX, "encode", "forward", "predict")
# The dtype to compute in, or None for the dtype of the model; and the device to compute on.
Where = tuple[torch.dtype | None, torch.device]


class How(TypedDict):
    """Arguments of an engine: see :class:`PackedEncoder`."""

    impl: str
    low_memory: bool


def build_pipeline(
    model: SentenceTransformer,
    route: str | None,
    where: Where,
    how: How,
    known: Sequence[PackedEncoder],
) -> Pipeline:
    """The packed pipeline of a SentenceTransformer or a CrossEncoder.

    Args:
        model: what to run; its parameters are read, never copied into it.
        route: what to run of it, see :mod:`sbert_fast.routes`.
        where: the dtype and the device to run it in; the model may still be elsewhere.
        how: how the engine runs it.
        known: engines so far; one that still serves is kept.

    Raises:
        UnsupportedModelError: with the reason.
        ValueError: `max_seq_length` is not a length, is beyond the position table, or leaves no
            room for the special tokens of a text.
        ImplementationError: it cannot run there as asked.
    """
    dtype, device = where
    scores = isinstance(model, CrossEncoder)
    names = ("Transformer",) if scores else ("Transformer", "StaticEmbedding")
    after = modules_on(model, route)
    first = _first_of(after, names)
    if model.get_backend() != "torch":
        raise UnsupportedModelError(f"backend must be 'torch', got {model.get_backend()!r}")
    _check_placement(model)
    if device.type not in DEVICES:
        raise UnsupportedModelError(
            f"the model is on {device}: there are kernels for {' and '.join(DEVICES)}"
        )
    is_static, task = is_module(first, "StaticEmbedding"), ""
    if not is_static:
        task = check_transformer(first, SCORING if scores else [EMBEDDING])
    base, kind = base_model(first), StaticEncoder if is_static else PackedEncoder
    serving = (e for e in known if e.model is base and e.requested_dtype == dtype)
    engine = next(serving, None) or kind(base, dtype=dtype, device=device, **how)
    admission = engine.admission()
    implementation = engine.check(device)
    tokenizer: TextTokenizer
    head: Head
    if is_static:
        tokenizer = StaticTokenizer(first.tokenizer)
        head = PoolingHead(mean_of_tokens(after, admission.architecture.hidden_size))
    else:
        tokenizer, head = _around(model, first, after, task, admission)
    if device.type != "cpu" and how["impl"] == "auto" and implementation == "reference":
        raise UnsupportedModelError(f"no kernels run on {device}:\n{ops.explain_ops()}")
    return Pipeline(first, tokenizer, engine, head)


def _around(
    model: SentenceTransformer,
    transformer: Any,  # noqa: ANN401
    after: dict[str, nn.Module],
    task: str,
    admission: Admission,
) -> tuple[TextTokenizer, Head]:
    """What comes before and after the base model of a Transformer module."""
    architecture, scores = admission.architecture, isinstance(model, CrossEncoder)
    head: Head
    if task == EMBEDDING:
        head = PoolingHead(read_pooling(after, architecture.hidden_size))
    elif task in GENERATING:
        head = LogitHead(transformer.auto_model, after)
    else:
        head = ClassificationHead(transformer.auto_model, after, transformer.tokenizer.pad_token_id)
    has_table = admission.weights.embeddings.position is not None
    side = transformer.tokenizer.padding_side
    if side not in head.padding_sides or (side == "left" and has_table):
        raise UnsupportedModelError(f"the tokenizer pads on the {side}")
    length = max_length(transformer, architecture.max_tokens, has_table, pair=scores)
    if formats(transformer):
        return ChatTokenizer(model, length), head
    return (PairTokenizer if scores else TextTokenizer)(transformer.tokenizer, length), head


def _first_of(modules: dict[str, nn.Module], names: Sequence[str]) -> Any:  # noqa: ANN401
    """Take away the first of `modules`; it is refused if it is none of `names`."""
    first: Any = modules.pop(next(iter(modules), ""), None)
    if not any(is_module(first, name) for name in names):
        found = "nothing" if first is None else type(first).__name__
        raise UnsupportedModelError(f"the first module must be {' or '.join(names)}, got {found}")
    return first


def base_model(first: Any) -> Any:  # noqa: ANN401
    """What the first module of a model computes with: the base model in a Transformer, which may
    have a head on it, or the table in a StaticEmbedding; None if there is no such thing."""
    if is_module(first, "StaticEmbedding"):
        return first._modules.get("embedding")
    model = getattr(first, "auto_model", None)
    return getattr(model, "base_model", model)


def _check_placement(model: SentenceTransformer) -> None:
    """Refuse models whose parts are on several devices, or reach their device only to run."""
    hook = getattr(model, "_accelerate_placement_hook", None)
    devices = {str(parameter.device) for parameter in model.parameters()}
    if hook is not None or (
        getattr(model, "_placement_is_delegated", False) and devices != {str(model.device)}
    ):
        raise UnsupportedModelError(
            f"a device_map or Accelerate hooks control placement, on {', '.join(sorted(devices))}"
        )


def _check_own(part: Any, names: Set[str]) -> None:
    """Refuse a module or tokenizer that does more than its class, or something else.

    Args:
        part: a module, a tokenizer, or something that belongs to one.
        names: what the code of all of them mentions.
    """
    reason = bypass.reason([part], in_any_dtype=True) if isinstance(part, nn.Module) else None
    kind = type(part)
    for name in vars(part).keys() & names:
        replaced = bypass.is_replaced(part, name, in_any_dtype=True)
        if callable(getattr(kind, name, None)) and replaced:
            reason = f"{name} of {kind.__name__} was replaced on an instance"
    if is_module(part, "Transformer"):
        for name, value in vars(part).items():
            if name in names - KNOWN and value and not callable(getattr(kind, name, None)):
                reason = f"the Transformer module sets {name.lstrip('_')}"
    if reason is not None:
        raise UnsupportedModelError(reason)


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why sentence-transformers runs a model or a call.

    Attributes:
        reason: for the user to read.
        counts: whether such calls are counted and reported.
    """

    reason: str
    counts: bool = True


class Assembly:
    """What runs `encode` for the modules of a model, as they were when this was made.

    Args:
        model: what to run.
        route: what to run of it, see :mod:`sbert_fast.routes`.
        where: the dtype and the device to run it in; the model may still be elsewhere.
        how: how the engine runs it.
        old: assemblies so far, whose engines are kept if they still serve.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        route: str | None,
        where: Where,
        how: How,
        old: Iterable[Assembly],
    ) -> None:
        base = base_model(next(iter(modules_on(model, route).values()), None))
        self._model, self._route, self._where = model, route, where
        # The engine watches the base model, if there is one; other routes are watched by others.
        self._snapshot = Snapshot(model, without=[base, *modules_off(model, route)])
        self._originals = originals({*map(type, self._snapshot.objects), BatchEncoding}, _ROOTS)
        self._found = self._build(model, how, [found for each in old for found in each._engines()])
        if isinstance(self._found, Unsupported):
            self._snapshot = Snapshot(model)
            self._originals = originals({*map(type, self._snapshot.objects), BatchEncoding}, _ROOTS)

    def _engines(self) -> list[PackedEncoder]:
        return [self._found.engine] if isinstance(self._found, Pipeline) else []

    def _build(
        self, model: SentenceTransformer, how: How, known: Sequence[PackedEncoder]
    ) -> Pipeline | Unsupported:
        try:
            for part in self._snapshot.objects:
                _check_own(part, self._originals.names)
            pipeline = build_pipeline(model, self._route, self._where, how, known)
        except InvalidWeightsError:
            raise
        except UnsupportedModelError as error:
            return Unsupported(str(error))
        reason = self._originals.reason
        return pipeline if reason is None else Unsupported(reason)

    def prepare(
        self, model: SentenceTransformer, where: Callable[[], Where]
    ) -> Pipeline | Unsupported | None:
        """What runs a model; None if the assembly is outdated, or of another one.

        Args:
            model: a shallow copy shares the assembly of the model that was copied.
            where: gives the dtype to run in now, and the device. It is called only if weights have
                changed: unchanged weights are where they were.
        """
        is_current = self._snapshot.is_current() and self._originals.is_current()
        if not is_current or self._model is not model:
            return None
        found = self._found
        prepared = found.engine.current() if isinstance(found, Pipeline) else None
        if prepared is None and where() != self._where:
            return None
        if isinstance(found, Unsupported):
            return found
        try:
            if prepared is None:
                admission = found.engine.admission()
                if admission.inside is not None or admission.around is not None:
                    return found  # the model itself will run: no part of it need be valid
                prepared = found.engine.prepared()
            return found.prepare(prepared)
        except InvalidWeightsError:
            raise
        except UnsupportedModelError as error:
            return Unsupported(str(error))
