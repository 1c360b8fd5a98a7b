"""Attention over packed sequences: what is launched. `attention.py` tells what the kernels compute.

Launch parameters are the static table of `tuning.py`. tests/test_triton_attention_builds.py
compiles something of every kind for sm_90 and what needs most for sm_80, 100 and 120, and fails if
one spills.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sbert_fast.kernels import tuning
from sbert_fast.kernels.attention import long_kernel, short_kernel

SHORTEST = 16
LOG2_E = math.log2(math.e)
_MAX_OFFSET = 2**31 - 1
MIN_WIDTH = 16


class Launch(NamedTuple):
    """A kernel, the number of its programs, its arguments by position and by name."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Options(NamedTuple):
    """The arguments of the op that have defaults."""

    causal: bool = False
    kv_heads: int = 0
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    norm_eps: float = 0.0
    position_keys: Tensor | None = None
    position_queries: Tensor | None = None
    buckets: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None


_DEFAULTS = Options()


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    tiles: Tensor | None,
    causal: bool = False,
    kv_heads: int = 0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    position_keys: Tensor | None = None,
    position_queries: Tensor | None = None,
    buckets: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Launch the kernels; what they compute is told in :func:`sbert_fast.ops.varlen_attention`.

    Args:
        qkv: fp16, bf16 or fp32 `[T, 3, H, D]`, or with `kv_heads` `[T, H + 2 * kv_heads, D]`,
            contiguous, 8 <= D <= 256.
        cu_seqlens: int32 `[B + 1]`.
        max_seqlen: at least the longest sequence, in tokens.
        scale: factor of the logits.
        bias: fp32 `[H, 2R + 1]` or None.
        window: largest distance of a key, or -1.
        rotary_cos, rotary_sin: fp32 `[T, D/2]` or None.
        tiles: int32 `[n, 4]`, or None.
        causal: keep keys up to the query only.
        kv_heads: heads of keys and values, a divisor of H; 0 is one for every query head.
        query_norm, key_norm: fp32 `[D]`, weights of RMSNorm of every head, or None.
        norm_eps: epsilon of that norm.
        position_keys, position_queries: `[H, P, D]`, dtype of `qkv`, or None.
        buckets: int32 `[2R + 1]`, their rows by distance, or None.
        dropout: share of the weights that become 0, in [0, 1).
        seed: int64 `[1]`, or None where nothing is dropped.

    Returns:
        `[T, H, D]`, dtype of `qkv`; zeros in the dead tail.
    """
    out = qkv.new_empty(qkv.shape[0], _heads(qkv, kv_heads), qkv.shape[-1])
    if out.numel() > 0:
        tables = (bias, rotary_cos, rotary_sin)
        capability = torch.cuda.get_device_capability(qkv.device) if qkv.is_cuda else (0, 0)
        norms, rows = (query_norm, key_norm, norm_eps), (position_keys, position_queries, buckets)
        more = Options(causal, kv_heads, *norms, *rows, dropout, seed)
        for kernel, programs, arguments, options in plan(
            qkv, out, cu_seqlens, max_seqlen, scale, window, tables, tiles, capability, more
        ):
            kernel[(programs,)](*arguments, **options)
    return out


def _heads(qkv: Tensor, kv_heads: int) -> int:
    """Heads of queries."""
    return qkv.shape[1] - 2 * kv_heads if kv_heads else qkv.shape[2]


def plan(
    qkv: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
    tiles: Tensor | None,
    capability: tuple[int, int],
    more: Options = _DEFAULTS,
) -> Iterator[Launch]:
    """What to launch, the dead tail cleared by the first; tensors of any device, `meta` too.

    Args:
        out: `[T, H, D]`, at least one element.
        tables: bias, rotary cos, rotary sin.
        capability: compute capability of the device.
        more: the arguments of the op that have defaults.
    """
    tokens, heads, dim = qkv.shape[0], _heads(qkv, more.kv_heads), qkv.shape[-1]
    kv_heads = more.kv_heads or heads
    sequences = cu_seqlens.shape[0] - 1
    constants = fixed_constants(qkv, heads, scale, window, tables, more)
    config = tuning.attention(
        constants["WIDTH"],
        qkv.element_size() * 8,
        max_seqlen,
        plain=is_plain(window, tables, more),
        rotary=constants["ROTARY"],
        normed=more.query_norm is not None,
        disentangled=more.buckets is not None,
        capability=capability,
    )
    bias = tables[0]
    reach = 0 if bias is None else bias.shape[1] // 2
    eps = None if more.query_norm is None else more.norm_eps
    seed, *rate = drops(more.dropout, more.seed)
    numbers = (scale * LOG2_E, reach, window, eps, *_sizes(more), *rate)
    by_distance = (more.position_keys, more.position_queries, more.buckets)
    tensors = (*tables, more.query_norm, more.key_norm, *by_distance, seed)

    if config.group * max_seqlen * (heads + 2 * kv_heads) * dim > _MAX_OFFSET:
        # A group lies behind its longest sequence. Alone, a short one has no offset.
        config = replace(config, group=1, group_warps=config.group_warps // config.group)
    groups = max(1, triton.cdiv(sequences, config.group))
    together = tuning.heads_together(config.heads, heads, groups)
    yield Launch(
        short_kernel,
        groups * (heads // together),
        (qkv, out, cu_seqlens, *tensors, tokens, sequences, *numbers),
        constants | _short_options(config, together, max_seqlen),
    )
    q_blocks = triton.cdiv(max_seqlen, config.block_q)
    num_tiles = sequences * q_blocks if tiles is None else tiles.shape[0]
    if more.buckets is not None and qkv.element_size() == 4 and constants["WIDTH"] > 32:
        # Whole rows of fp32, of q, k and by distance, would take all 255 registers.
        constants["SIDE"] = constants["WIDTH"] // 2
    if max_seqlen > config.short and num_tiles > 0:
        yield Launch(
            long_kernel,
            num_tiles * heads,
            (qkv, out, cu_seqlens, tiles, *tensors, q_blocks, *numbers),
            constants | {"TILES": tiles is not None} | _long_options(config, constants),
        )


def fixed_constants(
    qkv: Tensor,
    heads: int,
    scale: float,
    window: int,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
    more: Options,
) -> dict[str, Any]:
    """The constants of both kernels."""
    dim, (bias, rotary, _) = qkv.shape[-1], tables
    width = max(MIN_WIDTH, triton.next_power_of_2(dim))
    # In one piece, what is normed or wide and turned would not fit the registers.
    halved = more.query_norm is not None or (rotary is not None and width > 128)
    return {
        "H": heads,
        "KV": more.kv_heads or heads,
        "D": dim,
        "WIDTH": width,
        "SIDE": max(MIN_WIDTH, width // 2) if halved else 0,
        "BIAS": bias is not None,
        "WINDOW": window >= 0,
        "CAUSAL": more.causal,
        "ROTARY": rotary is not None,
        "PLAIN": bias is None and scale > 0,
        "PRECISION": _precision(qkv.dtype),
    }


def is_plain(
    window: int, tables: tuple[Tensor | None, Tensor | None, Tensor | None], more: Options
) -> bool:
    """Whether keys are loaded as they are, and all of a sequence are attended to alike."""
    extras = (*tables, more.query_norm, more.buckets)
    return all(t is None for t in extras) and window < 0 and not (more.causal or more.dropout)


def drops(rate: float, seed: Tensor | None) -> tuple[Tensor | None, int | None, float | None]:
    """What kernels take of dropout: the seed, the threshold of its words, and the factor of the
    weights that stay.

    Raises:
        ValueError: there is a rate and no seed.
    """
    if rate == 0:
        return None, None, None
    if seed is None:
        raise ValueError("seed must be given with dropout, got None")
    return seed, int(rate * 2**32), 1 / (1 - rate)


def _sizes(more: Options) -> tuple[int | None, int | None]:
    """P and R of the tables by distance."""
    if more.buckets is None:
        return None, None
    some = (more.position_keys, more.position_queries)
    return next(t.shape[1] for t in some if t is not None), more.buckets.shape[0] // 2


def _short_options(config: tuning.Attention, together: int, max_seqlen: int) -> dict[str, Any]:
    return {
        "HEADS": together,
        "GROUP": config.group,
        "SHORTEST": SHORTEST,
        "SHORT": SHORTEST if max_seqlen <= SHORTEST else config.short,
        "STAGES": config.head_stages,
        "num_warps": config.group_warps,
    }


def _long_options(config: tuning.Attention, constants: dict[str, Any]) -> dict[str, Any]:
    dim, width = constants["D"], constants["WIDTH"]
    return {
        "SHORT": config.short,
        "BLOCK_Q": config.block_q,
        "BLOCK": config.block,
        "STAGES": config.stages,
        "num_warps": config.warps,
        # Wide rows of no power of two are addressed column by column, which takes more registers.
        "maxnreg": config.registers if dim == width or width < 64 else None,
    }


def _precision(dtype: torch.dtype) -> str:
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"
