"""What people do to the settings of a model: its modules, its config, its buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model_operations import Act, operation, setting
from walks import NotNow, Subject, Undo

# sentence-transformers' modules


def _first(name: str, *values: Any, **how: Any) -> None:
    setting(lambda s: s.first, "Transformer", name, *values, **how)


def _of(part: str, name: str, *values: Any, **how: Any) -> None:
    setting(lambda s: s.part(part), part, name, *values, **how)


_first("query_length", 4, 7, weight=0.5)
_first("document_length", 4, 7, weight=0.5)
_first(
    "query_expansion",
    lambda _: {"strategy": "fixed", "attend": True, "length": 32},
    lambda _: {"strategy": "min", "attend": False, "length": 12},
    weight=0.5,
)
_first(
    "processing_kwargs",
    lambda _: {"text": {"max_length": 5}},
    lambda _: {"text": {"truncation": False}},
    lambda _: {"text": {"padding": "max_length"}},
    lambda _: {"text": {"add_special_tokens": False}},
)
_first(
    "modality_config",
    lambda _: {"text": {"method": "forward", "method_output_name": ("hidden_states", 1)}},
)
_first("module_output_name", "other_embeddings", weight=0.3)
_first("do_lower_case", True, changes=False)
_first("model_forward_params", lambda _: {"input_ids"}, lambda _: {"input_ids", "attention_mask"})
_first("unpad_inputs", True, False, changes=False)

_of("Pooling", "pooling_mode", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_of("Pooling", "include_prompt", False, True)
_of("Pooling", "embedding_dimension", 7, changes=False, weight=0.3)
_of("Dense", "activation_function", nn.ReLU(), nn.Identity())
_of("Dense", "module_output_name", "other", weight=0.5)
_of("Dense", "module_input_name", "token_embeddings", weight=0.3)
_of("Dense", "use_residual", lambda old: not old, weight=0.5)
_of("Dense", "in_features", 9, changes=False, weight=0.3)
_of("Normalize", "module_input_name", "token_embeddings", weight=0.5)
_of("Normalize", "module_output_name", "other", weight=0.5)

setting(lambda s: s.model, "model", "truncate_dim", 5, 11, 1000)
setting(lambda s: s.model, "model", "default_prompt_name", "query", "document")
setting(lambda s: s.model, "model", "similarity_fn_name", "dot", "euclidean", changes=False)
setting(lambda s: s.model, "model", "prompts", lambda old: {n: f"{p}sea " for n, p in old.items()})


@operation
def truncated_for_a_while(s: Subject) -> Undo:
    context = s.model.truncate_embeddings(7)
    context.__enter__()
    return lambda s: context.__exit__(None, None, None)


@operation
def prompt_written(s: Subject) -> None:
    s.model.prompts["query"] = s.rng.choice(["", "what is ", "sea "])


@operation(changes=False)
def other_prompt_added(s: Subject) -> None:
    s.model.prompts["other"] = "look "


@operation
def prompt_left_out_of_pooling(s: Subject) -> Undo:
    s.model.set_pooling_include_prompt(False)
    return lambda s: s.model.set_pooling_include_prompt(True)


@operation
def several_pooling_modes(s: Subject) -> Undo:
    pooling = s.part("Pooling")
    old = pooling.pooling_mode
    pooling.pooling_mode = ("cls", "max")
    if type(s.model[-1]).__name__ == "Dense" or len(s.model) > 2:
        # Two modes are too wide for what follows.
        kept = [s.model.pop(len(s.model) - 1) for _ in range(len(s.model) - 2)]
    else:
        kept = []

    def undo(s: Subject) -> None:
        s.part("Pooling").pooling_mode = old
        for module in reversed(kept):
            s.model.append(module)

    return undo


# The config, and the attributes of modules


def _in_config(name: str, *values: Any, **how: Any) -> None:
    setting(lambda s: s.base.config, "config", name, *values, **how)


_in_config("is_decoder", True, weight=0.5)
_in_config("output_hidden_states", True, changes=False)
_in_config("return_dict", False, changes=False)
_in_config("hidden_act", "relu", changes=False, weight=0.3)
_in_config("num_attention_heads", 4, changes=False, weight=0.3)
_in_config("num_hidden_layers", 1, 7, changes=False, weight=0.5)
_in_config("hidden_size", 64, changes=False, weight=0.3)
_in_config("layer_norm_eps", 0.5, changes=False, weight=0.3)
_in_config("max_position_embeddings", 7, 500, changes=False, weight=0.3)
_in_config("pad_token_id", 9, changes=False, weight=0.3)
_in_config("vocab_size", 3, changes=False, weight=0.3)
_in_config("model_type", "t5", changes=False, weight=0.3)
_in_config("use_cache", True, False, changes=False, weight=0.3)

for _implementation in ("eager", "sdpa"):
    operation(
        lambda s, name=_implementation: s.base.set_attn_implementation(name),
        name=f"attention by {_implementation}",
        changes=False,
    )


def _attention(name: str, *values: Any, **how: Any) -> None:
    setting(Subject.attention, "attention", name, *values, **how)


_attention("scaling", lambda old: 4 * old, lambda old: 0.0)
_attention("is_causal", True, changes=False, weight=0.5)
_attention("is_decoder", True, changes=False, weight=0.3)
_attention("num_attention_heads", 4, changes=False, weight=0.5)
_attention("attention_head_size", 8)
_attention("n_heads", 4, changes=False, family="distilbert", weight=0.3)
_attention("all_head_size", 8, changes=False, weight=0.3)
setting(Subject.layer, "layer", "chunk_size_feed_forward", 1, changes=False, weight=0.5)
setting(Subject.layer, "layer", "is_decoder", True, changes=False, weight=0.3)


def _norm(s: Subject) -> Any:
    return s.module(nn.LayerNorm)


def _dropout(s: Subject) -> Any:
    return s.module(nn.Dropout)


setting(_norm, "norm", "eps", 0.5, 1e-5)
setting(_dropout, "dropout", "p", 0.0, 0.9, changes=False)
setting(lambda s: s.module(nn.Linear), "linear", "in_features", 3, changes=False, weight=0.3)
setting(lambda s: s.base.get_input_embeddings(), "table", "padding_idx", 9, changes=False)
setting(
    lambda s: s.base.get_input_embeddings(), "table", "num_embeddings", 9, weight=0.3, changes=False
)
setting(lambda s: s.base.embeddings, "embeddings", "padding_idx", 5, family="roberta")


def _up(s: Subject) -> Any:
    return getattr(s.layer(), "intermediate", None) or s.layer().ffn


for _act in (nn.ReLU(), nn.GELU(approximate="tanh"), torch.tanh):
    _title = getattr(_act, "__name__", str(_act))

    @operation(name=f"activation {_title}", weight=0.5)
    def _activation(s: Subject, act: Any = _act) -> Undo:
        up = _up(s)
        name = "activation" if hasattr(up, "activation") else "intermediate_act_fn"
        old = getattr(up, name)
        if isinstance(old, nn.Module) and not isinstance(act, nn.Module):
            delattr(up, name)
        setattr(up, name, act)

        def undo(s: Subject) -> None:
            up = _up(s)
            if hasattr(up, name):
                delattr(up, name)
            setattr(up, name, old)

        return undo


@operation
def function_inside_the_activation(s: Subject) -> Undo:
    """transformers' own GELU holds the function that it calls."""
    act = next((m for m in s.layer().modules() if hasattr(m, "act")), None)
    if act is None:
        raise NotNow
    old = act.act
    act.act = torch.relu

    def undo(s: Subject) -> None:
        for module in s.base.modules():
            if hasattr(module, "act"):
                module.act = old

    return undo


