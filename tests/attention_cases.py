"""Arguments of varlen_attention, and what every implementation of it is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sbert_fast.testing import PEERS, assert_close_to_oracle, oracle, pack_lengths

# One below, at and above every size of a vector, a tile and a block.
RAGGED = (0, 1, 15, 16, 17, 63, 64, 65, 0, 127, 128, 129, 511, 512)
SHORT = (5, 0, 1, 16, 33, 64, 140)
KINDS = ("huge logits", "all equal", "outlier channels", "one key above", "one key below", "tiny")
DEAD_TAIL = 5
HEADS = 2


@dataclass(frozen=True)
class Case:
    """Random arguments of the op; `reach` is the R of a relative bias, `kind` see `adversarial`."""

    lengths: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    heads: int = HEADS
    scale: float | None = None
    reach: int | None = None
    window: int = -1
    rotary: bool = False
    kind: str = "normal"

    def args(self) -> list[Any]:
        """Arguments in schema order, with a dead tail."""
        torch.manual_seed(0)
        tokens = sum(self.lengths) + DEAD_TAIL
        qkv = adversarial(self.kind, torch.randn(tokens, 3, self.heads, self.dim)).to(self.dtype)
        bias = None if self.reach is None else torch.randn(self.heads, 2 * self.reach + 1)
        angles = torch.rand(tokens, self.dim // 2) * 6.28
        rotary = (angles.cos(), angles.sin()) if self.rotary else (None, None)
        scale = self.dim**-0.5 if self.scale is None else self.scale
        longest = max(self.lengths, default=0)
        return [qkv, pack_lengths(self.lengths), longest, scale, bias, self.window, *rotary, None]


@lru_cache(maxsize=4)
def figures(case: Case) -> tuple[Tensor, Tensor]:
    """The oracle's and the peer's result."""
    args = case.args()
    return oracle("varlen_attention", *args), PEERS["varlen_attention"](*args)


def check(case: Case, attention: Callable[[Sequence[Any]], Tensor]) -> None:
    """The 2x rule, over all rows, those of the dead tail included."""
    assert_close_to_oracle(attention(case.args()), *figures(case), case.dtype)


def adversarial(kind: str, qkv: Tensor) -> Tensor:
    """`qkv` `[T, 3, H, D]` changed to break a careless softmax or dot product.

    Every problem stays well conditioned: near ties of large rounded logits would measure luck.
    """
    q, k, v = qkv.unbind(1)
    if kind == "huge logits":  # sums of products of integers, exact in fp32
        qkv[:, :2] = (8 * qkv[:, :2]).round() * 8
    elif kind == "all equal":
        qkv[:] = torch.tensor([0.7, -0.3, 1.3]).view(3, 1, 1)
    elif kind == "outlier channels":
        q[..., 3] /= 50
        k[..., 3] *= 300
        v[..., 17] *= 300
    elif kind in ("one key above", "one key below"):
        q[..., 0] = q[..., 0].abs() + 1
        k[70, :, 0] = 200 if kind == "one key above" else -200
    elif kind == "tiny":  # subnormal
        qkv[..., ::3] *= 1e-39
    else:
        assert kind == "normal", f"kind must name an adversarial input, got {kind!r}"
    return qkv


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(bits(a), bits(b))


def sequence_rows(cu_seqlens: Tensor, index: int) -> slice:
    return slice(int(cu_seqlens[index]), int(cu_seqlens[index + 1]))
