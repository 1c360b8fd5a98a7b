"""The checks every family shares: what the engine would compute differently is refused."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from sbert_fast.errors import InvalidWeightsError, UnsupportedModelError
from sbert_fast.models.architecture import Architecture
from sbert_fast.models.base import EncoderWeights, is_in_pooler
from sbert_fast.ops.contracts import MAX_HEAD_DIM, MIN_HEAD_DIM
from sbert_fast.originals import is_genuine

# Those that compute softmax(q k^T / sqrt(D)) v, each in its own way.
_ATTENTION = (None, "eager", "sdpa", "flex_attention", *(f"flash_attention_{i}" for i in (2, 3, 4)))


def check(model: nn.Module, architecture: Architecture, weights: EncoderWeights) -> None:
    """Refuse what the packed engine would compute differently from the model itself.

    Raises:
        UnsupportedModelError: with the reason.
    """
    config: Any = model.config
    for flag in ("is_decoder", "add_cross_attention", "is_causal"):
        if getattr(config, flag, False):
            raise UnsupportedModelError(f"config.{flag} is set: only encoders are supported")
    _check_attention(getattr(config, "_attn_implementation", None), model)
    kind = getattr(config, "position_embedding_type", "absolute") or "absolute"
    if kind != "absolute":
        raise UnsupportedModelError(
            f"config.position_embedding_type must be 'absolute', got {kind!r}"
        )
    _check_numbers(architecture, weights)
    _check_norms(weights)
    for name, module in model.named_modules():
        home = type(module).__module__
        if name and not home.startswith(("torch.nn.", "transformers.")):
            raise UnsupportedModelError(
                f"module {name!r} is a {home}.{type(module).__qualname__}, not one of transformers"
            )
    check_parameters(model, weights)


def _check_attention(name: str | None, model: nn.Module) -> None:
    """Refuse an attention that is not one of transformers' own."""
    if name not in _ATTENTION:
        raise UnsupportedModelError(f"the attention must be one of transformers' own, got {name!r}")
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    home = sys.modules[type(model).__module__]
    for registry in (getattr(home, "ALL_ATTENTION_FUNCTIONS", {}), ALL_MASK_ATTENTION_FUNCTIONS):
        function = registry.get(name)
        if function is None:
            continue
        kind = str(name).partition("_")[0]
        if not is_genuine(function) or kind not in function.__name__:
            raise UnsupportedModelError(f"the function of the attention {name!r} was replaced")


def _check_numbers(architecture: Architecture, weights: EncoderWeights) -> None:
    """Refuse numbers that mean something else to the engine than to the model, or nothing."""
    _check_int("head dim", architecture.head_dim, MIN_HEAD_DIM, MAX_HEAD_DIM)
    _check_int("the position of the first token", architecture.position_offset, 0)
    _check_int("the number of positions", architecture.max_tokens, 1)
    if weights.embeddings.token_type is not None:
        _check_int("the number of token types", architecture.type_vocab_size, 1)
    embeddings = weights.embeddings
    norms = [embeddings.norm, embeddings.projected_norm, weights.final_norm]
    for layer in weights.layers:
        attention = layer.attention
        _check_int("the number of heads", attention.heads, 1)
        _check_int("the number of heads of keys", attention.kv_heads, 1, attention.heads)
        if attention.heads % attention.kv_heads:
            raise UnsupportedModelError(
                f"the number of heads of keys must divide that of heads, {attention.heads}, got "
                f"{attention.kv_heads}"
            )
        if attention.window is not None:
            _check_int("the window of attention", attention.window, 0)
        norms += [layer.attention_norm, layer.feed_forward_norm]
        norms += [attention.query_norm, attention.key_norm]
        norms += [layer.attention_exit, layer.feed_forward_exit]
        if attention.disentangled is not None:
            norms.append(attention.disentangled.norm)
    for eps in {norm.eps: None for norm in norms if norm is not None}:
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
            raise UnsupportedModelError(f"eps of a norm must be a number from 0 on, got {eps!r}")


def _check_int(what: str, value: object, least: int, most: int = 2**63 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        bounds = f"at least {least}" if most == 2**63 - 1 else f"{least} to {most}"
        raise UnsupportedModelError(f"{what} must be {bounds}, got {value!r}")


def _check_norms(weights: EncoderWeights) -> None:
    """Refuse norms in an order that the engine does not run."""
    first = {layer.norm_first for layer in weights.layers} | {weights.final_norm is not None}
    following = weights.layers[0 if False in first else 1 :]
    if len(first) > 1 or any(layer.attention_norm is None for layer in following):
        raise UnsupportedModelError("norms must come first in all layers and at the end, or last")
    for layer in weights.layers:
        exits = {layer.attention_exit is not None, layer.feed_forward_exit is not None}
        if len(exits) > 1 or (True in exits and not layer.norm_first):
            raise UnsupportedModelError("norms of what halves add need norms that come first")
        query, key = layer.attention.query_norm, layer.attention.key_norm
        if query is not None and key is not None and query.eps != key.eps:
            raise UnsupportedModelError(f"eps of the norms of heads differ: {query.eps}, {key.eps}")


def check_parameters(model: nn.Module, weights: EncoderWeights) -> None:
    """Refuse parameters that the engine would leave out, or read as something else.

    Raises:
        UnsupportedModelError: with the reason.
    """
    known = {id(tensor) for tensor in weights.tensors()}
    if not known <= {id(tensor) for tensor in (*model.parameters(), *model.buffers())}:
        raise UnsupportedModelError("a weight is not among the parameters of the model")
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            if is_in_pooler(name):
                continue
            raise UnsupportedModelError(f"unknown parameter {name!r} (an adapter?)")
        if not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"{name} must be a floating-point tensor, got {parameter.dtype} (quantised?)"
            )
        if type(parameter) is not nn.Parameter:
            why = "torch.func.functional_call?" if type(parameter) is Tensor else "quantised?"
            raise UnsupportedModelError(
                f"{name} must be a torch.nn.Parameter, got {type(parameter).__name__} ({why})"
            )
        if parameter.device.type == "meta":
            raise UnsupportedModelError(f"{name} is on the meta device: load its weights first")
    if len({tensor.device for tensor in weights.tensors()}) > 1:
        raise UnsupportedModelError("parameters are spread over several devices")
    if len({parameter.dtype for parameter in model.parameters() if id(parameter) in known}) > 1:
        raise UnsupportedModelError("parameters have several dtypes")


def check_finite(model: nn.Module, prefix: str = "") -> None:
    """Refuse weights that hold NaN or infinity, naming the tensor.

    Args:
        model: holds the weights.
        prefix: what stands before their names in the model around it.

    Raises:
        InvalidWeightsError: a parameter is not finite.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        # Both are NaN where a value is. Unlike isfinite(), this makes no copies of a large table.
        if not all(math.isfinite(value) for value in torch.aminmax(parameter.detach())):
            raise InvalidWeightsError(f"weights hold NaN or infinity: {prefix}{name}")
