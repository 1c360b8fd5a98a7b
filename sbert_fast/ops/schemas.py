"""Schemas, fakes, reference kernels and gradients of every op.

Each op has one overload per implementation, with the same arguments except for those that an
implementation lacks. They are defined here, in Python, before any compiled library is loaded, so
that graph capture sees them on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sbert_fast.kernels as kernels
from sbert_fast.ops import autograd, gradients, reference, torch_attention

NAMESPACE = "sbert_fast"
IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda", "torch")

SCHEMAS = {
    "varlen_attention": "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale,"
    " Tensor? bias, int window, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? tiles,"
    " bool causal=False, int kv_heads=0, Tensor? query_norm=None, Tensor? key_norm=None,"
    " float norm_eps=0.0, Tensor? position_keys=None, Tensor? position_queries=None,"
    " Tensor? buckets=None, float dropout=0.0, Tensor? seed=None) -> Tensor",
    "embed_norm": "(Tensor ids, Tensor? positions, Tensor? types, Tensor word,"
    " Tensor? position_table, Tensor? type_table, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType out_dtype, bool rms=False) -> Tensor",
    "add_norm": "(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor ln_bias,"
    " float eps, bool rms=False) -> Tensor",
    "add_norm_sum": "(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor ln_bias,"
    " float eps, bool rms=False) -> (Tensor, Tensor)",
    "bias_gelu": "(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    "gated_activation": "(Tensor x, Tensor? bias, int activation, bool first) -> Tensor",
    "linear": "(Tensor x, Tensor panels, Tensor? bias, int features, int activation,"
    " bool gated) -> Tensor",
    "linear_norm": "(Tensor x, Tensor panels, Tensor? bias, Tensor residual, Tensor weight,"
    " Tensor ln_bias, float eps) -> Tensor",
    "segment_pool": "(Tensor x, Tensor cu_seqlens, int pooling, bool normalize, int skip,"
    " Tensor? spans) -> Tensor",
    "segment_pool_out": "(Tensor x, Tensor cu_seqlens, int pooling, bool normalize, int skip,"
    " Tensor? spans, Tensor(a!) out, Tensor? out_rows) -> ()",
    "norm_pool": "(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor ln_bias,"
    " float eps, Tensor cu_seqlens, int pooling, bool normalize, int skip, Tensor? spans,"
    " bool rms=False) -> Tensor",
    "norm_pool_out": "(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor ln_bias,"
    " float eps, Tensor cu_seqlens, int pooling, bool normalize, int skip, Tensor? spans,"
    " Tensor(a!) out, Tensor? out_rows, bool rms=False) -> ()",
    "varlen_attention_backward": "(Tensor grad, Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen,"
    " float scale, Tensor? bias, int window, bool causal=False, Tensor? rotary_cos=None,"
    " Tensor? rotary_sin=None, int kv_heads=0, Tensor? query_norm=None, Tensor? key_norm=None,"
    " float norm_eps=0.0, float dropout=0.0, Tensor? seed=None) -> (Tensor, Tensor, Tensor)",
    "add_norm_backward": "(Tensor grad, Tensor x, Tensor? bias, Tensor? residual, Tensor weight,"
    " float eps, bool rms=False, Tensor? grad_sum=None) -> (Tensor, Tensor)",
    "bias_gelu_backward": "(Tensor grad, Tensor x, Tensor? bias, bool tanh) -> Tensor",
    "gated_activation_backward": "(Tensor grad, Tensor x, Tensor? bias, int activation, bool first)"
    " -> Tensor",
}

# What gradients are computed with.
GRADIENTS = frozenset(
    {
        "varlen_attention_backward",
        "add_norm_backward",
        "bias_gelu_backward",
        "gated_activation_backward",
    }
)
# Other devices have GEMMs of their own.
CPU_ONLY = frozenset({"linear", "linear_norm"})
# Ops for which there is no kernel in CUDA C++ yet.
WITHOUT_CUDA_KERNEL = frozenset({"add_norm_sum", "gated_activation"}) | GRADIENTS

_DISENTANGLED = ("position_keys", "position_queries")
# What implementations lack of an op: options, and tensors that they cannot do without.
LACKED: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        "varlen_attention": (
            *("causal", "kv_heads", "query_norm", "rotary", "dropout"),
            *_DISENTANGLED,
        ),
        "embed_norm": ("rms", "without position_table", "without weight"),
        **dict.fromkeys(("add_norm", "norm_pool", "norm_pool_out"), ("rms",)),
    },
}
_COMPANIONS = {
    "dropout": ("seed",),
    "position_keys": ("buckets",),
    "position_table": ("positions",),
    "query_norm": ("key_norm", "norm_eps"),
    "weight": ("bias",),
}

_ATTENTION_ARGUMENTS = 9

# Kept alive for the life of the process: dropping it would unregister the ops.
_library = torch.library.Library(NAMESPACE, "DEF")


def _fake_varlen_attention(qkv: Tensor, *args: Any) -> Tensor:
    kv_heads = args[9] if len(args) > 9 else 0
    heads = qkv.shape[1] - 2 * kv_heads if kv_heads else qkv.shape[2]
    return qkv.new_empty(qkv.shape[0], heads, qkv.shape[-1])


def _fake_embed_norm(ids: Tensor, *args: Any) -> Tensor:
    word, out_dtype = args[2], args[8]
    return word.new_empty(ids.shape[0], word.shape[1], dtype=out_dtype)


def _fake_elementwise(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_add_norm_sum(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_gated_activation(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def _fake_linear(
    x: Tensor, panels: Tensor, bias: Tensor | None, features: int, activation: int, gated: bool
) -> Tensor:
    return x.new_empty((x.shape[0], features))


def _fake_linear_norm(x: Tensor, panels: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], args[0].shape[1]))


def _fake_segment_pool(
    x: Tensor, cu_seqlens: Tensor, pooling: int, normalize: bool, skip: int, spans: Tensor | None
) -> Tensor:
    rows = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    return x.new_empty((rows, x.shape[1]), dtype=reference._accumulator(x.dtype))


def _fake_norm_pool(x: Tensor, *args: Any) -> Tensor:
    return _fake_segment_pool(x, *args[5:10])


def _fake_nothing(*_: Any) -> None:
    return None


def _fake_attention_backward(grad: Tensor, qkv: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype = reference._accumulator(qkv.dtype)
    bias, norm = args[3], args[9] if len(args) > 9 else None
    shapes = (0,) if bias is None else bias.shape, (0,) if norm is None else (2, qkv.shape[-1])
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_activation_backward(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_norm_backward(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((3, x.shape[1]), dtype=reference._accumulator(x.dtype))
    return x.new_empty(x.shape), sums


_FAKES: dict[str, Callable[..., Any]] = {
    "varlen_attention": _fake_varlen_attention,
    "embed_norm": _fake_embed_norm,
    "add_norm": _fake_elementwise,
    "add_norm_sum": _fake_add_norm_sum,
    "bias_gelu": _fake_elementwise,
    "gated_activation": _fake_gated_activation,
    "linear": _fake_linear,
    "linear_norm": _fake_linear_norm,
    "segment_pool": _fake_segment_pool,
    "segment_pool_out": _fake_nothing,
    "norm_pool": _fake_norm_pool,
    "norm_pool_out": _fake_nothing,
    "varlen_attention_backward": _fake_attention_backward,
    "add_norm_backward": _fake_norm_backward,
    "bias_gelu_backward": _fake_activation_backward,
    "gated_activation_backward": _fake_activation_backward,
}


def _torch_varlen_attention(*args: Any) -> Tensor:
    # Options are there only where one is not the default.
    plain = len(args) == _ATTENTION_ARGUMENTS and torch_attention.takes(*args)
    return (torch_attention if plain else reference).varlen_attention(*args)


def _cpu_norm_pool(x: Tensor, *args: Any) -> Tensor:
    normalized = torch.ops.sbert_fast.add_norm.cpu(x, *args[:5], *args[10:])
    pooled: Tensor = torch.ops.sbert_fast.segment_pool.cpu(normalized, *args[5:10])
    return pooled


def _cpu_norm_pool_out(x: Tensor, *args: Any) -> None:
    normalized = torch.ops.sbert_fast.add_norm.cpu(x, *args[:5], *args[12:])
    torch.ops.sbert_fast.segment_pool_out.cpu(normalized, *args[5:12])


# On a CPU, two C++ kernels in a row.
_CPU: dict[str, Callable[..., Any]] = {
    "norm_pool": _cpu_norm_pool,
    "norm_pool_out": _cpu_norm_pool_out,
}

# `torch` is what torch itself offers on CUDA: the reference, but for the ops it has a kernel for.
_TORCH: dict[str, Callable[..., Any]] = {"varlen_attention": _torch_varlen_attention}


def implementations(op: str) -> tuple[str, ...]:
    """The implementations that `op` has."""
    if op in CPU_ONLY:
        return ("reference", "cpu")
    return tuple(i for i in IMPLEMENTATIONS if i != "cuda" or op not in WITHOUT_CUDA_KERNEL)


def schema_of(op: str, implementation: str) -> str:
    """The schema of an overload: that of the op, less what the implementation lacks."""
    schema = SCHEMAS[op]
    for lacked in LACKED.get(implementation, {}).get(op, ()):
        tensor = lacked.removeprefix("without ")
        for name in (tensor, *_COMPANIONS.get(tensor, ())):
            schema = re.sub(rf", [\w?]+ {name}=[\w.]+", "", schema)
            if tensor != lacked:
                schema = schema.replace(f"Tensor? {name},", f"Tensor {name},")
    return schema


def _in_order_of_definition(op: str) -> list[str]:
    """The implementations of `op`, those with its whole schema behind the others but one.

    When Python ends, torch 2.13 aborts over overloads of one schema that are defined before one of
    another: https://github.com/pytorch/pytorch, torch/csrc/jit/runtime/operator.cpp.
    """
    first, *others = implementations(op)
    return [first, *sorted(others, key=lambda each: schema_of(op, each) == SCHEMAS[op])]


def _gradient_overload(implementation: str, op: str) -> Any:  # noqa: ANN401
    """The overload of `op` that gradients of an implementation are computed with."""
    name = implementation if implementation in implementations(op) else "reference"
    return getattr(getattr(torch.ops.sbert_fast, op), name)


def _register() -> None:
    for op in SCHEMAS:
        for implementation in _in_order_of_definition(op):
            name = f"{op}.{implementation}"
            schema = schema_of(op, implementation)
            _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{NAMESPACE}::{name}", _FAKES[op], lib=_library)
            if not op.endswith("_out"):
                computing = partial(_gradient_overload, implementation)
                formula = autograd.formula(op, implementation, computing)
                torch.library.register_autograd(
                    f"{NAMESPACE}::{name}", formula, setup_context=autograd.save, lib=_library
                )
        specification = getattr(gradients if op in GRADIENTS else reference, op)
        for key in ("CPU", "CUDA"):
            _library.impl(f"{op}.reference", specification, key)
        if "torch" in implementations(op):
            _library.impl(f"{op}.torch", _TORCH.get(op, specification), "CUDA")
        if op in _CPU:
            _library.impl(f"{op}.cpu", _CPU[op], "CPU")
        if op in kernels.LAUNCHERS:
            for key in ("CUDA", "CPU") if kernels.interpreted() else ("CUDA",):
                _library.impl(f"{op}.triton", kernels.launcher(op), key)


_register()
