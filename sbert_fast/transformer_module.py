"""What the Transformer module of a model must be for the packed engine to stand in for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from sbert_fast.errors import UnsupportedModelError

# transformers' value for "no limit" is far above this.
_NO_LIMIT = 1_000_000_000
# Attributes of a Transformer module that are checked below, change nothing after loading, or only
# remember what was computed. Any other that is set changes what the module does.
KNOWN = {
    *vars(nn.Module()),
    "_chat_template_suffix_cache",
    "_declared_forward_params",
    "_method_signature_cache",
    "_prompt_length_mapping",
    "_unpad_inputs",
    "backend",
    "can_flatten_inputs",
    "do_lower_case",
    "input_formatter",
    "modality_config",
    "model_forward_params",
    "module_output_name",
    "processing_kwargs",
    "processor",
    "track_media_counts",
    "transformer_task",
}
# By the task of a Transformer module: what sentence-transformers takes from the model in it, and
# what it calls that.
_READ = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
    "text-generation": ("logits", "causal_logits"),
    "any-to-any": ("logits", "causal_logits"),
}
EMBEDDING, *SCORING = _READ
GENERATING = SCORING[1:]
# What the Transformer module must hand on to the model, where it selects.
_FORWARDED = {"attention_mask", "input_ids", "token_type_ids"}
# Options that a chat template does not see: they say how long and wide the ids are.
_SIZES = {"max_length", "padding", "return_tensors", "truncation"}


def formats(transformer: Any) -> bool:
    """Whether a chat template formats the inputs of the Transformer module."""
    return "message" in getattr(transformer, "modality_config", ())


def check_transformer(transformer: Any, tasks: Sequence[str]) -> str:
    """The task of the Transformer module, one of `tasks`; refuses options that the packed engine
    would ignore."""
    task = getattr(transformer, "transformer_task", tasks[0])
    if task not in tasks:
        expected = " or ".join(tasks)
        raise UnsupportedModelError(f"Transformer.transformer_task must be {expected}, got {task}")
    taken, called = _READ[task]
    if (found := getattr(transformer, "module_output_name", called)) != called:
        raise UnsupportedModelError(f"Transformer.module_output_name must be {called}, got {found}")
    how = {"method": "forward", "method_output_name": taken}
    modalities = {"text": how}
    if task in GENERATING and formats(transformer):
        modalities["message"] = how
    found = getattr(transformer, "modality_config", modalities)
    # What `input_formatter` takes from it, and keeps.
    used = {name: {k: v for k, v in each.items() if k != "format"} for name, each in found.items()}
    if used != modalities:
        raise UnsupportedModelError(
            f"Transformer.modality_config must be {modalities}, got {found}"
        )
    parameters = transformer.model_forward_params
    if parameters is not None and not _FORWARDED <= parameters:
        raise UnsupportedModelError(f"Transformer.model_forward_params is {parameters}")
    _check_processing(transformer)
    return str(task)


def _check_processing(transformer: Any) -> None:
    """Refuse tokenizers and options of the Transformer module that the engine would bypass."""
    options = getattr(transformer, "processing_kwargs", None) or {}
    given = {(kind, name) for kind, names in options.items() for name in names}
    if formats(transformer):
        given -= {("text", "logits_to_keep")}
        given = {each for each in given if each[0] != "chat_template" or each[1] in _SIZES}
    if given:
        raise UnsupportedModelError("the Transformer module sets processing_kwargs")
    tokenizer = transformer.tokenizer
    if tokenizer is None:
        raise UnsupportedModelError("the Transformer module has no tokenizer")
    if not type(tokenizer).__module__.startswith("transformers."):
        raise UnsupportedModelError(
            f"the tokenizer must be one of transformers, got {type(tokenizer).__module__}."
            f"{type(tokenizer).__qualname__}"
        )
    if not {"input_ids", "attention_mask"} <= set(tokenizer.model_input_names):
        raise UnsupportedModelError(
            "the tokenizer must give input_ids and attention_mask, got "
            f"{tokenizer.model_input_names}"
        )
    if transformer.processor is not tokenizer:
        raise UnsupportedModelError(
            f"the processor must be a tokenizer, got {type(transformer.processor).__name__}"
        )


def max_length(transformer: Any, room: int, has_table: bool, *, pair: bool) -> int:
    """Tokens kept of a text or a pair, given how many positions there are, in a table or
    computed."""
    tokenizer = transformer.tokenizer
    value = tokenizer.model_max_length
    if value is None:
        raise UnsupportedModelError("max_seq_length is None")
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer)):
        raise ValueError(f"max_seq_length must be an integer, got {value!r}")
    # sentence-transformers falls back to the size of the whole table, offset rows included.
    table = transformer.auto_model.config.max_position_embeddings
    if has_table and room < value == table:
        return room
    # Where positions are computed, there is no end but one beyond any text.
    if value >= _NO_LIMIT and (has_table or room >= _NO_LIMIT):
        return room
    # Tokenizers cut nothing if the special tokens alone are too many.
    least = max(1, tokenizer.num_special_tokens_to_add(pair=pair))
    if value > room and not has_table:
        raise UnsupportedModelError(f"max_seq_length {value} is beyond the {room} positions")
    if not least <= value <= room or value != int(value):
        raise ValueError(
            f"max_seq_length must be an integer from {least}, the special tokens of a text, to "
            f"{room}, the room of the position table, got {value}"
        )
    return int(value)
