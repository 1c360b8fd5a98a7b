"""Inputs of the op benchmarks, and the systems that compute the same from them.

A case holds several sets of inputs and, by name, what runs on them: ours, on a GPU in Triton and in
CUDA C++, its peers, and a copy of as many bytes. What cannot be made here says why.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.pages import COPY
from benchmarks.common.stopwatch import Call, copies
from benchmarks.ops import peers as op_peers
from benchmarks.ops.peers import within
from sbert_fast import ops
from sbert_fast.bench.corpora import target_lengths
from sbert_fast.bench.names import OURS, OURS_CUDA, message
from sbert_fast.packing import plan_tiles
from sbert_fast.testing import PEERS, assert_close_to_oracle, oracle, pack_lengths

HEADS, EPS, VOCABULARY, POSITIONS = 12, 1e-12, 30522, 512

# Tokens of the sequences whose results are compared with the oracle.
_CHECKED_TOKENS, _CHECKED_ROWS = 2048, 512
# Attention in plain torch holds all scores of a sequence: of a longer one, two heads are compared.
_ALL_HEADS_UP_TO = 1024
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
        ours: those of them that must be right.
        absent: ours that cannot run on this device, and why.
        missing: other systems that do not run here, and why.
        sets: the arguments of the op's schema, several times.
        moved_bytes: the least that the op reads and writes.
        lengths: tokens of the packed sequences of one set.
        rows: from a result, and which of its rows, to compare with :attr:`checked`.
        checked: arguments of the op, on the CPU, that make those rows.
        heads: of attention, the heads to compare; None is all.
    """

    op: str
    sets: list[tuple[Any, ...]]
    moved_bytes: int
    lengths: list[int]
    rows: Tensor
    checked: tuple[Any, ...]
    eps_dtype: torch.dtype
    heads: list[int] | None = None
    systems: dict[str, Call] = field(default_factory=dict)
    ours: tuple[str, ...] = (OURS,)
    absent: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """What the checked rows are in fp64, and what plain torch makes of them."""
        return oracle(self.op, *self.checked), PEERS[self.op](*self.checked)

    def wrong(self, result: Any) -> str | None:
        """Why a result on the first set is wrong by the 2x rule; None where it is right."""
        out = op_peers.as_packed(result)
        try:
            assert torch.isfinite(out).all(), "the result holds NaN or infinity, or was not written"
            few = out[self.rows.to(out.device)]
            few = (few if self.heads is None else few[:, self.heads]).cpu()
            assert_close_to_oracle(few, *self.truth, self.eps_dtype)
        except AssertionError as error:
            return message(error)
        return None


def lengths_of(name: str, tokens: int, seed: int = 0) -> list[int]:
    """Lengths of sequences with about `tokens` tokens in all, in an order by `seed`.

    The `name` is a corpus of `corpora.CORPORA`, "uniform" (10 to 500 tokens), or a number: the
    length of every sequence.
    """
    if name == "uniform":
        count = max(1, tokens // 255)
        lengths = [round(10 + 490 * (i + 0.5) / count) for i in range(count)]
    else:
        count = max(1, round(tokens / float(np.mean(target_lengths(name, 1000)))))
        lengths = target_lengths(name, count)
    random.Random(seed).shuffle(lengths)
    return lengths


def _some_sequences(lengths: list[int], tokens: int = _CHECKED_TOKENS) -> tuple[list[int], Tensor]:
    """The last, the first and random sequences between them, while they have no more than `tokens`
    tokens; their numbers, and their tokens."""
    order = list(range(1, len(lengths) - 1))
    random.Random(1).shuffle(order)
    chosen, used = [], 0
    for i in dict.fromkeys((len(lengths) - 1, 0, *order)):
        if used + lengths[i] <= tokens or not chosen:
            chosen.append(i)
            used += lengths[i]
    chosen.sort()
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return chosen, torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])


