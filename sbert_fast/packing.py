"""Packed batches and the planner that cuts them; the only place that makes `cu_seqlens`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbert_fast.values import shown

try:
    from sbert_fast import _host  # type: ignore[attr-defined]
except ImportError:
    _host = None

HAS_NATIVE_PLANNER = _host is not None

# Row counts of every linear are multiples of this, so that a row's bits do not depend on its batch.
ROW_ALIGNMENT = 16
TILE_TOKENS = 128

# More tokens than any input has, and still an int64 when lengths are added to it.
_NO_LIMIT = 2**62


def _checked(lengths: NDArray[np.int32], name: str, limit: int) -> tuple[NDArray[np.int32], int]:
    """The checked arguments of either planner, contiguous and within 64 bits."""
    if not isinstance(lengths, np.ndarray):
        raise TypeError(f"lengths must be a numpy array int32 [N], got {type(lengths).__name__}")
    if lengths.ndim != 1 or lengths.dtype != np.int32:
        raise ValueError(
            f"lengths must be int32 [N], got {lengths.dtype} with shape {list(lengths.shape)}"
        )
    if isinstance(limit, bool) or not isinstance(limit, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(limit).__name__} {shown(limit)}")
    if limit <= 0:
        raise ValueError(f"{name} must be at least 1, got {shown(limit)}")
    if lengths.size and lengths.min() < 0:
        at = int(np.argmin(lengths))
        raise ValueError(f"lengths must be at least 0, got {int(lengths[at])} at index {at}")
    return np.ascontiguousarray(lengths), min(int(limit), _NO_LIMIT)


def plan_batches_numpy(
    lengths: NDArray[np.int32], budget: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numpy planner; see :func:`plan_batches`."""
    lengths, budget = _checked(lengths, "budget", budget)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    ends = np.cumsum(lengths[order], dtype=np.int64)
    starts, position, used = [0], 0, 0
    while position < order.size:
        position = max(int(np.searchsorted(ends, used + budget, side="right")), position + 1)
        used = int(ends[position - 1])
        starts.append(position)
    return order.astype(np.int64), np.array(starts, dtype=np.int64)


def plan_tiles_numpy(lengths: NDArray[np.int32], tile: int) -> NDArray[np.int32]:
    """The numpy planner; see :func:`plan_tiles`."""
    lengths, tile = _checked(lengths, "tile", tile)
    ends = np.cumsum(lengths, dtype=np.int64)
    if ends.size and ends[-1] >= 2**31:
        raise ValueError(f"lengths must sum to less than 2^31 tokens, got {ends[-1]}")
    rows: list[tuple[int, int, int, int]] = []
    sequence = 0
    while sequence < lengths.size:
        start = int(ends[sequence]) - int(lengths[sequence])
        if lengths[sequence] > tile:
            stop = int(ends[sequence])
            rows += [(q, min(q + tile, stop), sequence, 1) for q in range(start, stop, tile)]
            sequence += 1
            continue
        after = int(np.searchsorted(ends, start + tile, side="right"))
        if ends[after - 1] > start:
            rows.append((start, int(ends[after - 1]), sequence, after - sequence))
        sequence = after
    return np.array(rows, dtype=np.int32).reshape(-1, 4)


