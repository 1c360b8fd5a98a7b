"""Calls of the public ops in order, and what each of their arguments must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from op_cases import int32
from sbert_fast.packing import plan_tiles
from sbert_fast.testing import pack_lengths

LENGTHS, TOKENS, WIDTH, HEADS, DIM = (3, 5), 16, 96, 6, 16
UNTOUCHED = -7.0


def public_arguments(op: str) -> dict[str, Any]:
    """A call of the public `op` with everything in order."""
    ones, zeros = torch.ones(WIDTH), torch.zeros(WIDTH)
    norm = {"weight": ones, "eps": 1e-12, "rms": False}
    if op == "varlen_attention":
        return {
            "qkv": torch.rand(TOKENS, 3, HEADS, DIM),
            "cu_seqlens": pack_lengths(LENGTHS),
            "max_seqlen": 5,
            "scale": 0.25,
            "bias": torch.zeros(HEADS, 5),
            "window": 3,
            "rotary": (torch.ones(TOKENS, DIM // 2), torch.zeros(TOKENS, DIM // 2)),
            "tiles": torch.from_numpy(plan_tiles(np.array(LENGTHS, np.int32), 4)),
            "causal": False,
            "kv_heads": None,
        }
    if op == "embed_norm":
        return {
            "ids": torch.arange(TOKENS, dtype=torch.int32),
            "positions": torch.arange(TOKENS, dtype=torch.int32),
            "types": torch.ones(TOKENS, dtype=torch.int32),
            "word": torch.rand(50, WIDTH),
            "position_table": torch.rand(40, WIDTH),
            "type_table": torch.rand(2, WIDTH),
            "bias": zeros,
            "out_dtype": torch.float32,
            **norm,
        }
    x = torch.rand(TOKENS, WIDTH)
    if op == "bias_gelu":
        return {"x": x, "bias": zeros, "tanh": False}
    if op == "gated_activation":
        return {"x": x, "bias": zeros, "activation": "silu", "first": False}
    summands = {"x": x, "bias": zeros, "residual": torch.rand(TOKENS, WIDTH), "ln_bias": zeros}
    if op == "add_norm":
        return summands | norm | {"return_sum": False}
    pooled = {
        "cu_seqlens": pack_lengths(LENGTHS),
        "mode": "max",
        "normalize": False,
        "skip": 1,
        "spans": int32([0, 3], [2, 8]),
        "out": torch.full((3, WIDTH), UNTOUCHED),
        "out_rows": int32(2, 0),
    }
    if op == "segment_pool":
        return {"x": x} | pooled
    return summands | norm | pooled


def strided(tensor: Tensor) -> Tensor:
    """The same values in another layout."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def at(index: Any, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def is_(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def second(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda pair: (pair[0], change(pair[1]))


# Argument, what becomes of it, the error, words of the message.
Refusal = tuple[str, Callable[[Any], Any], type[Exception], str]

