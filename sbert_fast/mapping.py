"""Weights in pages of files, which need not stay in memory, and whose pages tell of writes.

A page of a private mapping is that of the file until the process writes to it: then Linux gives the
process a page of its own. /proc/self/pagemap shows which are, without reading any.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PAGEMAP, _MAPS = Path("/proc/self/pagemap"), Path("/proc/self/maps")
_ENTRY = 8  # bytes of pagemap that tell of a page
_IS_OF_FILE, _IS_SWAPPED, _IS_PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))
_PAGEOUT = 21  # MADV_PAGEOUT
_SMALLEST = 1 << 16  # bytes; smaller tensors stay where they are

Pages = tuple[int, int]  # the first, and the one behind the last


def refusal(device: torch.device) -> str | None:
    """Why pages of a device cannot be told from those of files; None where they can."""
    if device.type != "cpu":
        return f"it is for a CPU, not for {device}"
    probe = torch.ones(_SMALLEST, dtype=torch.uint8)
    try:
        return None if _is_written([_pages(probe)]) else f"{_PAGEMAP} tells nothing"
    except OSError as error:
        return str(error)


def map_weights(tensors: Iterable[Tensor]) -> bool:
    """Put large tensors on a CPU that are not in a file already into one; whether any was.

    A tensor stays the same object, of another storage; views that share its storage, but are not
    among `tensors`, no longer do.

    Raises:
        OSError: the folder for temporary files has no room.
    """
    groups: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.nbytes >= _SMALLEST:
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    files = _files()
    moving = [g for g in groups.values() if not all(_is_in_file(_pages(t), files) for t in g)]
    for group in moving:
        storage = _in_file(group[0].untyped_storage())
        for tensor in group:
            where = tensor.storage_offset(), tensor.shape, tensor.stride()
            with torch.no_grad():
                tensor.set_(storage, *where)  # type: ignore[call-overload]
    return bool(moving)


class MappedTensors:
    """Tensors on pages of files that no one has written to.

    Args:
        tensors: those that are not are left out.

    Attributes:
        tensors: those that are.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        files = _files()
        large = (t for t in tensors if t.device.type == "cpu" and t.nbytes >= _SMALLEST)
        self.tensors = [t for t in large if _is_in_file(_pages(t), files)]
        self._pages = _merged(map(_pages, self.tensors))
        paths = {p for pages in self._pages for p in (_file_of(pages, files),) if p is not None}
        self._stats = {path: _stat(path) for path in paths}

    def are_written(self) -> bool:
        """Whether a page was written to, or the file under it."""
        return (
            bool(self._pages)
            and _is_written(self._pages)
            or any(_stat(path) != stat for path, stat in self._stats.items())
        )

    def page_out(self) -> None:
        """Take the pages out of memory; whoever reads them gets them back from the file."""
        for path in self._stats:
            _flush(path)
        page = os.sysconf("SC_PAGE_SIZE")
        for first, end in self._pages:
            # Where it fails, the pages stay.
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first * page), ctypes.c_size_t((end - first) * page), _PAGEOUT
            )


def _pages(tensor: Tensor) -> Pages:
    page, first = os.sysconf("SC_PAGE_SIZE"), tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    return first // page, -(-(first + elements * tensor.element_size()) // page)


def _merged(ranges: Iterable[Pages]) -> list[Pages]:
    out: list[Pages] = []
    for first, end in sorted(ranges):
        if out and first <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((first, end))
    return out


def _is_written(ranges: Iterable[Pages]) -> bool:
    """Whether the process has a page of its own in `ranges`, in memory or swapped."""
    descriptor = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first, end in ranges:
            found = os.pread(descriptor, (end - first) * _ENTRY, first * _ENTRY)
            entries = np.frombuffer(found, dtype=np.uint64)
            owned = (entries & (_IS_PRESENT | _IS_SWAPPED) != 0) & (entries & _IS_OF_FILE == 0)
            if len(entries) < end - first or owned.any():
                return True
    finally:
        os.close(descriptor)
    return False


def _files() -> list[tuple[Pages, str | None]]:
    """The pages of every private mapping of a file, and the path of the file."""
    page = os.sysconf("SC_PAGE_SIZE")

    def read() -> Iterator[tuple[Pages, str | None]]:
        for line in _MAPS.read_text(errors="surrogateescape").splitlines():
            addresses, access, _, _, inode, *path = line.split(maxsplit=5)
            if access.endswith("p") and inode != "0":
                first, end = (int(address, 16) // page for address in addresses.split("-"))
                yield (first, end), path[0] if path else None

    return list(read())


def _file_of(pages: Pages, files: list[tuple[Pages, str | None]]) -> str | None:
    return next((path for (a, b), path in files if a <= pages[0] and pages[1] <= b), None)


def _is_in_file(pages: Pages, files: list[tuple[Pages, str | None]]) -> bool:
    return _file_of(pages, files) is not None and not _is_written([pages])


def _stat(path: str) -> tuple[int, ...] | None:
    """What changes when the file is written to; None where it has no name any more."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _flush(path: str) -> None:
    """Have a file written: Linux takes no page out of memory that waits for it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_file(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy in a file without a name, mapped privately."""
    with tempfile.NamedTemporaryFile(prefix="sbert_fast-") as file:
        torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tofile(file.name)  # type: ignore[call-overload]
        _flush(file.name)
        mapped = torch.from_file(file.name, shared=False, size=storage.nbytes(), dtype=torch.uint8)
        return mapped.untyped_storage()
