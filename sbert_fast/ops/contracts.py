"""What the public ops ask of their arguments, the same whichever implementation runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbert_fast.ops import integers, validation
from sbert_fast.ops.dropout import draw_seed
from sbert_fast.ops.reference import POOLING_MODES, Activation
from sbert_fast.values import shown

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
# Of what a gate multiplies.
ACTIVATIONS = tuple(a.name.lower() for a in Activation if a != Activation.NONE)


def pooling_mode(mode: str) -> int:
    return _one_of("mode", mode, POOLING_MODES)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> int:
    """The place of `value` among the names that an argument takes."""
    expected = f"{name} must be one of {', '.join(known)}"
    if not isinstance(value, str):
        raise TypeError(f"{expected}, got {validation.describe(value)}")
    if value not in known:
        raise ValueError(f"{expected}, got {shown(value)}")
    return known.index(value)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    tiles: Tensor | None,
    kv_heads: int | None = None,
) -> tuple[int, int, int]:
    """Check what attention runs over; `max_seqlen`, heads and `kv_heads` (0 for None) come back."""
    if kv_heads is None:
        validation.activations("qkv", qkv, ("T", 3, "H", "D"))
        heads, kv_heads = qkv.shape[2], 0
    else:
        kv_heads = validation.integer("kv_heads", kv_heads, 1, optional=True)
        validation.activations("qkv", qkv, ("T", "H + 2 * kv_heads", "D"))
        heads = qkv.shape[1] - 2 * kv_heads
        if heads > 0 and heads % kv_heads:
            raise ValueError(f"kv_heads must divide the {heads} heads of qkv, got {kv_heads}")
    tokens, dim = qkv.shape[0], qkv.shape[-1]
    if heads <= 0:
        raise ValueError(f"qkv must have at least one head H, got shape {list(qkv.shape)}")
    if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"qkv must have a head dim D from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {dim}"
        )
    sequences(cu_seqlens, qkv.device)
    longest = validation.integer(
        "max_seqlen", max_seqlen, None if torch.compiler.is_compiling() else 0
    )
    if tiles is not None:
        validation.integers("tiles", tiles, ("n", 4), qkv.device)
    ends = integers.cu_seqlens(cu_seqlens, tokens, longest)
    if tiles is not None and ends is not None:
        integers.tiles(tiles, ends)
    return longest, heads, kv_heads


def sequences(cu_seqlens: Tensor, where: torch.device) -> None:
    validation.integers("cu_seqlens", cu_seqlens, ("B + 1",), where)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have shape [B + 1] with B >= 0, got an empty tensor")


def relative_bias(bias: Tensor, qkv: Tensor, heads: int) -> None:
    """Check the bias `[H, 2R + 1]` of attention."""
    validation.parameter("bias", bias, (heads, "2R + 1"), qkv)
    if bias.shape[1] % 2 == 0:
        raise ValueError(f"bias must have an odd width 2R + 1, got {bias.shape[1]}")


def rotary(tables: Sequence[Tensor], qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Check the tables `(cos, sin)` of attention."""
    if not isinstance(tables, (tuple, list)):
        raise TypeError(
            f"rotary must be a tuple (cos, sin) or None, got {validation.describe(tables)}"
        )
    if len(tables) != 2:
        raise ValueError(f"rotary must be a tuple (cos, sin), got {len(tables)} items")
    tokens, dim = qkv.shape[0], qkv.shape[-1]
    if dim % 2:
        raise ValueError(f"rotary needs an even head dim D, got {dim}")
    for index, table in enumerate(tables):
        validation.parameter(f"rotary[{index}]", table, (tokens, dim // 2), qkv)
    return tables[0], tables[1]


def head_norm(norm: Sequence[Any] | None, qkv: Tensor) -> dict[str, Any]:
    """Check the norm of the heads of attention; the options of its op come back."""
    if norm is None:
        return {}
    if not isinstance(norm, (tuple, list)) or len(norm) != 3:
        raise TypeError(
            "head_norm must be a tuple (query_weight, key_weight, eps) or None, got "
            f"{validation.describe(norm)}"
        )
    for index, weight in enumerate(norm[:2]):
        validation.parameter(f"head_norm[{index}]", weight, (qkv.shape[-1],), qkv)
    eps = validation.number("head_norm[2]", norm[2])
    if eps < 0:
        raise ValueError(f"head_norm[2] must be at least 0, got {eps}")
    return {"query_norm": norm[0], "key_norm": norm[1], "norm_eps": eps}


def disentangled(parts: Sequence[Any] | None, qkv: Tensor, heads: int) -> dict[str, Any]:
    """Check what distances add to the products of attention; the options of its op come back."""
    if parts is None:
        return {}
    if not isinstance(parts, (tuple, list)) or len(parts) != 3:
        raise TypeError(
            "disentangled must be a tuple (position_keys, position_queries, buckets) or None, got "
            f"{validation.describe(parts)}"
        )
    rows: int | str = "P"
    for index, table in enumerate(parts[:2]):
        if table is not None:
            validation.like(f"disentangled[{index}]", table, (heads, rows, qkv.shape[-1]), qkv)
            rows = table.shape[1]
    if isinstance(rows, str):
        raise ValueError("disentangled must have position_keys or position_queries, got neither")
    buckets = parts[2]
    validation.integers("disentangled[2]", buckets, ("2R + 1",), qkv.device)
    if buckets.shape[0] % 2 == 0:
        raise ValueError(f"disentangled[2] must have an odd length 2R + 1, got {buckets.shape[0]}")
    integers.indices("disentangled[2]", buckets, rows, "the tables")
    return {"position_keys": parts[0], "position_queries": parts[1], "buckets": buckets}


def dropout(rate: float, seed: Tensor | None, qkv: Tensor) -> dict[str, Any]:
    """Check the dropout of attention weights; the options of its op come back."""
    rate = validation.number("dropout", rate, 0)
    if rate >= 1:
        raise ValueError(f"dropout must be less than 1, got {rate}")
    if seed is not None:
        validation.shape("seed", seed, (1,))
        validation.dtype("seed", seed, (torch.int64,))
        validation.device("seed", seed, qkv.device)
    if rate == 0:
        return {}
    return {"dropout": rate, "seed": draw_seed(qkv.device) if seed is None else seed}


def embedding(
    ids: Tensor,
    positions: Tensor | None,
    types: Tensor | None,
    word: Tensor,
    position_table: Tensor | None,
    type_table: Tensor | None,
) -> None:
    """Check ids and the tables they index."""
    validation.activations("word", word, ("V", "E"))
    width = validation.columns("word", word)
    if (positions is None) != (position_table is None):
        given, other = ("positions", "position_table")[:: 1 if position_table is None else -1]
        raise ValueError(f"{given} was given without {other}: pass both or neither")
    if position_table is not None:
        validation.like("position_table", position_table, ("P", width), word)
    if type_table is not None:
        validation.like("type_table", type_table, ("N", width), word)
        if type_table.shape[0] == 0:
            raise ValueError("type_table must have a row for type 0, got 0 rows")
    validation.integers("ids", ids, ("T",), word.device)
    if positions is not None:
        validation.integers("positions", positions, (ids.shape[0],), word.device)
    if types is not None:
        if type_table is None:
            raise ValueError("types was given without type_table: pass both or neither")
        validation.integers("types", types, (ids.shape[0],), word.device)
        integers.indices("types", types, type_table.shape[0], "type_table")
    integers.indices("ids", ids, word.shape[0], "word")
    if positions is not None and position_table is not None:
        integers.indices("positions", positions, position_table.shape[0], "position_table")


def embedding_norm(
    weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, word: Tensor
) -> tuple[Tensor | None, Tensor | None, float]:
    """Check the norm of embeddings, which there may be none of, and return it."""
    validation.flag("rms", rms)
    eps = validation.number("eps", eps, 0)
    width = word.shape[1]
    if weight is None:
        if bias is not None:
            raise ValueError("bias was given without weight: pass both, weight alone, or neither")
        return None, None, eps
    validation.parameter("weight", weight, (width,), word)
    return weight, norm_bias("bias", bias, weight, word), eps


def norm_bias(name: str, bias: Tensor | None, weight: Tensor, x: Tensor) -> Tensor:
    """Check the bias of a norm; that of a norm without one is zeros."""
    if bias is None:
        return torch.zeros_like(weight)
    validation.parameter(name, bias, tuple(weight.shape), x)
    return bias


def activation(name: str) -> int:
    return Activation[ACTIVATIONS[_one_of("activation", name, ACTIVATIONS)].upper()].value


def embedding_dtype(out_dtype: torch.dtype | None, word: Tensor) -> torch.dtype:
    """The dtype of embeddings from the table `word`; fp32 tables also serve 16-bit results."""
    if out_dtype is None:
        return word.dtype
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(
            f"out_dtype must be a torch.dtype or None, got {validation.describe(out_dtype)}"
        )
    allowed = validation.FLOATS[:3] if word.dtype == torch.float32 else (word.dtype,)
    if out_dtype not in allowed:
        raise TypeError(
            f"out_dtype must be {validation.either(allowed)} where word is {str(word.dtype)[6:]}, "
            f"got {str(out_dtype)[6:]}"
        )
    return out_dtype


def norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, float]:
    """Check a norm over `x + bias + residual`; `ln_bias` and `eps` come back."""
    validation.activations("x", x, ("T", "E"))
    width = validation.columns("x", x)
    if bias is not None:
        validation.parameter("bias", bias, (width,), x)
    if residual is not None:
        validation.like("residual", residual, tuple(x.shape), x)
    validation.parameter("weight", weight, (width,), x)
    ln_bias = norm_bias("ln_bias", ln_bias, weight, x)
    validation.flag("rms", rms)
    return ln_bias, validation.number("eps", eps, 0)


def pooling(
    x: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool, skip: int, spans: Tensor | None
) -> tuple[int, bool, int, Tensor | None]:
    """Check how the tokens of `x` are pooled; the arguments of the schema come back."""
    sequences(cu_seqlens, x.device)
    code = pooling_mode(mode)
    validation.flag("normalize", normalize)
    skip = validation.integer("skip", skip, 0)
    if spans is not None:
        validation.integers("spans", spans, ("P", 2), x.device)
    ends = integers.cu_seqlens(cu_seqlens, x.shape[0])
    if spans is not None and ends is not None:
        integers.spans(spans, int(ends[-1]))
    return code, normalize, skip, spans


def pooled_rows(
    op: str,
    x: Tensor,
    cu_seqlens: Tensor,
    spans: Tensor | None,
    out: Tensor | None,
    out_rows: Tensor | None,
    residual: Tensor | None = None,
) -> None:
    """Check where the pooled rows of `x`, to which `residual` was added, go."""
    if out is None:
        if out_rows is not None:
            raise ValueError("out_rows was given without out: pass both or neither")
        return
    rows = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    width = x.shape[1]
    validation.shape("out", out, ("N", width))
    validation.dtype("out", out, (torch.float32,))
    validation.device("out", out, x.device)
    if (out.stride(1) != 1 and width > 1) or (out.stride(0) < width and out.shape[0] > 1):
        raise ValueError(
            f"out must have a unit inner stride and rows apart, got strides {out.stride()}"
        )
    validation.apart("out", out, {"x": x, "residual": residual})
    no_grad(op, x, out)
    if out_rows is not None:
        validation.integers("out_rows", out_rows, (rows,), x.device)
        integers.indices("out_rows", out_rows, out.shape[0], "out")
        integers.distinct("out_rows", out_rows)
    elif out.shape[0] < rows:
        raise ValueError(f"out must have at least {rows} rows, got {out.shape[0]}")


def no_grad(op: str, *tensors: Tensor | None) -> None:
    """Refuse inputs whose gradient would be lost by an op that writes into `out`."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"{op} with out= has no backward: call it under torch.inference_mode() or without out="
        )
