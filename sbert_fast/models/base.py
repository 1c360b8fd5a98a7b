"""What the packed engine needs to know of a model, and the checks every family shares."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sbert_fast.errors import InvalidWeightsError, UnsupportedModelError
from sbert_fast.originals import is_genuine

# Those that compute softmax(q k^T / sqrt(D)) v, each in its own way.
_ATTENTION = (None, "eager", "sdpa", "flex_attention", *(f"flash_attention_{i}" for i in (2, 3, 4)))

# HF activation names; the value says whether the tanh approximation is meant.
_GELUS = {
    "gelu": False,
    "gelu_python": False,
    "gelu_new": True,
    "gelu_pytorch_tanh": True,
    "gelu_python_tanh": True,
    "gelu_fast": True,
    "gelu_accurate": True,
}


@dataclass(frozen=True, slots=True)
class Linear:
    """`y = x @ weight.T + bias`, weight `[N, K]`, bias `[N]` or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One post-norm transformer layer."""

    query: Linear
    key: Linear
    value: Linear
    attention_output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    output_norm: Norm


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Embedding tables; `projection` widens them to the hidden size (ELECTRA)."""

    word: Tensor
    position: Tensor
    token_type: Tensor | None
    norm: Norm
    projection: Linear | None = None


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """The live parameters of a model, by role. Nothing here is a copy."""

    embeddings: Embeddings
    layers: tuple[Layer, ...]

    def tensors(self) -> Iterator[Tensor]:
        """Every parameter, in a fixed order."""
        return (value for value in _values(self) if isinstance(value, Tensor))

    def identity(self) -> tuple[object, ...]:
        """What prepared weights are derived from, but for the contents of the parameters."""
        return tuple(id(v) if isinstance(v, Tensor) else v for v in _values(self))


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes and conventions of a model.

    Attributes:
        family: name of the family, as in `config.model_type`.
        hidden_size, num_heads, num_layers, intermediate_size, vocab_size: as usual.
        embedding_size: columns of the embedding tables, which a projection may widen.
        tanh_gelu: the feed-forward activation is the tanh approximation of GELU.
        position_offset: position of the first token.
        uncounted_id: token id that does not advance positions, or None.
        max_tokens: tokens the position table has room for.
        type_vocab_size: token types, 0 where the family has none.
    """

    family: str
    embedding_size: int
    hidden_size: int
    num_heads: int
    num_layers: int
    intermediate_size: int
    vocab_size: int
    tanh_gelu: bool
    position_offset: int
    uncounted_id: int | None
    max_tokens: int
    type_vocab_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def _values(node: object) -> Iterator[object]:
    """The tensors and settings of weights, in a fixed order."""
    if isinstance(node, tuple):
        for part in node:
            yield from _values(part)
    elif is_dataclass(node):
        for field in fields(node):
            yield from _values(getattr(node, field.name))
    else:
        yield node


def linear(module: nn.Module) -> Linear:
    if type(module) is not nn.Linear:
        raise UnsupportedModelError(
            f"expected torch.nn.Linear, got {type(module).__module__}.{type(module).__qualname__}"
        )
    return Linear(module.weight, module.bias)


def norm(module: nn.Module) -> Norm:
    if type(module) is not nn.LayerNorm or module.weight is None or module.bias is None:
        raise UnsupportedModelError(
            f"expected torch.nn.LayerNorm with weight and bias, got {type(module).__qualname__}"
        )
    return Norm(module.weight, module.bias, module.eps)


def is_tanh_gelu(activation: object, modules: Iterable[nn.Module]) -> bool:
    """Which GELU the config names, where the `modules` of the layers are what it names."""
    if not isinstance(activation, str) or activation not in _GELUS:
        raise UnsupportedModelError(
            f"activation must be one of {', '.join(_GELUS)}, got {activation!r}"
        )
    # Imported with the model, and not before: sentence-transformers alone may not need it.
    from transformers.activations import ACT2FN

    named = type(ACT2FN[activation])
    for module in modules:
        if type(module) is not named:
            raise UnsupportedModelError(
                f"activation must be {named.__name__}, as {activation!r} in the config says, got "
                f"{type(module).__name__}"
            )
    return _GELUS[activation]


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
    if architecture.hidden_size % architecture.num_heads:
        raise UnsupportedModelError(
            f"hidden size {architecture.hidden_size} is not a multiple of "
            f"{architecture.num_heads} heads"
        )
    if not 8 <= architecture.head_dim <= 128:
        raise UnsupportedModelError(f"head dim must be 8 to 128, got {architecture.head_dim}")
    for name, module in model.named_modules():
        home = type(module).__module__
        if name and not home.startswith(("torch.nn.", "transformers.")):
            raise UnsupportedModelError(
                f"module {name!r} is a {home}.{type(module).__qualname__}, not one of transformers"
            )
    _check_parameters(model, weights)


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


def _check_parameters(model: nn.Module, weights: EncoderWeights) -> None:
    known = {id(tensor) for tensor in weights.tensors()}
    if not known <= {id(parameter) for parameter in model.parameters()}:
        raise UnsupportedModelError("a weight is not among the parameters of the model")
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            if name.startswith("pooler."):
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
    if len({tensor.dtype for tensor in weights.tensors()}) > 1:
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