ATTENTION: list[Refusal] = [
    ("qkv", Tensor.tolist, TypeError, r"qkv must be a torch\.Tensor, got list"),
    ("qkv", Tensor.to_sparse, TypeError, r"qkv must be a dense torch\.Tensor, got sparse_coo"),
    (
        "qkv",
        lambda x: torch.nested.as_nested_tensor(list(x), layout=torch.jagged),
        TypeError,
        "qkv must .* a nested",
    ),
    ("qkv", lambda x: x[0], ValueError, r"qkv must have shape \[T, 3, H, D\], got \[3, 6, 16\]"),
    ("qkv", lambda x: x[:, :2].clone(), ValueError, r"qkv must have .*, got \[16, 2, 6, 16\]"),
    ("qkv", Tensor.int, TypeError, "qkv must be float32 or bfloat16 or .*, got int32"),
    ("qkv", lambda x: x[..., :7].clone(), ValueError, "qkv must .* D from 8 to 256, got 7"),
    ("qkv", lambda x: x[:, :, :0], ValueError, "qkv must have at least one head H, got shape"),
    ("qkv", strided, ValueError, r"qkv must be contiguous, got strides \(576, 192, 32, 2\)"),
    ("cu_seqlens", Tensor.long, TypeError, "cu_seqlens must be int32, got int64"),
    ("cu_seqlens", is_(int32([0, 8])), ValueError, r"cu_seqlens must have shape \[B \+ 1\], got"),
    ("cu_seqlens", is_(int32()), ValueError, r"cu_seqlens must .* B >= 0, got an empty tensor"),
    ("cu_seqlens", meta, ValueError, "cu_seqlens must be on cpu, got meta"),
    ("cu_seqlens", strided, ValueError, r"cu_seqlens must be contiguous, got strides \(2,\)"),
    ("cu_seqlens", at(0, 1), ValueError, "cu_seqlens must start at 0, got 1"),
    ("cu_seqlens", at(1, 9), ValueError, "cu_seqlens must never decrease, got 9 then 8 at index 2"),
    ("cu_seqlens", at(2, 17), ValueError, "cu_seqlens must end at or before T = 16, got 17"),
    ("max_seqlen", is_(4), ValueError, r"max_seqlen must .* longest .* \(5 tokens\), got 4"),
    ("max_seqlen", is_(-1), ValueError, "max_seqlen must be at least 0, got -1"),
    ("max_seqlen", is_(2**63), ValueError, r"max_seqlen must be below 2\^63, got 9223372"),
    ("max_seqlen", is_(True), TypeError, "max_seqlen must be an int, got bool True"),
    ("max_seqlen", is_(5.0), TypeError, r"max_seqlen must be an int, got float 5\.0"),
    ("max_seqlen", is_(torch.tensor(5)), TypeError, r"max_seqlen must .* tensor of shape \[\]"),
    ("max_seqlen", is_(None), TypeError, "max_seqlen must be an int, got None"),
    ("scale", is_(float("nan")), ValueError, "scale must be a finite number, got nan"),
    ("scale", is_(float("inf")), ValueError, "scale must be a finite number, got inf"),
    ("scale", is_("1"), TypeError, "scale must be a number, got str '1'"),
    ("scale", is_(True), TypeError, "scale must be a number, got bool True"),
    ("scale", is_(torch.tensor(1.0)), TypeError, "scale must be a number, got a tensor"),
    ("bias", Tensor.half, TypeError, "bias must be float32, got float16"),
    ("bias", Tensor.double, TypeError, "bias must be float32, got float64"),
    ("bias", lambda x: x[1:], ValueError, r"bias must have shape \[6, 2R \+ 1\], got \[5, 5\]"),
    ("bias", lambda x: x[:, 1:].clone(), ValueError, r"bias must have an odd width .*, got 4"),
    ("bias", strided, ValueError, r"bias must be contiguous, got strides \(10, 2\)"),
    ("bias", meta, ValueError, "bias must be on cpu, got meta"),
    ("window", is_(-2), ValueError, "window must be None or at least 0, got -2"),
    ("window", is_(2.0), TypeError, r"window must be None or an int, got float 2\.0"),
    ("window", is_(True), TypeError, "window must be None or an int, got bool True"),
    ("window", is_((2, 2)), TypeError, r"window must be None or an int, got tuple \(2, 2\)"),
    ("rotary", torch.stack, TypeError, r"rotary must be a tuple .*, got a tensor of shape \[2, 16"),
    ("rotary", lambda pair: pair[:1], ValueError, r"rotary must be a tuple .*, got 1 items"),
    ("rotary", second(is_(None)), TypeError, r"rotary\[1\] must be a torch\.Tensor, got NoneType"),
    ("rotary", second(Tensor.bfloat16), TypeError, r"rotary\[1\] must be float32, got bfloat16"),
    ("rotary", second(lambda x: x[:8]), ValueError, r"rotary\[1\] must have shape \[16, 8\], got"),
    ("rotary", second(meta), ValueError, r"rotary\[1\] must be on cpu, got meta"),
    ("rotary", second(strided), ValueError, r"rotary\[1\] must be contiguous, got strides"),
    ("qkv", lambda x: x[..., :9].clone(), ValueError, "rotary needs an even head dim D, got 9"),
    ("tiles", Tensor.long, TypeError, "tiles must be int32, got int64"),
    ("tiles", lambda x: x[0], ValueError, r"tiles must have shape \[n, 4\], got \[4\]"),
    ("tiles", lambda x: x[:, :3].clone(), ValueError, r"tiles must have .*, got \[3, 3\]"),
    ("tiles", at(0, 9), ValueError, r"tiles must be rows .*, got \[9, 9, 9, 9\] at row 0"),
    ("tiles", at((2, 1), 9), ValueError, r"tiles must be rows .*, got \[7, 9, 1, 1\] at row 2"),
    ("tiles", at((0, 2), -1), ValueError, r"tiles must be rows .*, got \[0, 3, -1, 1\] at row 0"),
    ("tiles", at((0, 0), 1), ValueError, "tiles must .* overlap at token 0"),
    ("tiles", at((1, 1), 8), ValueError, "tiles must .* overlap at token 8"),
    ("tiles", lambda x: x[[0, 2]], ValueError, "tiles must .* overlap at token 3"),
    ("tiles", lambda x: x[:2], ValueError, "tiles must .* overlap at token 7"),
    ("tiles", lambda x: x[:0], ValueError, "tiles must .* overlap at token 0"),
    ("causal", is_(1), TypeError, "causal must be a bool, got int 1"),
    ("kv_heads", is_(0), ValueError, "kv_heads must be None or at least 1, got 0"),
    ("kv_heads", is_(2.0), TypeError, r"kv_heads must be None or an int, got float 2\.0"),
    ("kv_heads", is_(2), ValueError, r"qkv must have shape \[T, H \+ 2 \* kv_heads, D\], got \[16"),
    ("impl", is_("numpy"), ValueError, "impl must be one of auto, .*, got 'numpy'"),
    ("impl", is_(None), ValueError, "impl must be one of auto, .*, got None"),
]

