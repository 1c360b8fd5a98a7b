"""Weights in pages of files, which need not stay in memory, and whose pages tell of writes.

A page of a private mapping is that of the file until the process writes to it: then Linux gives the
process a page of its own. /proc/self/pagemap shows which are, without reading any.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PAGEMAP, _MAPS = Path("/proc/self/pagemap"), Path("/proc/self/maps")
_ENTRY = 8  # bytes of pagemap that tell of a page
# Of a page out of memory, the first bit stands for a protection against writes, and no page.
_IS_PROTECTED, _IS_OF_FILE, _IS_SWAPPED, _IS_PRESENT = (
    np.uint64(1 << bit) for bit in (57, 61, 62, 63)
)
_PAGEOUT = 21  # MADV_PAGEOUT
_PREFIX = "sbert_fast-"
SMALLEST = 1 << 16  # bytes; smaller tensors stay where they are

Pages = tuple[int, int]  # the first, and the one behind the last
Stat = tuple[int, ...]  # of a file: device, inode, size, times of the last write and change


def refusal(device: torch.device) -> str | None:
    """Why pages of a device cannot be told from those of files; None where they can."""
    if device.type != "cpu":
        return f"it is for a CPU, not for {device}"
    probe = torch.ones(SMALLEST, dtype=torch.uint8)
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
        if tensor.device.type == "cpu" and tensor.nbytes >= SMALLEST:
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
        tensors = list(tensors)
        files = _files() if tensors else []
        large = (t for t in tensors if t.device.type == "cpu" and t.nbytes >= SMALLEST)
        self.tensors = [t for t in large if _is_in_file(_pages(t), files)]
        self._pages = merged(map(_pages, self.tensors))
        paths = {p for pages in self._pages for p in (_file_of(pages, files),) if p is not None}
        self._stats = {path: file_stat(path) for path in paths}

    def are_written(self) -> bool:
        """Whether a page was written to, or the file under it."""
        return (
            bool(self._pages)
            and _is_written(self._pages)
            or any(file_stat(path) != stat for path, stat in self._stats.items())
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


def merged(ranges: Iterable[Pages]) -> list[Pages]:
    """Ranges that touch or overlap as one, in order."""
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
            is_swapped = entries & (_IS_SWAPPED | _IS_PROTECTED) == _IS_SWAPPED
            is_there = (entries & _IS_PRESENT != 0) | is_swapped
            owned = is_there & (entries & _IS_OF_FILE == 0)
            if len(entries) < end - first or owned.any():
                return True
    finally:
        os.close(descriptor)
    return False


def private_memory() -> list[tuple[Pages, int, str | None]]:
    """The pages of every private mapping, by their place, with the inode and path of its file: 0
    and None where there is none. What lies side by side in a file, or in none, is one."""
    page = os.sysconf("SC_PAGE_SIZE")
    out: list[tuple[Pages, int, str | None]] = []
    for line in _MAPS.read_text(errors="surrogateescape").split("\n")[:-1]:
        addresses, access, _, _, inode, *path = line.split(maxsplit=5)
        if not access.endswith("p"):
            continue
        first, end = (int(address, 16) // page for address in addresses.split("-"))
        file = (int(inode), path[0] if path and inode != "0" else None)
        if out and out[-1][0][1] == first and out[-1][1:] == file:
            first = out.pop()[0][0]
        out.append(((first, end), *file))
    return out


def is_own(path: str) -> bool:
    """Whether a file is one of :func:`map_weights`, which nobody else can write to."""
    return path.endswith(" (deleted)") and Path(path).name.startswith(_PREFIX)


def _files() -> list[tuple[Pages, str | None]]:
    """The pages of every private mapping of a file, and the path of the file."""
    return [(pages, path) for pages, inode, path in private_memory() if inode]


def _file_of(pages: Pages, files: list[tuple[Pages, str | None]]) -> str | None:
    return next((path for (a, b), path in files if a <= pages[0] and pages[1] <= b), None)


def _is_in_file(pages: Pages, files: list[tuple[Pages, str | None]]) -> bool:
    return _file_of(pages, files) is not None and not _is_written([pages])


def file_stat(path: str) -> Stat | None:
    """What changes when the file is written to; None where it has no name any more."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


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
    with tempfile.NamedTemporaryFile(prefix=_PREFIX) as file:
        torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tofile(file.name)  # type: ignore[call-overload]
        _flush(file.name)
        mapped = torch.from_file(file.name, shared=False, size=storage.nbytes(), dtype=torch.uint8)
        return mapped.untyped_storage()
