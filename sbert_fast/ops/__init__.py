"""The ops of a packed BERT-family encoder: one contract, several implementations.

Dims: `B` sequences, `T` packed tokens, `H` heads, `D` head dim, `E` hidden, `F` FFN width.
Tensors are dense, contiguous unless said otherwise, and all of a call on one device.

Activations are float32, bfloat16 or float16, or float64, which only the reference takes (as
float16 on a CPU). Parameters are float32 whatever the activations are (beside float64 ones, also
float64). Indices and offsets are int32.

`cu_seqlens`, everywhere: contiguous int32 `[B + 1]` on the op's device; it starts at 0, never
decreases, may repeat (empty sequences) and may end before `T` (a dead tail that reaches no result).

`impl`, everywhere: "auto" picks by device and dtype (:func:`explain_ops` shows the table) the best
implementation that has the options of the call, a CUDA kernel only where it takes its sizes and
addresses too; a name runs that implementation or raises
:class:`sbert_fast.errors.ImplementationError`. What implementations lack: ``schemas.LACKED``.

Errors, everywhere: the message names the argument, what was expected and what came, and nothing
has been computed or written. TypeError: a wrong type or dtype. ValueError: a wrong shape, device,
layout or value, or an `impl` that does not exist. The values of int32 tensors are checked on a CPU;
on CUDA that would wait for the GPU, and only `SBERT_FAST_DEBUG=1` does it.
"""

from __future__ import annotations

from torch import Tensor

from sbert_fast.ops import contracts, extension, validation
from sbert_fast.ops.autograd import refusal as gradient_refusal
from sbert_fast.ops.dispatch import (
    Kernel,
    bind,
    explain_ops,
    launches,
    refusal,
    requested,
    reset_launches,
    resolve,
    run,
)
from sbert_fast.ops.dropout import draw_seed
from sbert_fast.ops.pool import norm_pool, segment_pool
from sbert_fast.ops.reference import POOLING_MODES
from sbert_fast.ops.rows import add_norm, bias_gelu, embed_norm, gated_activation
from sbert_fast.ops.schemas import IMPLEMENTATIONS

__all__ = [
    "IMPLEMENTATIONS",
    "POOLING_MODES",
    "Kernel",
    "add_norm",
    "bias_gelu",
    "bind",
    "draw_seed",
    "embed_norm",
    "explain_ops",
    "extension",
    "gated_activation",
    "gradient_refusal",
    "launches",
    "norm_pool",
    "refusal",
    "requested",
    "reset_launches",
    "resolve",
    "segment_pool",
    "varlen_attention",
]


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    tiles: Tensor | None = None,
    causal: bool = False,
    kv_heads: int | None = None,
    head_norm: tuple[Tensor, Tensor, float] | None = None,
    disentangled: tuple[Tensor | None, Tensor | None, Tensor] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of every token over the tokens of its own sequence.

    Args:
        qkv: `[T, 3, H, D]`, activations; H >= 1, 8 <= D <= 256 (CUDA kernels: to 128). With
            `kv_heads`: `[T, H + 2 * kv_heads, D]`, queries, then keys, then values.
        cu_seqlens: int32 `[B + 1]`, in tokens, see the module docstring.
        max_seqlen: int (in a graph, SymInt), at least the longest sequence, in tokens.
        scale: finite factor of the logits; default `D ** -0.5`.
        bias: fp32 `[H, 2R + 1]`: `bias[h, clamp(j - i, -R, R) + R]` is added to the scaled logit of
            query i and key j.
        window: int >= 0: keep keys with `|j - i| <= window`, in tokens. None keeps all.
        rotary: `(cos, sin)`, each fp32 `[T, D/2]`, applied to q and k; D is even.
        tiles: int32 `[n, 4]` of :func:`sbert_fast.packing.plan_tiles`, rows in any order: a
            scheduling hint that changes no result.
        causal: bool: keep keys j <= i only.
        kv_heads: int >= 1, heads of keys and values, a divisor of H: query head h reads head
            `h // (H / kv_heads)`. None is one for every query head.
        head_norm: `(query_weight, key_weight, eps)`, the weights fp32 `[D]`: RMSNorm of every head
            of queries and of keys, before `rotary`.
        disentangled: `(position_keys, position_queries, buckets)`: tables `[H, P, D]` in the dtype
            of `qkv`, one of which may be None, and int32 `[2R + 1]`. To `q_i · k_j` are added
            `q_i · position_keys[h, b]` and `position_queries[h, b] · k_j`, b being
            `buckets[clamp(j - i, -R, R) + R]`; q and k are normed and turned before.
        dropout: float in [0, 1): the share of softmax weights that become 0, which the others make
            up for by a factor of `1 / (1 - dropout)`. Which ones depends on `seed`, the head, the
            packed row of the query and the position of the key in its sequence.
        seed: int64 `[1]`; None draws one of torch's default generator of the device.
        impl: see the module docstring.

    Returns:
        `[T, H, D]` in the dtype of `qkv`; zeros in the dead tail.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it.
        ImplementationError: the implementation asked for cannot run here.

    Numerics:
        fp32 logits, softmax and accumulation (fp64 for fp64); one rounding at the end. On CPUs with
        bf16 dot products, bf16 inputs stay bf16 there: softmax weights are rounded to bf16 too.

    Source:
        Vaswani et al., arXiv:1706.03762; rotary tables: Su et al., arXiv:2104.09864; `bias`: T5,
        arXiv:1910.10683; `disentangled`: He et al., arXiv:2006.03654; `dropout`: Philox4x32-10,
        Salmon et al., SC 2011.
    """
    longest, heads, grouped = contracts.attention(qkv, cu_seqlens, max_seqlen, tiles, kv_heads)
    dim = qkv.shape[-1]
    scale = dim**-0.5 if scale is None else validation.number("scale", scale)
    if bias is not None:
        contracts.relative_bias(bias, qkv, heads)
    reach = -1 if window is None else validation.integer("window", window, 0, optional=True)
    cos, sin = (None, None) if rotary is None else contracts.rotary(rotary, qkv)
    validation.flag("causal", causal)
    args = qkv, cu_seqlens, longest, scale, bias, reach, cos, sin, tiles
    options = {"causal": causal, "kv_heads": grouped} | contracts.head_norm(head_norm, qkv)
    options |= contracts.disentangled(disentangled, qkv, heads)
    options |= contracts.dropout(dropout, seed, qkv)
    needs = () if rotary is None else ("rotary",)
    return run("varlen_attention", qkv.dtype, impl, args, options, needs, head_dim=dim)
