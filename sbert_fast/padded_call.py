"""What a call of a base model's forward asks for, read on the host; refused where not ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import output_capturing

from sbert_fast import bypass
from sbert_fast.callers import (
    answers_questions,
    callers_of,
    reader_of_padding,
    reads_first_column,
)
from sbert_fast.engine import PackedEncoder
from sbert_fast.packing import PackedBatch, pack, pack_padded, padded_positions

# What the packed path reads, or knows to change nothing in an encoder.
_KNOWN_ARGUMENTS = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "return_dict",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
}
# What heads hand down with their keywords. A base model hands keywords on to its attention
# functions, and none of those reads these.
_LOSS_ARGUMENTS = {
    "ignore_index",
    "labels",
    "num_items_in_batch",
    "output_router_logits",
    "shift_labels",
}
# Where texts begin that come without padding, as transformers names it.
CU_SEQLENS = "cu_seq_lens_q"
# Of models without a table of positions: positions beyond the length of a text take memory, too.
_MOST_POSITIONS = 1 << 17


class UseOriginalError(Exception):
    """The packed path cannot serve a call; the message is the reason that gets counted."""


@dataclass(frozen=True, slots=True)
class PaddedCall:
    """One call of `forward`, ready to run packed.

    Attributes:
        batch: its tokens.
        source: int64 `[num_tokens]`, where each of them is in `[B * S]`; None where they came
            without padding, one text after the other.
        shape: `(B, S)`; `(1, num_tokens)` without padding.
        embeddings: `[B * S, E]`, the table that `batch.input_ids` point into; None where they are
            ids.
        states: which of the states before and after every layer are asked for besides the last
            one, by number; None where none are.
        return_dict: whether a ModelOutput is.
    """

    batch: PackedBatch
    source: NDArray[np.int64] | None
    shape: tuple[int, int]
    embeddings: Tensor | None
    states: Container[int] | None
    return_dict: bool


def is_flat(arguments: Mapping[str, Any]) -> bool:
    """Whether texts come without padding: ids `[T]`, and `cu_seq_lens_q` `[B + 1]` between them.

    No model of transformers takes that: for flash attention, ids are `[1, T]`.
    """
    ids = arguments.get("input_ids")
    return CU_SEQLENS in arguments and isinstance(ids, Tensor) and ids.dim() == 1


def padded(arguments: Mapping[str, Any], padding_id: int) -> dict[str, Any]:
    """The same arguments, or features, with padding: `[B, S]`, and an `attention_mask`.

    Raises:
        ValueError: `cu_seq_lens_q` does not cut the ids into texts.
    """
    lengths = np.diff(_offsets(arguments)).tolist()
    rest = {name: value for name, value in arguments.items() if name != CU_SEQLENS}
    fill = {"input_ids": padding_id, "token_type_ids": 0}
    for name in fill.keys() & rest.keys():
        parts = rest[name].split(lengths)
        rest[name] = pad_sequence(parts, batch_first=True, padding_value=fill[name])
    ones = [torch.ones(length, dtype=torch.int64) for length in lengths]
    mask = pad_sequence(ones, batch_first=True).to(rest["input_ids"].device)
    return rest | {"attention_mask": mask}


def _offsets(arguments: Mapping[str, Any]) -> NDArray[np.int64]:
    """Where texts begin and end, int64 `[B + 1]`."""
    cu_seqlens, tokens = arguments[CU_SEQLENS], arguments["input_ids"].shape[0]
    offsets: NDArray[np.int64] = np.asarray(torch.as_tensor(cu_seqlens).cpu(), dtype=np.int64)
    if offsets.ndim != 1 or offsets.size < 2 or (offsets[0], offsets[-1]) != (0, tokens):
        raise ValueError(f"{CU_SEQLENS} must lead from 0 to {tokens}, the ids, got {cu_seqlens}")
    if np.diff(offsets).min() < 1:
        raise ValueError(f"{CU_SEQLENS} must rise, no text being empty, got {cu_seqlens}")
    return offsets


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse the arguments, by name, that the packed path must not ignore."""
    known = _KNOWN_ARGUMENTS | _LOSS_ARGUMENTS
    if is_flat(arguments):
        known = known - {"attention_mask", "position_ids"} | {CU_SEQLENS}
    for name, value in arguments.items():
        if name not in known and value is not None:
            raise UseOriginalError(f"{name} was given")