def plan_batches(
    lengths: NDArray[np.int32], budget: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut texts into batches of at most `budget` tokens, longest texts first.

    Args:
        lengths: numpy int32 `[N]`, tokens of each text, at least 0.
        budget: int, tokens of a batch, at least 1; a longer text becomes a batch of its own.

    Returns:
        `order` int64 `[N]`, a stable sort by decreasing length, and `starts` int64 `[batches + 1]`:
        batch b holds `order[starts[b]:starts[b + 1]]`.

    Raises:
        TypeError: `lengths` is not a numpy array, or `budget` is not an int.
        ValueError: `lengths` is not int32 `[N]` or holds a negative length, or `budget` is below 1.
    """
    planner = plan_batches_numpy if _host is None else _host.plan_batches
    return planner(*_checked(lengths, "budget", budget))


def plan_tiles(lengths: NDArray[np.int32], tile: int = TILE_TOKENS) -> NDArray[np.int32]:
    """Group the consecutive sequences of a batch into tiles of at most `tile` tokens.

    Args:
        lengths: numpy int32 `[B]`, tokens of each sequence, at least 0, in packed order.
        tile: int, tokens of a tile, at least 1.

    Returns:
        int32 `[n, 4]`, rows `(q_start, q_end, first_sequence, sequences)` in packed token offsets.
        Whole sequences share a tile while they fit; empty ones join for free, and make no tile on
        their own; a sequence longer than `tile` is cut into tiles of its own.

    Raises:
        TypeError, ValueError: as :func:`plan_batches`; or `lengths` sum to 2^31 or more.
    """
    planner = plan_tiles_numpy if _host is None else _host.plan_tiles
    return planner(*_checked(lengths, "tile", tile))


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Some sequences, one after the other, without padding between them.

    Attributes:
        input_ids, position_ids: int32 `[T]`; `T` is a multiple of 16, or of what the linear layers
            need (:func:`pack_all`), the rest is a dead tail.
        token_type_ids: int32 `[T]`, or None if all are 0.
        cu_seqlens: int32 `[B + 1]`; `cu_seqlens[B]` is `num_tokens`.
        tiles: int32 `[n, 4]`, see :func:`plan_tiles`; None where no kernel reads them.
        lengths: int32 `[B]`, on the host.
        num_tokens: tokens that belong to a sequence.
        max_seqlen: tokens of the longest sequence.
        num_positions: one more than the largest of the positions.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    cu_seqlens: Tensor
    tiles: Tensor | None
    lengths: NDArray[np.int32]
    num_tokens: int
    max_seqlen: int
    num_positions: int

    @property
    def num_sequences(self) -> int:
        return int(self.lengths.shape[0])

    def first_rows(self) -> Tensor:
        """Where the first token of each sequence is in `[T]`: int64 `[B]`; none may be empty."""
        return self.cu_seqlens[:-1].long()

    def last_rows(self, padding_id: int | None = None) -> Tensor:
        """As :meth:`first_rows`, of the last token; or of the last that is not `padding_id`, and of
        the first token where all are."""
        first, last = self.first_rows(), self.cu_seqlens[1:].long() - 1
        if padding_id is None:
            return last
        places = torch.arange(self.input_ids.shape[0], device=last.device)
        others = torch.where(self.input_ids != padding_id, places, -1)
        return others.cummax(0).values[last].maximum(first)

    def single_tokens(self) -> PackedBatch:
        """The batch as if every sequence were one token long."""
        count, device = self.num_sequences, self.cu_seqlens.device
        return replace(
            self,
            cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=device),
            lengths=np.ones(count, dtype=np.int32),
            num_tokens=count,
            max_seqlen=1,
        )

    def split_rows(self, x: Tensor) -> Iterator[Tensor]:
        """The rows `[L, E]` of each sequence in `x` `[T, E]`."""
        yield from x[: self.num_tokens].split(self.lengths.tolist())


def _positions(
    ids: NDArray[np.integer[Any]],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
    offset: int,
    uncounted_id: int | None,
) -> NDArray[np.int32]:
    """Position of each token in its sequence.

    `uncounted_id` is the padding id of RoBERTa-like families: there, such a token inside a text
    stands at position `offset - 1` and does not advance the counter.
    """
    positions = np.arange(ids.shape[0], dtype=np.int64) - np.repeat(starts, lengths) + offset
    if uncounted_id is None or not (ids == uncounted_id).any():
        return positions.astype(np.int32)
    counted = ids != uncounted_id
    running = np.concatenate(([0], np.cumsum(counted)))
    positions = running[1:] - np.repeat(running[starts], lengths) + offset - 1
    return np.where(counted, positions, offset - 1).astype(np.int32)


def pack(
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    members: NDArray[np.int64],
    *,
    token_types: NDArray[np.int32] | None = None,
    position_offset: int = 0,
    uncounted_id: int | None = None,
) -> PackedBatch:
    """Pack the texts `members` of one token array into a batch on the host.

    Args:
        ids: int32, the tokens of all texts, one text after the other.
        offsets: int64 `[N + 1]`, where each text starts in `ids`.
        members: int64 `[B]`, the texts to pack, in packed order.
        token_types: int32, parallel to `ids`; None if all are 0.
        position_offset: position of the first token of a text.
        uncounted_id: token id that does not advance positions (padding id of RoBERTa-like
            families), or None.

    Returns:
        The packed batch, `T` padded to a multiple of 16 with tokens 0 at position 0.
    """
    lengths = (offsets[members + 1] - offsets[members]).astype(np.int32)
    packed, cu_seqlens = _allocate(lengths, 2 if token_types is None else 3)
    tokens = int(cu_seqlens[-1])
    starts = cu_seqlens[:-1].astype(np.int64)
    source = np.arange(tokens, dtype=np.int64) + np.repeat(offsets[members] - starts, lengths)

    np.take(ids, source, out=packed[0, :tokens])
    packed[1, :tokens] = _positions(
        packed[0, :tokens], starts, lengths, position_offset, uncounted_id
    )
    if token_types is not None:
        np.take(token_types, source, out=packed[2, :tokens])
    return _batch(packed, lengths, cu_seqlens)


def pack_all(
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int32],
    *,
    token_types: NDArray[np.int32] | None,
    position_offset: int,
    uncounted_id: int | None,
    row_alignment: int,
) -> PackedBatch:
    """Pack all texts of a token array as they lie there, for kernels that read no tiles.

    Args:
        ids, offsets, token_types, position_offset, uncounted_id: as in :func:`pack`.
        lengths: int32 `[N]`, tokens of each text.
        row_alignment: what `T` is to be a multiple of.
    """
    positions = _positions(ids, offsets[:-1], lengths, position_offset, uncounted_id)
    columns = (ids, positions) if token_types is None else (ids, positions, token_types)
    aligned = max(1, -(-ids.shape[0] // row_alignment)) * row_alignment
    packed = np.zeros((len(columns), aligned), dtype=np.int32)
    packed[:, : ids.shape[0]] = columns
    return _batch(packed, lengths, offsets.astype(np.int32), with_tiles=False)


def padded_positions(
    ids: NDArray[np.int64], *, position_offset: int = 0, uncounted_id: int | None = None
) -> NDArray[np.int32]:
    """Positions of the tokens of a padded batch, as the model itself numbers them.

    Args:
        ids: int64 `[B, S]`.
        position_offset, uncounted_id: as in :func:`pack`.

    Returns:
        int32 `[B, S]`: the column plus `position_offset`, or the running count of tokens that are
        not `uncounted_id`, whatever the attention mask says.
    """
    rows, width = ids.shape
    starts = np.arange(rows, dtype=np.int64) * width
    lengths = np.full(rows, width, dtype=np.int32)
    flat = _positions(ids.reshape(-1), starts, lengths, position_offset, uncounted_id)
    return flat.reshape(rows, width)


def pack_padded(
    ids: NDArray[np.int64],
    keep: NDArray[np.bool_],
    positions: NDArray[np.integer[Any]],
    token_types: NDArray[np.int64] | None = None,
) -> tuple[PackedBatch, NDArray[np.int64]]:
    """Pack the kept tokens of a padded batch, row by row, on the host.

    Args:
        ids: int64 `[B, S]`, each of which fits in int32.
        keep: bool `[B, S]`, the tokens to pack, anywhere in their row.
        positions: integers `[B, S]`, see :func:`padded_positions`.
        token_types: int64 `[B, S]`; None if all are 0.

    Returns:
        The packed batch, and int64 `[num_tokens]`: the index of each packed token in `[B * S]`.
    """
    lengths = keep.sum(axis=1, dtype=np.int32)
    source = np.flatnonzero(keep)
    columns = [c for c in (ids, positions, token_types) if c is not None]
    packed, cu_seqlens = _allocate(lengths, len(columns))
    for row, column in zip(packed, columns, strict=True):
        row[: source.size] = column.reshape(-1)[source]
    return _batch(packed, lengths, cu_seqlens), source


def _allocate(
    lengths: NDArray[np.int32], columns: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Zeros `[columns, T]` for ids, positions and maybe types, and `cu_seqlens` `[B + 1]`."""
    cu_seqlens = np.zeros(lengths.shape[0] + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    aligned = max(ROW_ALIGNMENT, -(-int(cu_seqlens[-1]) // ROW_ALIGNMENT) * ROW_ALIGNMENT)
    return np.zeros((columns, aligned), dtype=np.int32), cu_seqlens


def _batch(
    packed: NDArray[np.int32],
    lengths: NDArray[np.int32],
    cu_seqlens: NDArray[np.int32],
    *,
    with_tiles: bool = True,
) -> PackedBatch:
    host = torch.from_numpy(packed)
    return PackedBatch(
        input_ids=host[0],
        position_ids=host[1],
        token_type_ids=host[2] if host.shape[0] == 3 else None,
        cu_seqlens=torch.from_numpy(cu_seqlens),
        tiles=torch.from_numpy(plan_tiles(lengths)) if with_tiles else None,
        lengths=lengths,
        num_tokens=int(cu_seqlens[-1]),
        max_seqlen=int(lengths.max(initial=0)),
        num_positions=int(packed[1].max()) + 1,
    )
