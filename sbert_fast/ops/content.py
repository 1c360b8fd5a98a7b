"""Whether weights still hold what they held, by a hash that is cheap enough for every call.

Writes through `.data`, numpy views and fused optimizers raise no version counter. The hash sees
the address, dtype, shape, strides and device of every tensor; every bit of vectors and of tensors
of up to 4,096 elements; and of each row (last dim) of the others 32 bytes (Triton: at most 8
elements), at columns that move on from row to row. Less than a row of a large tensor can be
written unseen.

It is not an op of the model, and nobody chooses its implementation: C++ on a CPU, Triton on CUDA,
torch elsewhere and where those are missing. Their values differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import sbert_fast.kernels as kernels
from sbert_fast.ops import extension

# Elements up to which a tensor is read whole; bytes that are read of a row beyond that.
WHOLE, PIECE = 4096, 32
# What a program of the Triton kernel takes.
_ROWS, _COLUMNS = 128, 8
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_KEYS = -0x61C8864680B583EB, -0x40A7B892E31B1A47


class ContentHash:
    """64 bits over what tensors hold at the time of each call.

    Equal bits at equal places give equal hashes within a process, whatever the number of threads;
    -0.0 is not 0.0, and a NaN is its payload.

    Args:
        tensors: strided tensors of 1 to 8 bytes an element; any shapes, strides and devices.
        unread: tensors of which the geometry alone is hashed.

    Raises:
        TypeError: a tensor has no such elements; the message names it.
    """

    def __init__(self, tensors: Sequence[Tensor], unread: Sequence[Tensor] = ()) -> None:
        self._tensors, self._all = list(tensors), [*tensors, *unread]
        for index, tensor in enumerate(self._tensors):
            if tensor.layout != torch.strided or tensor.dtype.itemsize not in _BITS:
                raise TypeError(
                    f"tensors[{index}] must be strided, of 1, 2, 4 or 8 bytes an element, "
                    f"got {tensor.layout}, {tensor.dtype}"
                )
        self._compiled = _compiled()
        self._seen: int | None = None
        self._rest: list[Callable[[], int]] = []

    def __call__(self) -> int:
        # The geometry comes first: memory is read only where tensors have it now.
        if self._compiled is None:
            seen = hash(tuple(map(_geometry, self._all)))
        else:
            seen = self._compiled(self._all, len(self._tensors))
        if seen != self._seen:
            self._seen, self._rest = seen, self._readers()
        return hash((seen, *[read() for read in self._rest])) if self._rest else seen

    def _readers(self) -> list[Callable[[], int]]:
        """What reads the tensors whose content C++ does not read."""
        groups: dict[torch.device, list[Tensor]] = {}
        for tensor in self._tensors:
            if tensor.device.type != "meta" and tensor.numel() and _in_storage(tensor):
                groups.setdefault(tensor.device, []).append(_distinct(tensor.detach()))
        if self._compiled is not None:
            groups.pop(torch.device("cpu"), None)
        return [_reader(device, group) for device, group in groups.items()]


def _compiled() -> Callable[[list[Tensor], int], int] | None:
    """The C++ op: content on a CPU, geometry everywhere; None where it is missing."""
    if extension.CPU.available and hasattr(torch.ops.sbert_fast, "content_hash"):
        return torch.ops.sbert_fast.content_hash.default
    return None


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _in_storage(tensor: Tensor) -> bool:
    """Whether the storage has all elements: it may have been given back."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    return (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _distinct(tensor: Tensor) -> Tensor:
    """`tensor`, what an expanded dim repeats once, as integers of its bits."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.view(_BITS[tensor.element_size()])


def _reader(device: torch.device, tensors: list[Tensor]) -> Callable[[], int]:
    if device.type == "cuda" and kernels.refusal(device) is None:
        return triton_reader(device, tensors)
    return lambda: torch_hash(tensors)


def torch_hash(tensors: Sequence[Tensor]) -> int:
    """The content of integer tensors on one device, not empty, in plain torch."""
    bits = torch.cat([_sample(tensor).long() for tensor in tensors])
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    mixed = (bits ^ place * _KEYS[0]) * _KEYS[1]
    mixed = (mixed ^ (mixed >> 32 & 0xFFFFFFFF)) * _KEYS[0]
    return int(mixed.sum())


def _sample(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2 or tensor.numel() <= WHOLE:
        return tensor.reshape(-1)
    rows = tensor.reshape(-1, tensor.shape[-1])
    taken = min(PIECE // tensor.element_size(), rows.shape[1])
    slots = torch.arange(len(rows), device=rows.device) % (rows.shape[1] // taken)
    columns = slots[:, None] * taken + torch.arange(taken, device=rows.device)
    return rows.gather(1, columns).reshape(-1)


def triton_reader(device: torch.device, tensors: Sequence[Tensor]) -> Callable[[], int]:
    """Reads integer tensors on `device`, not empty, in one launch."""
    programs = [program for tensor in tensors for program in _programs(tensor)]
    table = torch.tensor(programs, dtype=torch.int64).to(device)
    launch = kernels.launcher("content_hash")
    return lambda: hash(tuple(launch(table).tolist()))


def _programs(tensor: Tensor) -> Iterator[tuple[int, ...]]:
    """Rows of the kernel's table that read `tensor`: see :func:`sbert_fast.kernels.content`."""
    item = tensor.element_size()
    for base, rows, down, slots, columns, right in _pieces(tensor):
        for first in range(0, rows, _ROWS):
            count = min(_ROWS, rows - first)
            step = columns * right
            start = base + first * down
            yield start, count, down, first % slots, slots, step, columns, right, item


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Groups of rows: address, rows, bytes from row to row, slots, columns of a slot, bytes from
    column to column."""
    base, item, numel = tensor.data_ptr(), tensor.element_size(), tensor.numel()
    whole = tensor.dim() < 2 or numel <= WHOLE or tensor.shape[-1] <= _COLUMNS
    if whole:  # in the order of memory
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if whole and tensor.is_contiguous():
        yield base, numel // _COLUMNS, _COLUMNS * item, 1, _COLUMNS, item
        if rest := numel % _COLUMNS:
            yield base + (numel - rest) * item, 1, 0, 1, rest, item
        return
    try:
        rows = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor.view(-1, tensor.shape[-1])
    except RuntimeError:  # no single stride leads from row to row
        for part in tensor:
            yield from _pieces(part)
        return
    (count, width), (down, right) = rows.shape, (stride * item for stride in rows.stride())
    if whole:
        for first in range(0, width, _COLUMNS):
            yield base + first * right, count, down, 1, min(_COLUMNS, width - first), right
        return
    columns = min(_COLUMNS, PIECE // item, width)
    yield base, count, down, width // columns, columns, right