def read(engine: PackedEncoder, arguments: dict[str, Any], padding: str) -> PaddedCall:
    """Read a call of the base model of `engine`.

    Args:
        engine: the packed forward pass of the base model.
        arguments: those of the call by name, checked.
        padding: see :func:`sbert_fast.accelerate`.

    Raises:
        UseOriginalError: the packed path would not give what the base model gives.
        ValueError: texts come without padding, to a head of transformers.
    """
    architecture, config = engine.admitted.architecture, getattr(engine.model, "config", None)
    if _asked(engine.model, arguments, "output_attentions"):
        raise UseOriginalError("output_attentions was asked for")
    if architecture.is_decoder:
        _check_decoder(arguments, config)
    states = _asked(engine.model, arguments, "output_hidden_states")
    return_dict = _asked(engine.model, arguments, "return_dict") is not False
    if is_flat(arguments):
        for caller in callers_of(engine.model):
            if hasattr(caller.module, "base_model_prefix"):
                name = type(caller.module).__name__
                raise ValueError(f"{name} reads padded texts, got {CU_SEQLENS}")
        batch = _flat_batch(engine, arguments)
        asked = None, _states(engine.model, states), return_dict
        return PaddedCall(batch, None, (1, batch.num_tokens), *asked)
    ids, embeddings = _tokens(engine, arguments)
    shape = (ids.shape[0], ids.shape[1])
    weights, mask = engine.admitted.weights, arguments.get("attention_mask")
    keep = _kept(mask, shape, multiplies=weights.embeddings.masked)
    if not keep.all():
        _check_padding(engine.model, keep, ids, embeddings, padding)
        if weights.measures_distances and _has_gaps(keep):
            raise UseOriginalError("attention_mask has gaps, and the model measures distances")

    offset = architecture.position_offset
    # No family knows which of the embeddings it is given are padding.
    uncounted = architecture.uncounted_id if embeddings is None else None
    room = architecture.max_tokens + offset
    positions: NDArray[Any]
    if arguments.get("position_ids") is not None:
        if weights.embeddings.position is None:
            room = min(room, max(_MOST_POSITIONS, shape[1]))
        positions = _integers("position_ids", arguments["position_ids"], shape, room)
    else:
        positions = padded_positions(ids, position_offset=offset, uncounted_id=uncounted)
        if positions.max() >= room:
            raise UseOriginalError("more tokens than the position table has room for")
    types = arguments.get("token_type_ids")
    if architecture.type_vocab_size == 0:
        types = None
    if types is not None:
        types = _integers("token_type_ids", types, shape, architecture.type_vocab_size)
    batch, source = pack_padded(ids, keep, positions, types)
    return PaddedCall(batch, source, shape, embeddings, _states(engine.model, states), return_dict)


def _flat_batch(engine: PackedEncoder, arguments: dict[str, Any]) -> PackedBatch:
    """Texts that came without padding."""
    architecture, offsets = engine.admitted.architecture, _offsets(arguments)
    ids, _ = _tokens(engine, arguments | {"input_ids": arguments["input_ids"][None]})
    if np.diff(offsets).max() > architecture.max_tokens:
        raise UseOriginalError("more tokens than the position table has room for")
    types = arguments.get("token_type_ids")
    if types is not None and architecture.type_vocab_size > 0:
        kinds = architecture.type_vocab_size
        types = _integers("token_type_ids", types[None], (1, ids.shape[1]), kinds)[0].astype(
            np.int32
        )
    else:
        types = None
    return pack(
        ids[0].astype(np.int32),
        offsets,
        np.arange(offsets.size - 1),
        token_types=types,
        position_offset=architecture.position_offset,
        uncounted_id=architecture.uncounted_id,
    )


def _asked(model: nn.Module, arguments: dict[str, Any], name: str) -> Any:  # noqa: ANN401
    """What a call asks for by an argument, or the config where it says nothing.

    None says nothing to a forward that has the argument, and is a value to one with keywords alone.
    """
    value = arguments.get(name)
    if value is not None or (name in arguments and name not in _named(type(model).forward)):
        return value
    return getattr(getattr(model, "config", None), name, name == "return_dict")


