"""Pages of memory that tell of writes: of single bits, whoever writes, and without being read.

Linux protects them, and lifts the protection of a page at its first write (`written_pages.h` in
csrc/host). Only private memory can tell: what is shared is written to by other processes, too.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sbert_fast import forking, mapping

try:
    from sbert_fast import _host  # type: ignore[attr-defined]
except ImportError:
    _host = None

_watch_pages = getattr(_host, "watch_pages", None)
_are_pages_written = getattr(_host, "are_pages_written", None)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MOST_REGIONS = 1024

Range = tuple[int, int]  # addresses: the first, and the one behind the last
Memory = list[tuple[mapping.Pages, int, str | None]]


class WatchedTensors:
    """Tensors on pages that tell of writes from now on, as far as nothing else lies on these.

    Args:
        tensors: what is watched: what of it is contiguous, on a CPU, in private memory.
        neighbours: tensors that may share pages with them; a write to one counts there.

    Attributes:
        pages: what is watched, in order.
        is_written: some of it was written to, and is protected anew for another's sake.
        rest: what is not watched of `tensors`, as tensors and as parts of them, 1-D.
    """

    def __init__(self, tensors: Sequence[Tensor], neighbours: Iterable[Tensor]) -> None:
        self.is_written = False
        self.pages: list[Range] = []
        self.rest = list(tensors)
        self._files: dict[str, mapping.Stat] = {}
        if any(tensor.nbytes >= mapping.SMALLEST for tensor in tensors):
            self._watch(tensors, [r for r in map(_range, neighbours) if r is not None])

    def _watch(self, tensors: Sequence[Tensor], around: list[Range]) -> None:
        ranges = [_range(tensor) for tensor in tensors]
        taken = mapping.merged([*filter(None, ranges), *around])
        try:
            memory = mapping.private_memory()
        except OSError:
            return
        rest: list[Tensor] = []
        places: list[Range] = []
        for tensor, own in zip(tensors, ranges, strict=True):
            place = None if own is None else _place(own, taken, memory, self._files)
            if own is None or place is None:
                rest.append(tensor)
            else:
                places.append(place)
                rest += _outside(tensor, own[0], place)
        self.pages = mapping.merged(places)
        # Another thread may have given a tensor other memory in the meantime.
        if self.pages and _protect(self) and ranges == [_range(tensor) for tensor in tensors]:
            self.rest = rest
        else:
            self.pages = []

    def are_written(self) -> bool | None:
        """Whether a page was written to, or the file under it; None where pages do not tell: none
        is watched, or this is a forked child."""
        if not self.pages or _are_pages_written is None:
            return None
        with _lock:
            if self.is_written:
                return True
            try:
                written: bool = _are_pages_written(self.pages)
            except OSError:
                return None
        return written or any(mapping.file_stat(p) != stat for p, stat in self._files.items())


# A handler of a signal may encode.
_lock = forking.Lock(threading.RLock)
_alive: weakref.WeakSet[WatchedTensors] = weakref.WeakSet()


def _protect(watched: WatchedTensors) -> bool:
    """Protect pages, and note who else must know what was written to them before."""
    if _watch_pages is None:
        return False
    with _lock:
        others = [o for o in _alive if not o.is_written and _overlap(o.pages, watched.pages)]
        # Whatever interrupts this leaves nobody in ignorance.
        for other in others:
            other.is_written = True
        try:
            written = _watch_pages(watched.pages)
        except OSError:
            return False
        if len(written) > _MOST_REGIONS:
            written = [(written[0][0], written[-1][1])]
        for other in others:
            other.is_written = _overlap(other.pages, written)
        _alive.add(watched)
    return True


def _overlap(some: list[Range], others: list[Range]) -> bool:
    """Whether ranges have anything in common; both lists are in order."""
    i = j = 0
    while i < len(some) and j < len(others):
        if some[i][0] < others[j][1] and others[j][0] < some[i][1]:
            return True
        if some[i][1] <= others[j][1]:
            i += 1
        else:
            j += 1
    return False


def _range(tensor: Tensor) -> Range | None:
    """Where a tensor lies; None where it cannot be watched. Devices write to pinned memory."""
    first, size = tensor.storage_offset() * tensor.element_size(), tensor.nbytes
    if (
        tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or not size
        or not tensor.is_contiguous()
        or first + size > tensor.untyped_storage().nbytes()
        or (torch.cuda.is_initialized() and tensor.is_pinned())
    ):
        return None
    start = tensor.data_ptr()
    return start, start + size


def _place(
    own: Range, taken: list[Range], memory: Memory, files: dict[str, mapping.Stat]
) -> Range | None:
    """The pages of a tensor on which nothing lies but tensors; notes the file they are of."""
    around = next((a, b) for a, b in taken if a <= own[0] and own[1] <= b)
    first, end = own[0] // _PAGE, -(-own[1] // _PAGE)
    first += first * _PAGE < around[0]
    end -= end * _PAGE > around[1]
    found = next((m for m in memory if m[0][0] <= first and end <= m[0][1]), None)
    if first >= end or found is None:
        return None
    _, inode, path = found
    if inode and not (path is not None and mapping.is_own(path)):
        # Who may write to a file without a name is not known.
        stat = None if path is None else mapping.file_stat(path)
        if path is None or stat is None or stat[1] != inode:
            return None
        files.setdefault(path, stat)
    return first * _PAGE, end * _PAGE


def _outside(tensor: Tensor, start: int, pages: Range) -> list[Tensor]:
    """The first and last elements of a tensor at `start`, where they are not on `pages`, or not
    wholly."""
    flat, size = tensor.detach().view(-1), tensor.element_size()
    head, tail = max(0, -(-(pages[0] - start) // size)), max(0, (pages[1] - start) // size)
    return [part for part in (flat[:head], flat[tail:]) if part.numel()]