EMBED: list[Refusal] = [
    ("ids", Tensor.long, TypeError, "ids must be int32, got int64"),
    ("ids", lambda x: x[None], ValueError, r"ids must have shape \[T\], got \[1, 16\]"),
    ("ids", strided, ValueError, r"ids must be contiguous, got strides \(2,\)"),
    ("ids", meta, ValueError, "ids must be on cpu, got meta"),
    ("ids", at(3, 50), ValueError, r"ids\[3\] must be in \[0, 50\), the rows of word, got 50"),
    ("ids", at(15, -1), ValueError, r"ids\[15\] must be in \[0, 50\), the rows of word, got -1"),
    ("positions", lambda x: x[1:], ValueError, r"positions must have shape \[16\], got \[15\]"),
    ("positions", Tensor.float, TypeError, "positions must be int32, got float32"),
    ("positions", at(0, 40), ValueError, r"positions\[0\] must be in \[0, 40\), .*_table, got 40"),
    ("positions", at(9, -3), ValueError, r"positions\[9\] must be in \[0, 40\), .*_table, got -3"),
    ("types", Tensor.bool, TypeError, "types must be int32, got bool"),
    ("types", at(2, 2), ValueError, r"types\[2\] must be in \[0, 2\), .* type_table, got 2"),
    ("types", at(2, -2), ValueError, r"types\[2\] must be in \[0, 2\), .* type_table, got -2"),
    ("type_table", is_(None), ValueError, "types was given without type_table"),
    ("type_table", Tensor.half, TypeError, "type_table must be float32, got float16"),
    ("type_table", lambda x: x[:0], ValueError, "type_table must have a row for type 0, got 0"),
    ("type_table", strided, ValueError, "type_table must be contiguous, got strides"),
    ("word", lambda x: x[:0], ValueError, r"ids\[0\] must be in \[0, 0\), the rows of word, got 0"),
    ("word", lambda x: x[:, :0], ValueError, "word must have at least one column, got shape"),
    ("word", Tensor.numpy, TypeError, r"word must be a torch\.Tensor, got ndarray"),
    ("word", strided, ValueError, "word must be contiguous, got strides"),
    ("word", Tensor.int, TypeError, "word must be float32 or .*, got int32"),
    ("position_table", is_(None), ValueError, "positions was given without position_table: pass"),
    ("positions", is_(None), ValueError, "position_table was given without positions: pass both"),
    ("weight", is_(None), ValueError, "bias was given without weight: pass both, weight alone, or"),
    ("rms", is_(1), TypeError, "rms must be a bool, got int 1"),
    ("position_table", Tensor.bfloat16, TypeError, "position_table must be float32, got bfloat16"),
    ("position_table", lambda x: x[:, 1:], ValueError, r"position_table .* \[P, 96\], got \[40, 9"),
    ("position_table", meta, ValueError, "position_table must be on cpu, got meta"),
    ("weight", Tensor.bfloat16, TypeError, "weight must be float32, got bfloat16"),
    ("weight", lambda x: x[1:], ValueError, r"weight must have shape \[96\], got \[95\]"),
    ("bias", Tensor.double, TypeError, "bias must be float32, got float64"),
    ("bias", strided, ValueError, r"bias must be contiguous, got strides \(2,\)"),
    ("eps", is_(-1e-12), ValueError, "eps must be a finite number of at least 0, got -1e-12"),
    ("out_dtype", is_("float32"), TypeError, r"out_dtype must be a torch\.dtype .*'float32'"),
    ("out_dtype", is_(torch.int32), TypeError, "out_dtype must be float32 or .*, got int32"),
    ("out_dtype", is_(torch.float64), TypeError, "out_dtype must be float32 or .*, got float64"),
]