@cache
def _named(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(signature(forward).parameters)


def _check_decoder(arguments: dict[str, Any], config: Any) -> None:  # noqa: ANN401
    cache = arguments.get("use_cache")
    if getattr(config, "use_cache", False) if cache is None else cache:
        raise UseOriginalError("use_cache was asked for")
    # Where there is no mask, transformers cuts rows into the texts that positions show.
    if arguments.get("position_ids") is not None and arguments.get("attention_mask") is None:
        raise UseOriginalError("position_ids were given without attention_mask")


def _states(model: nn.Module, asked: Any) -> Container[int] | None:  # noqa: ANN401
    """The states that `output_hidden_states` asks for, by number; None where it asks for none."""
    if not asked:
        return None
    # Installed once, at the first call that asks; what has come or gone since then stays so.
    expected = int(getattr(model, "_output_capturing_hooks_installed", False))
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    if any(bypass.collects_states(layer) != expected for layers in lists for layer in layers):
        raise UseOriginalError("the hooks that collect hidden states are not those of transformers")
    # Newer versions of transformers take a layer's number here, or several.
    select = getattr(output_capturing, "selected_hidden_states", None)
    numbers = None if select is None else select(asked)
    if numbers is None:
        return range(sys.maxsize)
    selected: set[int] = output_capturing.resolve_hidden_states_indices(model, numbers)
    return selected


def _tokens(
    engine: PackedEncoder, arguments: dict[str, Any]
) -> tuple[NDArray[np.int64], Tensor | None]:
    """Ids `[B, S]`, and the embeddings `[B * S, E]` that they count where these are given."""
    input_ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if embeddings is None:
        if type(input_ids) is not Tensor or input_ids.dim() != 2 or not input_ids.numel():
            raise UseOriginalError("input_ids is not a tensor [B, S] with tokens")
        shape = (input_ids.shape[0], input_ids.shape[1])
        words = engine.admitted.architecture.vocab_size
        return _integers("input_ids", input_ids, shape, words), None
    if input_ids is not None:
        raise UseOriginalError("both input_ids and inputs_embeds were given")
    model: Any = engine.model
    if (
        type(embeddings) is not Tensor
        or embeddings.dim() != 3
        or embeddings.shape[2] != engine.admitted.architecture.embedding_size
        or not embeddings.numel()
        or (embeddings.dtype, embeddings.device) != (model.dtype, engine.device)
    ):
        raise UseOriginalError(
            "inputs_embeds is not a tensor [B, S, E] of the dtype and on the device of the model"
        )
    if embeddings.requires_grad and torch.is_grad_enabled():
        raise UseOriginalError("gradients of inputs_embeds are recorded")
    shape = (embeddings.shape[0], embeddings.shape[1])
    rows = np.arange(shape[0] * shape[1], dtype=np.int64).reshape(shape)
    return rows, embeddings.detach().reshape(rows.size, -1)


def _integers(name: str, value: object, shape: tuple[int, int], size: int) -> NDArray[np.int64]:
    """`value` as int64 `[B, S]` on the host, inside a table of `size` rows."""
    if (
        type(value) is not Tensor
        or value.dtype not in (torch.int64, torch.int32)
        or value.dim() != 2
        or value.shape[0] not in (1, shape[0])
        or value.shape[1] != shape[1]
    ):
        raise UseOriginalError(f"{name} is not an integer tensor [B, S]")
    array = value.cpu().numpy().astype(np.int64, copy=False)
    if array.min() < 0 or array.max() >= size:
        raise UseOriginalError(f"{name} outside a table of {size} rows")
    return np.broadcast_to(array, shape)


def _kept(mask: object, shape: tuple[int, int], *, multiplies: bool) -> NDArray[np.bool_]:
    """The tokens that `attention_mask` keeps, bool `[B, S]`; `multiplies`: the model multiplies
    embeddings by it."""
    if mask is None:
        return np.ones(shape, dtype=np.bool_)
    if type(mask) is not Tensor or tuple(mask.shape) != shape:
        raise UseOriginalError("attention_mask is not a tensor [B, S]")
    kept = mask.to(torch.bool)
    if multiplies and not torch.equal(kept.to(mask.dtype), mask):
        raise UseOriginalError("attention_mask has other numbers than 0 and 1, which are factors")
    return kept.cpu().numpy()


def _has_gaps(keep: NDArray[np.bool_]) -> bool:
    """Whether a row keeps tokens on both sides of one that it masks."""
    return bool((np.diff(keep.astype(np.int8), axis=1, prepend=0) == 1).sum(axis=1).max() > 1)


def _check_padding(
    model: nn.Module,
    keep: NDArray[np.bool_],
    ids: NDArray[np.int64],
    embeddings: Tensor | None,
    padding: str,
) -> None:
    """Refuse a padded call whose padding somebody reads, or that reaches the other tokens."""
    if padding == "stock":
        raise UseOriginalError("padding, whose states were asked for")
    # In the original a NaN spreads from masked tokens: it times a weight of zero is NaN.
    if embeddings is not None and not embeddings[torch.from_numpy(~keep.ravel())].isfinite().all():
        raise UseOriginalError("inputs_embeds of masked tokens are not finite")
    # Poolers and most heads read the state of column 0, masked or not; the packed path has none for
    # it.
    callers = callers_of(model)
    if not keep[:, 0].all() and (
        getattr(model, "pooler", None) is not None or any(map(reads_first_column, callers))
    ):
        raise UseOriginalError("the first token of a row is masked")
    for caller in callers:
        reader = reader_of_padding(caller, keep, ids if embeddings is None else None)
        masks = padding == "zeros" and answers_questions(caller.module)
        if reader is not None and not masks:
            raise UseOriginalError(f"{reader}, behind the model, may read padding")
