"""The peers of the op benchmarks: the same formulas by what torch brings.

A maker takes the arguments of an op's schema, lays them out as its system wants them (not timed),
and returns what is timed: a call without arguments whose result has the op's shape, or, where
the system's own layout differs, a :class:`Laid` that knows how to read it. A maker that fails says
why its system cannot run here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_fast import ops
from sbert_fast.testing import PEERS

Maker = Callable[..., Callable[[], Any]]

VARLEN, SDPA, FLEX = "varlen_attn", "padded SDPA", "FlexAttention"
FA3, FA4, CUDNN = "varlen_attn FA3", "varlen_attn FA4", "padded cuDNN"
# Our CUDA op by the kernel of every GPU, where this one has a kernel of its own.
MMA = "sbert-fast cuda, mma.sync"
EAGER, COMPILED = "eager torch", "torch.compile"
ROW_PEERS = (EAGER, COMPILED)
# Rectangles that length-sorted sequences are padded to.
_RECTANGLES = 8
_FLEX_BLOCK = 128


class Laid(NamedTuple):
    """A result in its system's own layout, and how to read it as `[T, ...]`."""

    value: Any
    read: Callable[[Any], Tensor]


def as_packed(result: Any) -> Tensor:
    """A result of any system in the op's shape."""
    return result.read(result.value) if isinstance(result, Laid) else result


def within(context: Any, call: Any) -> Any:
    """The function `call`, which must run inside a context, see :func:`stopwatch.context_of`."""
    call.context = context
    return call


def makers(op: str, lengths: list[int]) -> dict[str, Maker]:
    """The peers of `op` by name; `lengths` are those of the packed sequences."""
    if op == "varlen_attention":
        return {
            VARLEN: _varlen,
            SDPA: partial(_padded_sdpa, lengths),
            FLEX: partial(_flex, lengths),
            FA3: partial(_varlen_by, "FA3"),
            FA4: partial(_varlen_by, "FA4"),
            CUDNN: partial(_cudnn, lengths),
            MMA: _without_sm90,
        }
    return {EAGER: partial(_formula, op, False), COMPILED: partial(_formula, op, True)}