NORM: list[Refusal] = [
    ("x", lambda x: x[0], ValueError, r"x must have shape \[T, E\], got \[96\]"),
    ("x", strided, ValueError, r"x must be contiguous, got strides \(192, 2\)"),
    ("x", Tensor.long, TypeError, "x must be float32 or .*, got int64"),
    ("x", lambda x: x[:, :0], ValueError, r"x must have at least one column, got shape \[16, 0\]"),
    ("bias", Tensor.half, TypeError, "bias must be float32, got float16"),
    ("bias", lambda x: x[None], ValueError, r"bias must have shape \[96\], got \[1, 96\]"),
    ("residual", lambda x: x[1:], ValueError, r"residual must have shape \[16, 96\], got \[15"),
    ("residual", Tensor.bfloat16, TypeError, "residual must be float32, got bfloat16"),
    ("residual", strided, ValueError, "residual must be contiguous, got strides"),
    ("residual", meta, ValueError, "residual must be on cpu, got meta"),
    ("weight", is_(None), TypeError, r"weight must be a torch\.Tensor, got NoneType"),
    ("weight", Tensor.double, TypeError, "weight must be float32, got float64"),
    ("weight", strided, ValueError, r"weight must be contiguous, got strides \(2,\)"),
    ("weight", meta, ValueError, "weight must be on cpu, got meta"),
    ("ln_bias", Tensor.bfloat16, TypeError, "ln_bias must be float32, got bfloat16"),
    ("ln_bias", lambda x: x[1:], ValueError, r"ln_bias must have shape \[96\], got \[95\]"),
    ("eps", is_(-1.0), ValueError, "eps must be a finite number of at least 0, got -1.0"),
    ("eps", is_(float("nan")), ValueError, "eps must be a finite number of at least 0, got nan"),
    ("eps", is_(float("inf")), ValueError, "eps must be a finite number of at least 0, got inf"),
    ("eps", is_(10**400), ValueError, "eps must be a finite number of at least 0, got 1000"),
    ("eps", is_("1e-5"), TypeError, "eps must be a number, got str '1e-5'"),
    ("eps", is_(None), TypeError, "eps must be a number, got None"),
    ("eps", is_(True), TypeError, "eps must be a number, got bool True"),
    ("rms", is_("rms"), TypeError, "rms must be a bool, got str 'rms'"),
]

GELU: list[Refusal] = [
    ("x", is_([1.0]), TypeError, r"x must be a torch\.Tensor, got list"),
    ("x", Tensor.bool, TypeError, "x must be float32 or .*, got bool"),
    ("x", strided, ValueError, "x must be contiguous, got strides"),
    ("bias", Tensor.bfloat16, TypeError, "bias must be float32, got bfloat16"),
    ("bias", lambda x: x[1:], ValueError, r"bias must have shape \[96\], got \[95\]"),
    ("tanh", is_(1), TypeError, "tanh must be a bool, got int 1"),
    ("tanh", is_("tanh"), TypeError, "tanh must be a bool, got str 'tanh'"),
]

GATED: list[Refusal] = [
    ("x", lambda x: x[:, 1:].clone(), ValueError, "x must have an even number of .*, got 95"),
    ("x", lambda x: x[:, :0], ValueError, r"x must have at least one column, got shape \[16, 0\]"),
    ("bias", lambda x: x[1:], ValueError, r"bias must have shape \[96\], got \[95\]"),
    ("activation", is_("relu"), ValueError, "activation must be one of gelu, .*, got 'relu'"),
    ("activation", is_(3), TypeError, "activation must be one of gelu, gelu_tanh, silu, got int 3"),
    ("activation", is_("none"), ValueError, "activation must be one of gelu, .*, got 'none'"),
    ("first", is_(0), TypeError, "first must be a bool, got int 0"),
]

