"""The activation functions of feed-forwards, by the names that configs give them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.ops.reference import Activation

# HF activation names that a feed-forward without a gate may have.
_GELUS = {
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_python_tanh": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_accurate": Activation.GELU_TANH,
}
# And those that one with a gate may have too.
_GATED = {"silu": Activation.SILU, "swish": Activation.SILU}
# The classes behind those names.
_CLASSES = {
    "AccurateGELUActivation": Activation.GELU_TANH,
    "FastGELUActivation": Activation.GELU_TANH,
    "GELUActivation": Activation.GELU,
    "GELUTanh": Activation.GELU_TANH,
    "NewGELUActivation": Activation.GELU_TANH,
    "PytorchGELUTanh": Activation.GELU_TANH,
    "SiLU": Activation.SILU,
    "SiLUActivation": Activation.SILU,
}
_HOMES = ("torch.nn.modules.activation", "transformers.activations")


def activation(name: object, modules: Iterable[nn.Module], *, gated: bool = False) -> Activation:
    """The function the config names, where the `modules` of the layers are what it names."""
    known = _GELUS | _GATED if gated else _GELUS
    if not isinstance(name, str) or name not in known:
        raise UnsupportedModelError(f"activation must be one of {', '.join(known)}, got {name!r}")
    # Imported with the model, and not before: sentence-transformers alone may not need it.
    from transformers.activations import ACT2FN

    named = type(ACT2FN[name])
    if _CLASSES.get(named.__name__) != known[name] or named.__module__ not in _HOMES:
        raise UnsupportedModelError(f"the activation {name!r} of transformers was replaced")
    for module in modules:
        if type(module) is not named:
            raise UnsupportedModelError(
                f"activation must be {named.__name__}, as {name!r} in the config says, got "
                f"{type(module).__name__}"
            )
    return known[name]
