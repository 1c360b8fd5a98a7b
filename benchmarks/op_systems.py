"""Inputs of the op benchmarks, and the systems that compute the same from them.

A case holds several sets of inputs and, by name, what runs on them: ours, its peers, and a copy of
as many bytes. A peer that cannot be made here says why.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import op_peers
import torch
from corpora import CORPORA, target_lengths
from op_peers import Maker
from report import OURS
from stopwatch import Call, message
from torch import Tensor

from sbert_fast import ops
from sbert_fast.packing import plan_tiles
from sbert_fast.testing import PEERS, assert_close_to_oracle, oracle, pack_lengths

HEADS, EPS, VOCABULARY, POSITIONS = 12, 1e-12, 30522, 512
COPY = "copy of as many bytes"
# Tokens of the sequences whose results are compared with the oracle.
_CHECKED_TOKENS, _CHECKED_ROWS = 2048, 512
# Arguments that have a row a token.
_PER_TOKEN = {
    "embed_norm": (0, 1),
    "add_norm": (0, 2),
    "bias_gelu": (0,),
    "segment_pool": (0,),
    "norm_pool": (0, 2),
}


@dataclass
class Case:
    """One op on one kind of input.

    Attributes:
        op: its name.
        systems: by name, what runs it.
        missing: peers that cannot run here, and why.
        sets: the arguments of the op's schema, several times.
        moved_bytes: the least that the op reads and writes.
        tokens, sequences: of one set.
        rows: from a result, and which of its rows, to compare with :attr:`checked`.
        checked: arguments of the op, on the CPU, that make those rows.
    """

    op: str
    sets: list[tuple[Any, ...]]
    moved_bytes: int
    tokens: int
    sequences: int
    rows: Tensor
    checked: tuple[Any, ...]
    eps_dtype: torch.dtype
    systems: dict[str, Call] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def wrong(self, out: Tensor) -> str | None:
        """Why `out`, a result on the first set, is wrong by the 2x rule; None where it is right."""
        try:
            assert torch.isfinite(out).all(), "the result holds NaN or infinity, or was not written"
            few = out[self.rows.to(out.device)].cpu()
            expected = oracle(self.op, *self.checked)
            assert_close_to_oracle(few, expected, PEERS[self.op](*self.checked), self.eps_dtype)
        except AssertionError as error:
            return message(error)
        return None


def lengths_of(name: str, tokens: int, seed: int = 0) -> list[int]:
    """Lengths of sequences with about `tokens` tokens, in random order.

    Args:
        name: a corpus of `corpora.CORPORA`, "uniform" (10 to 500 tokens), or a number: the length
            of every sequence.
        tokens: their sum, to a sequence.
        seed: of the order.
    """
    if name.isdecimal():
        return [int(name)] * max(1, tokens // int(name))
    if name == "uniform":
        count = max(1, tokens // 255)
        lengths = [round(10 + 490 * (i + 0.5) / count) for i in range(count)]
    else:
        assert name in CORPORA, f"no such lengths: {name}"
        count = max(1, round(tokens / float(np.mean(target_lengths(name, 1000)))))
        lengths = target_lengths(name, count)
    random.Random(seed).shuffle(lengths)
    return lengths


def _some_sequences(lengths: list[int]) -> tuple[list[int], Tensor]:
    """The first, the last and random sequences between them; their numbers, and their tokens."""
    order = list(range(1, len(lengths) - 1))
    random.Random(1).shuffle(order)
    wanted, chosen, used = [0, len(lengths) - 1, *order], [], 0
    for i in wanted:
        if used + lengths[i] <= _CHECKED_TOKENS or not chosen:
            chosen.append(i)
            used += lengths[i]
    chosen = sorted(set(chosen))
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tokens = [torch.arange(starts[i], starts[i + 1]) for i in chosen]
    return chosen, torch.cat(tokens)


def _some_rows(tokens: int) -> Tensor:
    return torch.linspace(0, tokens - 1, min(tokens, _CHECKED_ROWS)).long().unique()


def _randn(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def _add(case: Case, names: tuple[str, ...], make: Callable[[str], Maker]) -> None:
    """Add the systems `names` to a case; a maker takes the arguments of a set and returns a call
    without any."""
    for name in names:
        try:
            maker = make(name)
            calls = [maker(*arguments) for arguments in case.sets]
            case.systems[name] = lambda i, calls=calls: calls[i]()
        except Exception as error:
            case.missing[name] = message(error)


def _ours(op: str, device: torch.device, dtype: torch.dtype) -> Maker:
    kernel = ops.bind(op, device, dtype, "triton" if device.type == "cuda" else "auto")
    return lambda *arguments: lambda: kernel(*arguments)


def _copies(moved_bytes: int, sets: int, device: torch.device) -> Call:
    half = max(1, moved_bytes // 2)
    pairs = [torch.zeros(2, half, dtype=torch.uint8, device=device) for _ in range(sets)]
    return lambda i: pairs[i][1].copy_(pairs[i][0])


def _finish(
    case: Case, device: torch.device, dtype: torch.dtype, peers: tuple[str, ...], lengths: list[int]
) -> Case:
    makers = op_peers.makers(case.op, lengths)

    def make(name: str) -> Maker:
        return _ours(case.op, device, dtype) if name == OURS else makers[name]

    _add(case, (OURS, *peers), make)
    case.systems[COPY] = _copies(case.moved_bytes, len(case.sets), device)
    return case


def attention_case(
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    dim: int,
    sets: int,
    peers: tuple[str, ...],
) -> Case:
    """varlen_attention with 12 heads of `dim`."""
    tokens, itemsize = sum(lengths), dtype.itemsize
    cu_seqlens = pack_lengths(lengths).to(device)
    tiles = torch.from_numpy(plan_tiles(np.array(lengths, np.int32))).to(device)
    rest = (cu_seqlens, max(lengths), dim**-0.5, None, -1, None, None, tiles)
    shape = (tokens, 3, HEADS, dim)
    made = [(_randn(device, dtype, *shape, seed=i), *rest) for i in range(sets)]
    chosen, rows = _some_sequences(lengths)
    few = [lengths[i] for i in chosen]
    checked = (made[0][0][rows.to(device)].cpu(), pack_lengths(few), *rest[1:-1], None)
    case = Case(
        op="varlen_attention",
        sets=made,
        moved_bytes=tokens * 4 * HEADS * dim * itemsize,
        tokens=tokens,
        sequences=len(lengths),
        rows=rows,
        checked=checked,
        eps_dtype=dtype,
    )
    return _finish(case, device, dtype, peers, lengths)


def row_case(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    width: int,
    sets: int,
    peers: tuple[str, ...],
) -> Case:
    """embed_norm, add_norm, bias_gelu (on four times the width), segment_pool or norm_pool."""
    tokens, size = sum(lengths), dtype.itemsize
    cu_seqlens = pack_lengths(lengths).to(device)
    norm = (
        1 + 0.1 * _randn(device, torch.float32, width, seed=1),
        0.1 * _randn(device, torch.float32, width, seed=2),
    )
    pool = (cu_seqlens, ops.POOLING_MODES.index("mean"), True, 0, None)
    wide = 4 * width if op == "bias_gelu" else width

    def vector(seed: int) -> Tensor:
        return _randn(device, torch.float32, wide, seed=seed)

    def matrix(seed: int, rows: int = tokens) -> Tensor:
        return _randn(device, dtype, rows, wide, seed=seed)

    tables = (matrix(3, VOCABULARY), matrix(4, POSITIONS), matrix(5, 2))

    def ids(seed: int, most: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        shape = {"dtype": torch.int32, "device": device, "generator": generator}
        return torch.randint(0, most, (tokens,), **shape)

    def arguments(i: int) -> tuple[Any, ...]:
        if op == "embed_norm":
            where = (ids(i, VOCABULARY), ids(i + 1, POSITIONS), None)
            return (*where, *tables, *norm, EPS, dtype)
        if op == "bias_gelu":
            return matrix(10 + i), vector(6), False
        if op == "segment_pool":
            return matrix(10 + i), *pool
        added = (matrix(10 + i), vector(6), matrix(50 + i), *norm, EPS)
        return added if op == "add_norm" else (*added, *pool)

    pooled_bytes = len(lengths) * width * 4
    moved = {
        "embed_norm": 2 * tokens * width * size + 8 * tokens,
        "add_norm": 3 * tokens * width * size,
        "bias_gelu": 2 * tokens * wide * size,
        "segment_pool": tokens * width * size + pooled_bytes,
        "norm_pool": 2 * tokens * width * size + pooled_bytes,
    }
    made = [arguments(i) for i in range(sets)]
    rows = of_tokens = _some_rows(tokens)
    few = list(made[0])
    if "pool" in op:
        chosen, of_tokens = _some_sequences(lengths)
        rows = torch.tensor(chosen)
        few[1 if op == "segment_pool" else 6] = pack_lengths([lengths[i] for i in chosen])
    for i in _PER_TOKEN[op]:
        few[i] = few[i][of_tokens.to(device)]
    case = Case(
        op=op,
        sets=made,
        moved_bytes=moved[op],
        tokens=tokens,
        sequences=len(lengths),
        rows=rows,
        checked=tuple(a.cpu() if isinstance(a, Tensor) else a for a in few),
        eps_dtype=torch.float32 if "pool" in op else dtype,
    )
    return _finish(case, device, dtype, peers, lengths)