def _varlen(qkv: Tensor, cu_seqlens: Tensor, longest: int, *_: Any) -> Callable[[], Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    return lambda: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


@contextmanager
def _flash_attention(name: str) -> Iterator[None]:
    """The flash attention that torch calls, for a while: "FA3" or "FA4"."""
    from torch.nn import attention

    for needed in ("activate_flash_attention_impl", "restore_flash_attention_impl"):
        if not hasattr(attention, needed):
            raise RuntimeError(f"torch {torch.__version__} has no {needed}")
    attention.activate_flash_attention_impl(name)
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


def _varlen_by(name: str, *arguments: Any) -> Callable[[], Tensor]:
    with _flash_attention(name):  # says so where it is not installed
        return within(partial(_flash_attention, name), _varlen(*arguments))


def _cudnn(lengths: list[int], qkv: Tensor, *_: Any) -> Callable[[], Laid]:
    """The rectangles of padded SDPA, by cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if qkv.device.type != "cuda":
        raise RuntimeError("cuDNN has no attention for a CPU")
    return within(partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION), _padded_sdpa(lengths, qkv))


@contextmanager
def _sm90_left_out() -> Iterator[None]:
    """The library asks for this at every launch."""
    os.environ["SBERT_FAST_CUDA_SM90"] = "0"
    try:
        yield
    finally:
        del os.environ["SBERT_FAST_CUDA_SM90"]


def _without_sm90(qkv: Tensor, *rest: Any) -> Callable[[], Tensor]:
    if torch.cuda.get_device_capability(qkv.device) != (9, 0):
        raise RuntimeError("the kernel of compute capability 9.0 does not run here")
    kernel = ops.bind("varlen_attention", qkv.device, qkv.dtype, "cuda", head_dim=qkv.shape[-1])
    return within(_sm90_left_out, lambda: kernel(qkv, *rest))


def _padded_sdpa(lengths: list[int], qkv: Tensor, *_: Any) -> Callable[[], Laid]:
    """Sequences sorted by length in a few rectangles, masked where one is not full."""
    device = qkv.device
    starts = np.concatenate(([0], np.cumsum(lengths)))
    order = np.argsort(lengths, kind="stable")
    parts, places = [], []
    for rows in np.array_split(order, min(_RECTANGLES, len(order))):
        width = int(max(lengths[i] for i in rows))
        live = torch.tensor([[j < lengths[i] for j in range(width)] for i in rows], device=device)
        at = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in rows]).to(device)
        padded = qkv.new_zeros(len(rows), width, *qkv.shape[1:])
        padded[live] = qkv[at]
        # As three linear layers give them.
        q, k, v = (t.contiguous().transpose(1, 2) for t in padded.unbind(2))
        mask = None if live.all() else live[:, None, None, :]
        parts.append((q, k, v, mask))
        places.append((live, at))

    def run() -> Laid:
        outs = [F.scaled_dot_product_attention(q, k, v, attn_mask=m) for q, k, v, m in parts]
        return Laid(outs, read)

    def read(outs: list[Tensor]) -> Tensor:
        packed = qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
        for out, (live, at) in zip(outs, places, strict=True):
            packed[at] = out.transpose(1, 2)[live]
        return packed

    return run


def document_mask(lengths: list[int], device: torch.device) -> Any:
    """FlexAttention's block mask of packed sequences: a token attends to those of its own.

    Blocks are computed on the host: torch's own way looks at every pair of tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    ends = np.cumsum(lengths)
    starts, owners = ends - lengths, owner.numpy()
    blocks = -(-tokens // _FLEX_BLOCK)
    first = np.arange(blocks) * _FLEX_BLOCK
    last = np.minimum(first + _FLEX_BLOCK, tokens) - 1
    low = starts[owners[first]] // _FLEX_BLOCK
    high = (ends[owners[last]] - 1) // _FLEX_BLOCK
    count = torch.from_numpy(high - low + 1).int()
    indices = torch.from_numpy(low)[:, None].int() + torch.arange(blocks, dtype=torch.int32)
    indices = torch.where(torch.arange(blocks) < count[:, None], indices, 0).int()
    owner = owner.to(device)

    def same_sequence(b: Any, h: Any, q: Any, k: Any) -> Any:
        return owner[q] == owner[k]

    return BlockMask.from_kv_blocks(
        count[None, None].to(device),
        indices[None, None].to(device),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=same_sequence,
        seq_lengths=(tokens, tokens),
    )


@cache
def _flex_attention(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # On a CPU, where it serves as a check only, the uncompiled one is enough.
    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def _flex(lengths: list[int], qkv: Tensor, *_: Any) -> Callable[[], Laid]:
    mask = document_mask(lengths, qkv.device)
    q, k, v = (t.transpose(0, 1)[None] for t in qkv.unbind(1))
    attend = _flex_attention(qkv.device.type)

    def read(out: Tensor) -> Tensor:
        return out[0].transpose(0, 1)

    return lambda: Laid(attend(q, k, v, block_mask=mask), read)


def _segments(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of every token, int64 `[T]`, and the tokens of every sequence, fp32 `[B, 1]`."""
    lengths = cu_seqlens.diff().long()
    every = torch.arange(lengths.shape[0], device=cu_seqlens.device)
    return torch.repeat_interleave(every, lengths), lengths[:, None].float()


def _segment_pool(x: Tensor, owner: Tensor, lengths: Tensor) -> Tensor:
    """Mean and L2, as sentence-transformers pools what is not padded."""
    sums = torch.zeros(lengths.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
    return F.normalize(sums.index_add_(0, owner, x.float()) / lengths, dim=1)


def _norm_pool(*laid: Any) -> Tensor:
    return _segment_pool(PEERS["add_norm"](*laid[:6]), *laid[6:])


_FORMULAS: dict[str, Callable[..., Tensor]] = {
    **{op: PEERS[op] for op in ("embed_norm", "add_norm", "bias_gelu")},
    "segment_pool": _segment_pool,
    "norm_pool": _norm_pool,
}


def _lay(op: str, arguments: tuple[Any, ...]) -> list[Any]:
    """Parameters in the dtype of the activations, as a model in that dtype has them, and of lengths
    what a formula needs."""
    floating = [isinstance(a, Tensor) and a.is_floating_point() for a in arguments]
    dtype = next(a.dtype for a, f in zip(arguments, floating, strict=True) if f and a.dim() > 1)
    laid = [a.to(dtype) if f else a for a, f in zip(arguments, floating, strict=True)]
    if "pool" not in op:
        return laid
    at = 1 if op == "segment_pool" else 6
    return [*laid[:at], *_segments(laid[at])]


@cache
def _compiled(op: str) -> Callable[..., Tensor]:
    return torch.compile(_FORMULAS[op], dynamic=False)


def _formula(op: str, compiled: bool, *arguments: Any) -> Callable[[], Tensor]:
    run, laid = _compiled(op) if compiled else _FORMULAS[op], _lay(op, arguments)
    return lambda: run(*laid)