POOL: list[Refusal] = [
    ("cu_seqlens", Tensor.long, TypeError, "cu_seqlens must be int32, got int64"),
    ("cu_seqlens", is_(int32()), ValueError, "cu_seqlens must .* got an empty tensor"),
    ("cu_seqlens", at(1, 9), ValueError, "cu_seqlens must never decrease, got 9 then 8 at index 2"),
    # In 32 bits their difference is positive.
    (
        "cu_seqlens",
        is_(int32(0, 5, -(2**31), 8)),
        ValueError,
        "cu_seqlens .* 5 then -2147483648 at",
    ),
    ("cu_seqlens", at(2, 17), ValueError, "cu_seqlens must end at or before T = 16, got 17"),
    ("mode", is_("sum"), ValueError, "mode must be one of mean, .*, got 'sum'"),
    ("mode", is_(0), TypeError, "mode must be one of mean, .*, got int 0"),
    ("normalize", is_(1), TypeError, "normalize must be a bool, got int 1"),
    ("normalize", is_(None), TypeError, "normalize must be a bool, got None"),
    ("skip", is_(-1), ValueError, "skip must be at least 0, got -1"),
    ("skip", is_(1.0), TypeError, r"skip must be an int, got float 1\.0"),
    ("skip", is_(True), TypeError, "skip must be an int, got bool True"),
    ("skip", is_(10**5000), ValueError, r"skip must be below 2\^63, got a huge int"),
    ("skip", is_(2**63), ValueError, r"skip must be below 2\^63, got 9223372036854775808"),
    ("spans", Tensor.long, TypeError, "spans must be int32, got int64"),
    ("spans", lambda x: x[0], ValueError, r"spans must have shape \[P, 2\], got \[2\]"),
    ("spans", is_(int32([0, 3], [5, 4])), ValueError, r"spans\[1\] must be .*, got \[5, 4\]"),
    ("spans", is_(int32([-1, 3], [2, 4])), ValueError, r"spans\[0\] must be .*, got \[-1, 3\]"),
    ("spans", is_(int32([0, 3], [2, 9])), ValueError, r"spans\[1\] .* <= end <= 8, .* \[2, 9\]"),
    ("spans", strided, ValueError, r"spans must be contiguous, got strides"),
    ("out", is_(None), ValueError, "out_rows was given without out"),
    ("out", Tensor.double, TypeError, "out must be float32, got float64"),
    ("out", lambda x: x[:, 1:], ValueError, r"out must have shape \[N, 96\], got \[3, 95\]"),
    ("out", strided, ValueError, r"out must have a unit inner .*, got strides \(192, 2\)"),
    ("out", expanded, ValueError, r"out must have .* rows apart, got strides \(0, 1\)"),
    ("out", meta, ValueError, "out must be on cpu, got meta"),
    ("out_rows", Tensor.long, TypeError, "out_rows must be int32, got int64"),
    ("out_rows", lambda x: x[1:], ValueError, r"out_rows must have shape \[2\], got \[1\]"),
    ("out_rows", at(1, 3), ValueError, r"out_rows\[1\] must be in \[0, 3\), .* of out, got 3"),
    ("out_rows", at(0, -1), ValueError, r"out_rows\[0\] must be in \[0, 3\), .* of out, got -1"),
    ("out_rows", is_(int32(2, 2)), ValueError, "out_rows must name a row at .*, got 2 twice"),
    ("out_rows", meta, ValueError, "out_rows must be on cpu, got meta"),
]

SEGMENT_POOL: list[Refusal] = [
    ("x", lambda x: x[0], ValueError, r"x must have shape \[T, E\], got \[96\]"),
    ("x", Tensor.int, TypeError, "x must be float32 or .*, got int32"),
    ("x", strided, ValueError, r"x must have a unit inner stride, got strides \(192, 2\)"),
    ("x", lambda x: x[:, :0], ValueError, r"x must have at least one column, got shape \[16, 0\]"),
]

TABLES = {
    "varlen_attention": ATTENTION,
    "embed_norm": EMBED,
    "add_norm": [*NORM, ("return_sum", is_(1), TypeError, "return_sum must be a bool, got int 1")],
    "bias_gelu": GELU,
    "gated_activation": GATED,
    "segment_pool": SEGMENT_POOL + POOL,
    "norm_pool": NORM + POOL,
}
