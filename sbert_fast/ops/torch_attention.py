"""Attention by torch's own kernel for packed sequences (FlashAttention), on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16)


def takes(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    tiles: Tensor | None,
) -> bool:
    """Whether :func:`varlen_attention` computes this: plain attention, fp16 or bf16, D a multiple
    of 8, at least one token and one sequence, compute capability 8.0 or later."""
    plain = bias is None and window < 0 and rotary_cos is None and rotary_sin is None
    fits = qkv.dtype in _DTYPES and qkv.shape[3] % 8 == 0
    some = qkv.shape[0] > 0 and cu_seqlens.shape[0] > 1 and max_seqlen > 0
    return plain and fits and some and torch.cuda.get_device_capability(qkv.device) >= (8, 0)


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
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale)
    assert isinstance(out, Tensor)
    dead = torch.arange(qkv.shape[0], device=qkv.device) >= cu_seqlens[-1]
    return out.masked_fill_(dead[:, None, None], 0)
