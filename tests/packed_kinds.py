"""The two ways to run packed, and how each is made to run as stock does, leaving no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from sbert_fast import FastEncoder, accelerate, ops
from sbert_fast.packed_forward import PACKED, PackedForward
from sbert_fast.patching import counts

Call = Callable[[Any, list[str]], Any]


def launches() -> int:
    """How many kernels of ours have run: only what runs packed has any."""
    return sum(ops.launches().values())


def _forward(model: Any, texts: list[str]) -> Any:
    """In the mode the model is in, or in eval mode where it drops: packed, it draws other random
    numbers. Gradients are recorded where they would be."""
    modes = [(module, module.training) for module in model.modules()]
    if any(map(_drops, model.modules())):
        model.eval()
    try:
        return model(model.preprocess(texts))["sentence_embedding"].detach().float().numpy()
    finally:
        for module, mode in modes:
            module.training = mode


def _drops(module: nn.Module) -> bool:
    rates = (v for n, v in vars(module).items() if "dropout" in n and isinstance(v, float))
    is_dropout = isinstance(module, nn.Dropout) and module.p > 0
    return module.training and (is_dropout or any(rate > 0 for rate in rates))


@dataclass(frozen=True)
class Kind:
    """One of the two ways to run packed.

    Attributes:
        wrap: a stock model that from now on runs packed.
        stock: the same model, running as stock does while the context lasts.
        counted: how many calls ran in stock.
        calls: what is compared.
    """

    wrap: Callable[[SentenceTransformer], Any]
    stock: Callable[[Any], AbstractContextManager[Any]]
    counted: Callable[[Any], int]
    calls: dict[str, Call]


@contextlib.contextmanager
def _as_stock(model: FastEncoder) -> Iterator[SentenceTransformer]:
    """The same object in all but its class."""
    view = SentenceTransformer.__new__(SentenceTransformer)
    view.__dict__.update(model.__dict__)
    yield view


@contextlib.contextmanager
def _without_packing(model: SentenceTransformer) -> Iterator[SentenceTransformer]:
    def original(self: PackedForward, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    packed, PackedForward.__call__ = PackedForward.__call__, original  # type: ignore[method-assign]
    try:
        yield model
    finally:
        PackedForward.__call__ = packed  # type: ignore[method-assign]


_CALLS: dict[str, Call] = {
    "encode": lambda model, texts: model.encode(texts),
    "encode_query": lambda model, texts: model.encode_query(texts),
    "encode_document": lambda model, texts: model.encode_document(texts, normalize_embeddings=True),
}
KINDS = {
    "encoder": Kind(
        FastEncoder,
        _as_stock,
        lambda model: sum(model.stats.fallbacks.values()),
        _CALLS
        | {
            "forward with gradients": lambda model, texts: torch.enable_grad()(_forward)(
                model, texts
            )
        },
    ),
    "accelerated": Kind(
        accelerate,
        _without_packing,
        lambda model: sum(n for reason, n in counts(model).items() if reason != PACKED),
        {
            "encode": _CALLS["encode"],
            "forward": lambda model, texts: torch.no_grad()(_forward)(model, texts),
            "forward with gradients": _forward,
        },
    ),
}


def written_by_stock(model: Any) -> list[torch.Tensor]:
    """What a forward itself writes to: in training mode a spectral norm, and tables with a largest
    norm of their rows."""
    tables = [m.weight for m in model.modules() if getattr(m, "max_norm", None) is not None]
    return [*tables, *(b for b in model.buffers() if b.is_floating_point())]


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Puts back what a call of stock writes: modes, caches, the state of the tokenizer."""
    modes = [(module, module.training) for module in model.modules()]
    lengths = getattr(model[0], "_prompt_length_mapping", {}) if len(model) else {}
    known = dict(lengths)
    backend = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
    limits = None if backend is None else (backend.truncation, backend.padding)
    try:
        yield
    finally:
        for module, training in modes:
            module.__dict__["training"] = training
        lengths.clear()
        lengths.update(known)
        if backend is not None:
            truncation, padding = limits
            backend.no_truncation()
            backend.no_padding()
            if truncation is not None:
                backend.enable_truncation(**truncation)
            if padding is not None:
                backend.enable_padding(**padding)


def _floats(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, once for each place that holds them: of a module with two
    names torch would not put back what it held."""
    held = {
        f"{name}.{key}".lstrip("."): tensor
        for name, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    return {name: tensor.detach() for name, tensor in held.items() if tensor.is_floating_point()}


def in_double(call: Call) -> Call:
    """The same call, with parameters and buffers in fp64 while it lasts."""

    def run(model: Any, texts: list[str]) -> Any:
        doubles = {name: tensor.double() for name, tensor in _floats(model).items()}
        with _reparametrize_module(model, doubles), _without_eager_attention(model):
            return call(model, texts)

    return run


def nudged(call: Call, seed: int) -> Call:
    """The same call of a model nearby: each weight is another one, by about a thousandth of it."""

    def run(model: Any, texts: list[str]) -> Any:
        draw = torch.Generator().manual_seed(seed)
        tensors = _floats(model)
        near = {n: t + t * 1e-3 * torch.randn(t.shape, generator=draw) for n, t in tensors.items()}
        with _reparametrize_module(model, {n: t.to(tensors[n].dtype) for n, t in near.items()}):
            return call(model, texts)

    return run


@contextlib.contextmanager
def _without_eager_attention(model: Any) -> Iterator[None]:
    """Its softmax is in fp32, where the mask of fp64 is -inf: NaN where a token sees no other."""
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    name = "_attn_implementation_internal"
    held = {} if config is None else vars(config)
    old = held.get(name)
    if old == "eager":
        held[name] = "sdpa"
    try:
        yield
    finally:
        if old == "eager":
            held[name] = old