def randn(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normally distributed values, by `seed`."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def _expect_cuda(case: Case, device: torch.device, dtype: torch.dtype, dim: int | None) -> None:
    """Note whether the CUDA op is to run on a case, or why it cannot."""
    if device.type != "cuda" and not ops.extension.CUDA.emulated:
        return
    reason = ops.refusal("cuda", device, dtype, dim)
    if reason is None:
        case.ours = (OURS, OURS_CUDA)
    else:
        case.absent[OURS_CUDA] = reason


def _finish(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
    dim: int | None = None,
) -> Case:
    """Add what runs a case: ours, `peers`, and a copy of as many bytes."""
    _expect_cuda(case, device, dtype, dim)
    of_device = "triton" if device.type == "cuda" else "auto"

    def bound(implementation: str, *arguments: Any) -> Callable[[], Tensor]:
        kernel = ops.bind(case.op, device, dtype, implementation)
        return lambda: kernel(*arguments)

    makers = op_peers.makers(case.op, case.lengths)
    makers |= {OURS: partial(bound, of_device), OURS_CUDA: partial(bound, "cuda")}
    for name in (*case.ours, *peers):
        try:
            calls = [makers[name](*arguments) for arguments in case.sets]
            context = getattr(calls[0], "context", nullcontext)
            case.systems[name] = within(context, lambda i, calls=calls: calls[i]())
        except Exception as error:
            case.missing[name] = message(error)
    case.systems[COPY] = copies(max(1, case.moved_bytes // 2), len(case.sets), device)
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
    made = [(randn(device, dtype, *shape, seed=i), *rest) for i in range(sets)]
    long = max(lengths) > _ALL_HEADS_UP_TO
    heads = [0, HEADS - 1] if long else None
    chosen, rows = _some_sequences(lengths, 4 * _ALL_HEADS_UP_TO if long else _CHECKED_TOKENS)
    qkv = made[0][0][rows.to(device)].cpu()
    qkv = qkv[:, :, heads].contiguous() if long else qkv
    checked = (qkv, pack_lengths([lengths[i] for i in chosen]), *rest[1:-1], None)
    case = Case(
        op="varlen_attention",
        sets=made,
        moved_bytes=tokens * 4 * HEADS * dim * itemsize,
        lengths=lengths,
        rows=rows,
        checked=checked,
        eps_dtype=dtype,
        heads=heads,
    )
    return _finish(case, device, dtype, peers, dim)


def _row_arguments(
    op: str, device: torch.device, dtype: torch.dtype, lengths: list[int], width: int
) -> Callable[[int], tuple[Any, ...]]:
    """Makes the arguments of an op's schema, by the number of the set: ids and activations differ,
    tables and parameters are those of one model."""
    tokens = sum(lengths)

    def vector(seed: int) -> Tensor:
        return randn(device, torch.float32, width, seed=seed)

    def matrix(seed: int, rows: int = tokens) -> Tensor:
        return randn(device, dtype, rows, width, seed=seed)

    def ids(seed: int, most: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        shape = {"dtype": torch.int32, "device": device, "generator": generator}
        return torch.randint(0, most, (tokens,), **shape)

    norm = (1 + 0.1 * vector(1), 0.1 * vector(2), EPS)
    pool = (pack_lengths(lengths).to(device), ops.POOLING_MODES.index("mean"), True, 0, None)
    if op == "embed_norm":
        rest = (None, matrix(3, VOCABULARY), matrix(4, POSITIONS), matrix(5, 2), *norm, dtype)
        return lambda i: (ids(i, VOCABULARY), ids(i + 1, POSITIONS), *rest)
    if op == "bias_gelu":
        return lambda i: (matrix(10 + i), vector(6), False)
    if op == "segment_pool":
        return lambda i: (matrix(10 + i), *pool)
    rest = norm if op == "add_norm" else (*norm, *pool)
    return lambda i: (matrix(10 + i), vector(6), matrix(50 + i), *rest)


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
    wide = 4 * width if op == "bias_gelu" else width
    make = _row_arguments(op, device, dtype, lengths, wide)
    made = [make(i) for i in range(sets)]
    matrices = {"embed_norm": 2, "add_norm": 3, "bias_gelu": 2, "segment_pool": 1, "norm_pool": 2}
    moved = matrices[op] * tokens * wide * size
    # Ids and positions, or the fp32 result.
    moved += {"embed_norm": 8 * tokens}.get(op, 4 * len(lengths) * width if "pool" in op else 0)
    rows = torch.linspace(0, tokens - 1, min(tokens, _CHECKED_ROWS)).long().unique()
    of_tokens = rows
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
        moved_bytes=moved,
        lengths=lengths,
        rows=rows,
        checked=tuple(a.cpu() if isinstance(a, Tensor) else a for a in few),
        eps_dtype=torch.float32 if "pool" in op else dtype,
    )
    return _finish(case, device, dtype, peers)