# Buffers


def _buffer(name: str, change: Callable[[torch.Tensor], torch.Tensor], how: str) -> Act:
    def act(s: Subject) -> Undo:
        tables = s.base.embeddings
        buffer = getattr(tables, name, None)
        if buffer is None:
            raise NotNow
        old = buffer.clone()
        new = change(buffer)
        if how == "replaced":
            setattr(tables, name, new)
        elif how == "in place":
            buffer.copy_(new) if not _is_expanded(buffer) else buffer[:].add_(0)
        else:
            buffer.data = new
        return lambda s: setattr(s.base.embeddings, name, old)

    return act


def _is_expanded(tensor: torch.Tensor) -> bool:
    return 0 in tensor.stride()


for _how in ("replaced", "in place", "through data"):
    operation(
        _buffer("position_ids", lambda b: (b + 7) % b.shape[1], _how), name=f"position_ids {_how}"
    )
    operation(
        _buffer("token_type_ids", torch.ones_like, _how),
        name=f"token_type_ids {_how}",
        changes=False,
    )


@operation
def token_types_from_the_buffer(s: Subject) -> Undo:
    """The tokenizer gives none, so the buffer decides."""
    tables, names = s.base.embeddings, s.tokenizer.model_input_names
    if getattr(tables, "token_type_ids", None) is None:
        raise NotNow
    old = tables.token_type_ids
    tables.token_type_ids = torch.ones_like(old)
    s.tokenizer.model_input_names = ["input_ids", "attention_mask"]

    def undo(s: Subject) -> None:
        s.base.embeddings.token_type_ids = old
        s.tokenizer.model_input_names = names

    return undo


@operation(changes=False)
def buffer_added(s: Subject) -> Undo:
    s.layer().register_buffer("unused", torch.ones(2))
    return lambda s: [layer._buffers.pop("unused", None) for layer in s.layers]
