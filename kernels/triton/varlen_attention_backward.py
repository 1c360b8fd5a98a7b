"""The gradients of attention over packed sequences: what is launched. `attention_backward.py` tells
what the kernels compute.

tests/test_triton_attention_builds.py compiles them for GPUs that are absent, and fails if one
spills.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sbert_fast.kernels import tuning
from sbert_fast.kernels.attention_backward import key_kernel, query_kernel
from sbert_fast.kernels.attention_bias_backward import bias_kernel
from sbert_fast.kernels.varlen_attention import (
    LOG2_E,
    MIN_WIDTH,
    Launch,
    Options,
    drops,
    fixed_constants,
    is_plain,
)

# Sequences whose gradients of a bias one program adds up.
TOGETHER = 16


def varlen_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int,
    causal: bool = False,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    kv_heads: int = 0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`sbert_fast.ops.varlen_attention`.

    Args:
        grad: `[T, H, D]`, dtype of `qkv`, contiguous.
        qkv, cu_seqlens, max_seqlen, scale, bias, window, causal, rotary_cos, rotary_sin, kv_heads,
            query_norm, key_norm, norm_eps, dropout, seed: those of the forward pass.

    Returns:
        The gradients of `qkv`, in its dtype, zeros in the dead tail; of `bias`, fp32 `[H, 2R + 1]`,
        or `[0]`; of both norms, fp32 `[2, D]`, or `[0]`.

    Raises:
        ValueError: there is dropout and no seed.
    """
    tables, norms = (bias, rotary_cos, rotary_sin), (query_norm, key_norm, norm_eps)
    more = Options(causal, kv_heads, *norms, dropout=dropout, seed=seed)
    todo = Todo(grad, qkv, cu_seqlens, max_seqlen, scale, window, tables, more)
    fp32: Any = {"dtype": torch.float32}
    d_bias = qkv.new_zeros((0,) if bias is None else bias.shape, **fp32)
    d_norms = qkv.new_zeros((0,) if query_norm is None else (2, qkv.shape[-1]), **fp32)
    if cu_seqlens.shape[0] == 1 or max_seqlen == 0 or qkv.numel() == 0:
        return torch.zeros_like(qkv), d_bias, d_norms
    results = todo.results()
    for kernel, programs, arguments, options in todo.plan(results):
        kernel[(programs,)](*arguments, **options)
    if query_norm is not None:
        sums = [part.sum(0, dtype=torch.float64) for part in results.d_norms]
        d_norms = torch.stack(sums).float()
    if results.sums is not None:
        d_bias = by_distance(results.sums, todo.diagonals[0], *d_bias.shape)
    return results.d_qkv, d_bias, d_norms


@dataclass(frozen=True)
class Results:
    """What the kernels write to, fp32 but for the first.

    Attributes:
        d_qkv: the gradient of qkv.
        stats: `[3, H, T]`, what the first kernel tells the others.
        d_norms: of queries and of keys, `[programs, D]`, a row for each program; or nothing.
        sums: of the gradients of scores, `[groups, diagonals, H, BLOCK, BLOCK]`; or None.
    """

    d_qkv: Tensor
    stats: Tensor
    d_norms: tuple[Tensor, ...]
    sums: Tensor | None


