"""Checks of what the integer tensors of an op hold, whichever implementation runs.

On a CPU they always run. On CUDA they would wait for the GPU: values are trusted there, unless
`SBERT_FAST_DEBUG=1`. A graph that is being captured has no values to look at.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sbert_fast.ops.validation import addressed


def _read(tensor: Tensor) -> NDArray[np.int32] | None:
    """The values of an int32 tensor; None where nothing may be read."""
    if not addressed(tensor):
        return None
    if tensor.is_cpu:
        return tensor.numpy()
    if tensor.is_cuda and os.environ.get("SBERT_FAST_DEBUG") == "1":
        return tensor.cpu().numpy()
    return None


def cu_seqlens(
    cu_seqlens: Tensor, tokens: int, max_seqlen: int | None = None
) -> NDArray[np.int32] | None:
    """Check `cu_seqlens` `[B + 1]`; its values come back where they were read."""
    ends = _read(cu_seqlens)
    if ends is None:
        return None
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {ends[0]}")
    # Compared, not subtracted: differences of arbitrary values overflow.
    falls = ends[1:] < ends[:-1]
    if falls.any():
        at = int(falls.argmax())
        raise ValueError(
            f"cu_seqlens must never decrease, got {ends[at]} then {ends[at + 1]} at index {at + 1}"
        )
    if ends[-1] > tokens:
        raise ValueError(f"cu_seqlens must end at or before T = {tokens}, got {ends[-1]}")
    if max_seqlen is not None:
        longest = int((ends[1:] - ends[:-1]).max(initial=0))
        if longest > max_seqlen:
            raise ValueError(
                f"max_seqlen must be at least the longest sequence ({longest} tokens), "
                f"got {max_seqlen}"
            )
    return ends


def indices(name: str, tensor: Tensor, rows: int, table: str) -> None:
    """Check that every index names one of the `rows` rows of `table`."""
    found = _read(tensor)
    # As unsigned numbers, negative ones are the largest.
    if found is None or found.size == 0 or found.view(np.uint32).max() < rows:
        return
    at = int(((found < 0) | (found >= rows)).argmax())
    raise ValueError(f"{name}[{at}] must be in [0, {rows}), the rows of {table}, got {found[at]}")


def distinct(name: str, tensor: Tensor) -> None:
    """Check that no row is named twice: it would be written twice."""
    found = _read(tensor)
    if found is None:
        return
    ordered = np.sort(found)
    twice = ordered[1:] == ordered[:-1]
    if twice.any():
        row = ordered[int(twice.argmax())]
        raise ValueError(f"{name} must name a row at most once, got {row} twice")


def spans(spans: Tensor, end: int) -> None:
    """Check ranges `[start, end)` of packed tokens against the end of the last sequence."""
    found = _read(spans)
    if found is None:
        return
    wrong = (found[:, 0] < 0) | (found[:, 1] < found[:, 0]) | (found[:, 1] > end)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"spans[{at}] must be 0 <= start <= end <= {end}, the end of cu_seqlens, "
            f"got {found[at].tolist()}"
        )


def tiles(tiles: Tensor, ends: NDArray[np.int32]) -> None:
    """Check a table of tiles, in any order, against the values of `cu_seqlens`.

    A kernel computes the tokens its tiles name and no others, so they must name every one.
    """
    found = _read(tiles)
    if found is None:
        return
    expected = (
        "rows (q_start, q_end, first_sequence, sequences) that cover each of the "
        f"{ends[-1]} tokens of cu_seqlens once"
    )
    sequences = ends.shape[0] - 1
    start, stop, first, count = found.astype(np.int64).T
    wrong = (first < 0) | (count < 1) | (first + count > sequences) | (start >= stop)
    if not wrong.any():
        wrong = (start < ends[first]) | (stop > ends[first + count])
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"tiles must be {expected}, got {found[at].tolist()} at row {at}")
    order = np.argsort(start)
    borders = np.concatenate(([0], stop[order]))
    following = np.concatenate((start[order], ends[-1:]))
    gaps = borders != following
    if gaps.any():
        at = int(borders[int(gaps.argmax())])
        raise ValueError(f"tiles must be {expected}, got a gap or an overlap at token {at}")
