"""Static launch parameters. Nothing is timed at run time: a result never depends on a stopwatch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attention:
    """How `varlen_attention` is cut up; see its module. None of this changes a bit of a result.

    Attributes:
        block_q: query rows of a block of a long sequence.
        num_warps: warps of a program; as many short sequences form a group.
        num_stages: key blocks of a long sequence in flight.
        heads: heads that a program computes one after the other, at most: their loads are
            neighbours in memory, and where each row's sequence lies is found once for all of them.
    """

    block_q: int
    num_warps: int
    num_stages: int
    heads: int


def attention(width: int, bits: int, max_seqlen: int) -> Attention:
    """The row of the table.

    Args:
        width: head dim, padded to a power of two from 16 to 128.
        bits: 16 for fp16 and bf16, 32 for fp32.
        max_seqlen: of the batch, in tokens.
    """
    return (_LONG if max_seqlen > _LONG_FROM else _SHORT)[bits, width]


def heads_together(limit: int, heads: int, tiles: int) -> int:
    """Heads that a program computes: a divisor of `heads`, at most `limit`, and fewer where the
    launch would have too few programs to fill a GPU."""
    fitting = [n for n in range(1, limit + 1) if heads % n == 0]
    enough = [n for n in fitting if tiles * (heads // n) >= _ENOUGH_PROGRAMS]
    return max(enough, default=1)


# A few waves of programs on a GPU of 132 multiprocessors that hold about five each.
_ENOUGH_PROGRAMS = 2048

_LONG_FROM = 256

_SHORT = {
    (16, 16): Attention(block_q=64, num_warps=4, num_stages=2, heads=4),
    (16, 32): Attention(block_q=64, num_warps=4, num_stages=2, heads=2),
    (16, 64): Attention(block_q=64, num_warps=4, num_stages=2, heads=1),
    (16, 128): Attention(block_q=64, num_warps=4, num_stages=2, heads=1),
    (32, 16): Attention(block_q=64, num_warps=4, num_stages=2, heads=2),
    (32, 32): Attention(block_q=64, num_warps=4, num_stages=2, heads=1),
    (32, 64): Attention(block_q=64, num_warps=8, num_stages=1, heads=1),
    (32, 128): Attention(block_q=64, num_warps=8, num_stages=1, heads=1),
}

_LONG = _SHORT | {
    (16, 16): Attention(block_q=128, num_warps=8, num_stages=3, heads=1),
    (16, 32): Attention(block_q=128, num_warps=8, num_stages=3, heads=1),
    (16, 64): Attention(block_q=128, num_warps=8, num_stages=2, heads=1),
}