@dataclass(frozen=True)
class Todo:
    """One call of the op, its tensors on any device, `meta` too.

    Attributes:
        tables: bias, rotary cos, rotary sin.
        more: the arguments that have defaults.
    """

    grad: Tensor
    qkv: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    scale: float
    window: int
    tables: tuple[Tensor | None, Tensor | None, Tensor | None]
    more: Options

    @property
    def config(self) -> tuning.AttentionBackward:
        """The blocks."""
        width = max(MIN_WIDTH, triton.next_power_of_2(self.qkv.shape[-1]))
        plain = is_plain(self.window, self.tables, self.more)
        return tuning.attention_backward(width, self.qkv.element_size() * 8, plain=plain)

    @property
    def programs(self) -> tuple[int, int]:
        """Of the kernels of queries and of keys: as if all sequences were the longest."""
        config, heads, sequences = self.config, self.grad.shape[1], self.cu_seqlens.shape[0] - 1
        blocks = config.queries.queries, config.keys.keys
        counts = heads, self.more.kv_heads or heads
        of_queries, of_keys = (
            sequences * triton.cdiv(self.max_seqlen, block) * count
            for block, count in zip(blocks, counts, strict=True)
        )
        return of_queries, of_keys

    @property
    def diagonals(self) -> tuple[int, int]:
        """How many blocks behind those of queries, and how many ahead, blocks of keys lie."""
        block = self.config.bias.keys
        before = triton.cdiv(self.max_seqlen, block) - 1
        if self.window >= 0:
            before = min(before, (self.window + block - 1) // block)
        return before, 0 if self.more.causal else before

    def results(self) -> Results:
        """Nothing yet: zeros where a program may have nothing to write."""
        fp32: Any = {"dtype": torch.float32}
        qkv, heads, sums = self.qkv, self.grad.shape[1], None
        d_norms: tuple[Tensor, ...] = ()
        if self.more.query_norm is not None:
            d_norms = tuple(qkv.new_zeros(n, qkv.shape[-1], **fp32) for n in self.programs)
        if self.tables[0] is not None:
            groups = triton.cdiv(self.cu_seqlens.shape[0] - 1, TOGETHER)
            block, diagonals = self.config.bias.keys, sum(self.diagonals) + 1
            sums = qkv.new_empty(groups, diagonals, heads, block, block, **fp32)
        stats = qkv.new_empty(3, heads, qkv.shape[0], **fp32)
        return Results(torch.empty_like(qkv), stats, d_norms, sums)

    def plan(self, results: Results) -> Iterator[Launch]:
        """What to launch, in this order."""
        qkv, heads, more, config = self.qkv, self.grad.shape[1], self.more, self.config
        fixed = fixed_constants(qkv, heads, self.scale, self.window, self.tables, more)
        halved = more.query_norm is not None or fixed["ROTARY"]
        fixed["SIDE"] = max(MIN_WIDTH, fixed["WIDTH"] // 2) if halved else 0
        reach = 0 if self.tables[0] is None else self.tables[0].shape[1] // 2
        seed, *rate = drops(more.dropout, more.seed)
        eps = None if more.query_norm is None else more.norm_eps
        window = min(self.window, self.max_seqlen)
        numbers = (self.scale * LOG2_E, reach, window, eps, *rate)
        tensors = (self.cu_seqlens, *self.tables, more.query_norm, more.key_norm, seed)
        tokens, sequences = qkv.shape[0], self.cu_seqlens.shape[0] - 1
        kernels = (query_kernel, config.queries, heads), (key_kernel, config.keys, fixed["KV"])
        for number, (kernel, blocks, count) in enumerate(kernels):
            d_norm = results.d_norms[number] if results.d_norms else None
            programs = self.programs[number]
            yield Launch(
                kernel,
                programs,
                (self.grad, qkv, results.d_qkv, results.stats, d_norm, *tensors, tokens, sequences,
                 programs // (sequences * count), *numbers, self.scale),
                fixed | {"BLOCK_Q": blocks.queries, "BLOCK": blocks.keys, "STAGES": 1,
                         "num_warps": blocks.warps},
            )  # fmt: skip
        if results.sums is not None:
            before, after = self.diagonals
            yield Launch(
                bias_kernel,
                results.sums.shape[0] * (before + 1 + after) * heads,
                (self.grad, qkv, results.stats, results.sums, *tensors, tokens, sequences,
                 before + 1 + after, before, *numbers),
                fixed | {"BLOCK": config.bias.keys, "TOGETHER": TOGETHER,
                         "num_warps": config.bias.warps},
            )  # fmt: skip


def by_distance(sums: Tensor, before: int, heads: int, width: int) -> Tensor:
    """The gradient `[H, 2R + 1]` of a bias, of :class:`Results` `sums`; their first diagonal is
    `before` blocks behind the queries."""
    total, size, reach = sums.sum(0).transpose(0, 1), sums.shape[-1], width // 2
    # A row that is one longer than the rows it is cut into moves one to the right from row to row:
    # column BLOCK - 1 + d holds the distance d within a block.
    skewed = F.pad(total.flip(-2), (0, size)).flatten(-2)[..., : size * (2 * size - 1)]
    of_blocks = skewed.unflatten(-1, (size, -1)).sum(-2)
    # Backward and forward halves [H, diagonals, BLOCK]; those of neighbours have distances in
    # common.
    halves = F.pad(of_blocks, (1, 0)).unflatten(-1, (2, size))
    behind, ahead = F.pad(halves, (0, 0, 0, 0, 1, 1)).unbind(2)
    whole = (behind[:, 1:] + ahead[:, :-1]).flatten(1)
    first = -(before + 1) * size  # the distance of the first column
    less = max(0, -reach - first)
    end = whole.shape[1] - max(0, first + whole.shape[1] - 1 - reach)
    out = whole[:, less:end].clone()
    out[:, 0] += whole[:, :less].sum(1)
    out[:, -1] += whole[:, end:].sum(1)
    left = max(0, first + reach)
    return F.pad(out, (left, width - left - out.shape[1]))
