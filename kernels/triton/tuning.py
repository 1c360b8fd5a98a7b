"""Static launch parameters. Nothing is timed at run time: a result never depends on a stopwatch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Attention:
    """How `varlen_attention` is cut up; see its module.

    `short` and `block` are part of what is computed: they decide about bits, and so must not depend
    on the lengths of a batch. The rest changes no bit.

    Attributes:
        short: longest sequence that the short kernel computes, in tokens, 16 or 32.
        block: keys of a block of a longer one.
        group, group_warps: short sequences that a program computes at once, and its warps.
        heads: heads that a program of short sequences computes one after the other, at most: their
            loads are neighbours in memory.
        head_stages: 2 loads the next head while one is computed.
        block_q, warps: query rows of a block of a long sequence, and warps of its program.
        far_block_q, far_warps: the same for batches that hold more than 256 tokens in a sequence.
        stages: its key blocks in flight.
        registers: what a thread of the long kernel may have, where it needs few more: 128 let twice
            as many programs share a multiprocessor. None: as many as the compiler likes.
    """

    short: int
    block: int
    group: int
    group_warps: int
    heads: int
    head_stages: int
    block_q: int
    warps: int
    far_block_q: int
    far_warps: int
    stages: int
    registers: int | None = None


def attention(
    width: int,
    bits: int,
    max_seqlen: int,
    *,
    plain: bool,
    rotary: bool,
    normed: bool,
    disentangled: bool,
    capability: tuple[int, int],
) -> Attention:
    """The row of the table.

    Args:
        width: head dim, padded to a power of two from 16 to 256.
        bits: 16 for fp16 and bf16, 32 for fp32.
        max_seqlen: of the batch, in tokens.
        plain: neither bias, window, rotary tables, norms of heads, tables by distance nor dropout,
            and not causal.
        rotary: with rotary tables, which take twice the registers while q and k are loaded.
        normed: with norms of heads, which are computed in fp32 while q and k are loaded. The order
            of their sums is that of the threads of a program: far batches have no other programs.
        disentangled: with tables by distance. Blocks of queries and of keys are of one size, so
            that the distances between them fill a power of two.
        capability: compute capability of the device.
    """
    row = _ATTENTION[bits, width]
    if max_seqlen > _FAR_FROM and not normed:
        row = replace(row, block_q=row.far_block_q, warps=row.far_warps)
    if (rotary or normed) and bits == 16:
        row = replace(row, head_stages=1)
        if width >= 64:
            row = replace(row, short=16, block_q=64, warps=8)
    if not plain and (bits, width) == (16, 256):
        # Whatever else is asked for takes the registers of half the queries.
        row = replace(row, block_q=32, warps=8)
    if disentangled:
        # Rows of the tables, and their products, take the registers of larger blocks. Even so, fp32
        # spills with D > 64.
        block, group = max(16, row.block // 2), row.group if width < 256 else 1
        row = replace(row, short=16, block=block, group=group, head_stages=1)
        row = replace(row, block_q=block, warps=4)
    if not plain:
        # A relative bias would be pipelined too, a score at a time.
        return replace(row, stages=1, registers=None)
    return row if capability == (9, 0) else replace(row, registers=None)


class Blocks(NamedTuple):
    """Queries and keys of a block of scores, and warps of a program."""

    queries: int
    keys: int
    warps: int


class AttentionBackward(NamedTuple):
    """How the kernels of `varlen_attention_backward` cut up scores, all of it part of what is
    computed: where a block of queries, one of keys, or one of the gradient of a bias stays."""

    queries: Blocks
    keys: Blocks
    bias: Blocks


def attention_backward(width: int, bits: int, *, plain: bool) -> AttentionBackward:
    """The row of the table; the arguments are those of :func:`attention`, and with dropout nothing
    is plain."""
    return _ATTENTION_BACKWARD[bits, max(width, 64), plain]


def heads_together(limit: int, heads: int, groups: int) -> int:
    """Heads that a program computes: a divisor of `heads`, at most `limit`, and fewer where the
    launch would have too few programs to fill a GPU."""
    fitting = [n for n in range(1, limit + 1) if heads % n == 0]
    enough = [n for n in fitting if groups * (heads // n) >= _ENOUGH_PROGRAMS]
    return max(enough, default=1)


# Two waves of programs on a GPU of 132 multiprocessors that hold about eight each.
_ENOUGH_PROGRAMS = 2048

_FAR_FROM = 256

# `make tune` rewrites the rows, in this very form, on a GPU.
# fmt: off
_ATTENTION = {
    (16, 16): Attention(32, 64, group=4, group_warps=4, heads=4, head_stages=2,
                        block_q=64, warps=4, far_block_q=128, far_warps=8,
                        stages=3, registers=128),
    (16, 32): Attention(32, 64, group=4, group_warps=4, heads=2, head_stages=2,
                        block_q=64, warps=4, far_block_q=128, far_warps=8,
                        stages=3, registers=128),
    (16, 64): Attention(32, 64, group=4, group_warps=4, heads=1, head_stages=1,
                        block_q=64, warps=4, far_block_q=128, far_warps=8,
                        stages=3, registers=128),
    (16, 128): Attention(16, 64, group=4, group_warps=4, heads=1, head_stages=1,
                         block_q=64, warps=4, far_block_q=64, far_warps=4,
                         stages=1),
    (16, 256): Attention(16, 32, group=2, group_warps=8, heads=1, head_stages=1,
                         block_q=64, warps=8, far_block_q=64, far_warps=8,
                         stages=1),
    (32, 16): Attention(32, 32, group=4, group_warps=8, heads=2, head_stages=1,
                        block_q=32, warps=4, far_block_q=32, far_warps=4,
                        stages=1),
    (32, 32): Attention(32, 32, group=4, group_warps=8, heads=1, head_stages=1,
                        block_q=32, warps=4, far_block_q=32, far_warps=4,
                        stages=1),
    (32, 64): Attention(32, 32, group=2, group_warps=8, heads=1, head_stages=1,
                        block_q=32, warps=4, far_block_q=32, far_warps=4,
                        stages=1),
    (32, 128): Attention(16, 32, group=2, group_warps=8, heads=1, head_stages=1,
                         block_q=32, warps=4, far_block_q=32, far_warps=4,
                         stages=1),
    (32, 256): Attention(16, 16, group=1, group_warps=8, heads=1, head_stages=1,
                         block_q=32, warps=4, far_block_q=32, far_warps=4,
                         stages=1),
}
# fmt: on

# Larger blocks would spill somewhere: tests/test_triton_attention_builds.py tries everything at
# once.
_ATTENTION_BACKWARD = {
    (bits, width, plain): AttentionBackward(*(Blocks(*blocks) for blocks in row))
    for bits, width, plain, *row in (
        (16, 64, True, (64, 64, 4), (64, 64, 4), (32, 32, 4)),
        (16, 64, False, (16, 32, 4), (16, 32, 8), (32, 32, 4)),
        (16, 128, True, (32, 64, 8), (32, 64, 8), (16, 16, 8)),
        (16, 128, False, (32, 32, 8), (16, 32, 8), (16, 16, 8)),
        (16, 256, True, (16, 32, 8), (32, 32, 8), (16, 16, 8)),
        (16, 256, False, (16, 32, 8), (16, 32, 8), (16, 16, 8)),
        (32, 64, True, (32, 16, 4), (16, 32, 4), (32, 32, 4)),
        (32, 64, False, (32, 16, 4), (16, 32, 4), (32, 32, 4)),
        (32, 128, True, (16, 32, 8), (16, 32, 8), (16, 16, 4)),
        (32, 128, False, (16, 32, 8), (16, 32, 8), (16, 16, 4)),
        (32, 256, True, (16, 16, 8), (16, 16, 4), (16, 16, 8)),
        (32, 256, False, (16, 16, 8), (16, 16, 4), (16, 16, 8)),
    )
}
