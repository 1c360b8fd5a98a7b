"""Arguments of varlen_attention, and what every implementation of it is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sbert_fast.packing import plan_tiles
from sbert_fast.testing import PEERS, assert_close_to_oracle, oracle, pack_lengths

Attend = Callable[[Sequence[Any]], Tensor]

# One below, at and above every size of a vector, a tile and a block.
RAGGED = (0, 1, 15, 16, 17, 63, 64, 65, 0, 127, 128, 129, 511, 512)
SHORT = (5, 0, 1, 16, 33, 64, 140)
KINDS = ("huge logits", "all equal", "outlier channels", "one key above", "one key below", "tiny")
DEAD_TAIL = 5
HEADS = 2
TABLE_ROWS, TABLE_REACH = 50, 70


@dataclass(frozen=True)
class Case:
    """Random arguments of the op; `reach` is the R of a relative bias, `kind` see `adversarial`,
    `tables` which of position_keys and position_queries there are.

    Arguments that not every implementation takes are there only where one is not its default.
    """

    lengths: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    heads: int = HEADS
    scale: float | None = None
    reach: int | None = None
    window: int = -1
    rotary: bool = False
    kind: str = "normal"
    causal: bool = False
    kv_heads: int = 0
    normed: bool = False
    tables: tuple[bool, bool] = (False, False)

    def args(self) -> list[Any]:
        """Arguments in schema order, with a dead tail."""
        torch.manual_seed(0)
        tokens = sum(self.lengths) + DEAD_TAIL
        shape = (3, self.heads) if self.kv_heads == 0 else (self.heads + 2 * self.kv_heads,)
        qkv = adversarial(self.kind, torch.randn(tokens, *shape, self.dim)).to(self.dtype)
        bias = None if self.reach is None else torch.randn(self.heads, 2 * self.reach + 1)
        angles = torch.rand(tokens, self.dim // 2) * 6.28
        rotary = (angles.cos(), angles.sin()) if self.rotary else (None, None)
        scale = self.dim**-0.5 if self.scale is None else self.scale
        longest = max(self.lengths, default=0)
        plain = [qkv, pack_lengths(self.lengths), longest, scale, bias, self.window, *rotary, None]
        if not (self.causal or self.kv_heads or self.normed or any(self.tables)):
            return plain
        norms = [None, None, 0.0]
        if self.normed:
            norms = [*torch.randn(2, self.dim), 1e-6]
        return [*plain, self.causal, self.kv_heads, *norms, *self._of_distances()]

    def _of_distances(self) -> list[Tensor | None]:
        """The tables of rows by distance that there are, and buckets in no order; or nothing."""
        if not any(self.tables):
            return []
        rows = torch.randn(2, self.heads, TABLE_ROWS, self.dim).to(self.dtype)
        tables = [table if there else None for table, there in zip(rows, self.tables, strict=True)]
        return [*tables, torch.randint(TABLE_ROWS, (2 * TABLE_REACH + 1,), dtype=torch.int32)]


@lru_cache(maxsize=4)
def figures(case: Case) -> tuple[Tensor, Tensor]:
    """The oracle's and the peer's result."""
    args = case.args()
    return oracle("varlen_attention", *args), PEERS["varlen_attention"](*args)


def check(case: Case, attend: Attend, tile: int | None = None) -> None:
    """The 2x rule, over all rows, those of the dead tail included; `tile`: with a table of tiles of
    that size."""
    args = case.args()
    if tile is not None:
        args[8] = tiles_of(args[1], tile)
    assert_close_to_oracle(attend(args), *figures(case), case.dtype)


def adversarial(kind: str, qkv: Tensor) -> Tensor:
    """`qkv` `[T, 3, H, D]` changed to break a careless softmax or dot product.

    Every problem stays well conditioned: near ties of large rounded logits would measure luck.
    """
    if kind == "normal":
        return qkv
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
        raise AssertionError(f"kind must name an adversarial input, got {kind!r}")
    return qkv


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(bits(a), bits(b))


def sequence_rows(cu_seqlens: Tensor, index: int) -> slice:
    return slice(int(cu_seqlens[index]), int(cu_seqlens[index + 1]))


def tiles_of(cu_seqlens: Tensor, tile: int) -> Tensor:
    return torch.from_numpy(plan_tiles(cu_seqlens.diff().numpy(), tile))


def assert_dead_tail_is_zero(attend: Attend, args: Sequence[Any]) -> None:
    """Whatever it holds, and however long it is."""
    args, clean = list(args), list(args)
    for i in (0, 6, 7):
        if args[i] is not None:
            tail = args[i].new_full((300, *args[i].shape[1:]), float("nan"))
            args[i] = torch.cat((args[i], tail))
            clean[i] = args[i].nan_to_num()
    out = attend(args)
    assert_same_bits(out, attend(clean))
    assert (out[int(args[1][-1]) :] == 0).all()


def assert_neighbours_change_no_bit(attend: Attend, args: Sequence[Any]) -> None:
    """NaN in every other sequence, in the dead tail and in the other head reaches nothing."""
    args = list(args)
    per_token = [(i, args[i]) for i in (0, 6, 7) if args[i] is not None]
    expected = attend(args)
    for index in range(len(args[1]) - 1):
        rows = sequence_rows(args[1], index)
        for position, tensor in per_token:
            args[position] = torch.full_like(tensor, float("nan"))
            args[position][rows] = tensor[rows]
        heads = args[0].unbind(1) if args[0].dim() == 4 else [args[0]]
        for part in heads:
            part[:, 1] = float("nan")
        assert_same_bits(attend(args)[rows, 0], expected[rows, 0])


def assert_nan_stays_in_its_sequence(
    attend: Attend, part: int, dtype: torch.dtype, **options: Any
) -> None:
    """`part` 0 is a query, 1 a key, 2 a value: of one token of one head."""
    lengths = (12, 10, 20, 140, 20)
    cu_seqlens = pack_lengths(lengths)
    for index, at in ((0, 3), (2, 30), (3, 50)):
        args = Case(lengths, 32, dtype, **options).args()
        args[0][at, part, 0] = float("nan")
        expected = torch.zeros(sum(lengths) + DEAD_TAIL, HEADS, 32, dtype=torch.bool)
        rows = slice(at, at + 1) if part == 0 else sequence_rows(cu_seqlens, index)
        expected[rows, 0] = True
        assert torch.equal(attend(args).isnan(), expected)


def assert_place_changes_no_bit(attend: Attend, args: Sequence[Any]) -> None:
    """Permuted or alone, with any table of tiles or none, a sequence keeps its bits."""
    args = list(args)
    per_token, cu_seqlens = {i: args[i] for i in (0, 6, 7) if args[i] is not None}, args[1]
    expected = attend(args)
    pieces = [sequence_rows(cu_seqlens, i) for i in range(cu_seqlens.shape[0] - 1)]
    lengths = cu_seqlens.diff().tolist()
    for tile in (16, 100, 1000):
        args[8] = tiles_of(cu_seqlens, tile)
        assert_same_bits(attend(args), expected)
    args[8] = None
    order = torch.randperm(len(pieces)).tolist()
    rows = torch.cat([torch.arange(pieces[i].start, pieces[i].stop) for i in order])
    args[1] = pack_lengths([lengths[i] for i in order])
    for i, tensor in per_token.items():
        args[i] = tensor[rows]
    assert_same_bits(attend(args), expected[rows])
    for piece in pieces:
        length = piece.stop - piece.start
        args[1], args[2] = pack_lengths([length]), length
        for i, tensor in per_token.items():
            args[i] = tensor[piece].clone()
        assert_same_bits(attend(args), expected[piece])


def assert_nothing_to_attend(attend: Attend, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """`lengths` holds zeros alone, or nothing."""
    nothing = torch.zeros(DEAD_TAIL, HEADS, 32, dtype=dtype)
    args = Case(lengths, 32, dtype).args()
    for longest in (0, 1, 500):
        args[2] = longest
        assert_same_bits(attend(args), nothing)
    args[-1] = torch.zeros(0, 4, dtype=torch.int32)
    assert_same_bits(attend(args), nothing)
    args[0] = args[0][:0]
    assert attend(args).shape == (0, HEADS, 32)
    args[-1] = None
    assert attend(args).shape == (0, HEADS, 32)
