"""The fingerprint of tensors, which tells when something derived from them is stale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.linears import LiveLinear, StackedLinear
from sbert_fast.mapping import MappedTensors
from sbert_fast.ops.content import ContentHash
from sbert_fast.watching import WatchedTensors

Derived = TypeVar("Derived")


def settle(device: torch.device) -> None:
    """Wait for what was prepared on the current stream: other threads read it on their streams."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def tensors_in(node: object) -> Iterator[Tensor]:
    """Every tensor of prepared weights."""
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, tuple):
        for part in node:
            yield from tensors_in(part)
    elif isinstance(node, StackedLinear):
        yield from tensors_in(tuple(vars(node).values()))
    elif isinstance(node, LiveLinear):
        for module in node.modules:
            yield from module.parameters()
    elif is_dataclass(node):
        for entry in fields(node):
            yield from tensors_in(getattr(node, entry.name))


_version_of = Tensor._version.__get__  # type: ignore[attr-defined]


def _counts_writes(tensor: Tensor) -> bool:
    try:
        _version_of(tensor)
    except RuntimeError:
        return False
    return True


class Fingerprint:
    """Tells whether any of some tensors was written to, or given another storage.

    Args:
        tensors: parameters and buffers. Each is asked for its count of writes, address, dtype,
            shape and strides.
        shared: what was derived from them. Tensors that are part of it are read live; the contents
            of the others are watched, because many writes are not counted: through `.data`, by
            fused optimizers, through views of numpy. Where their pages tell of no writes, contents
            are hashed.
        copied: those that something else was computed from; they are watched, too.
        mapped: whether the pages of what would be hashed tell of writes, where they are those of a
            file; then nothing is read, and single bits count.

    Raises:
        UnsupportedModelError: a tensor neither counts writes nor is an inference tensor.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        shared: Iterable[Tensor],
        copied: Iterable[Tensor] = (),
        mapped: bool = False,
    ) -> None:
        self._tensors = list(tensors)
        # They keep the storages alive, so that no address can be reused unnoticed.
        self._held = [tensor.detach() for tensor in self._tensors]
        self._counted = [t for t in self._tensors if not t.is_inference()]
        # Inference tensors count no writes: a hash of all their bits detects them.
        self._uncounted = [t for t in self._tensors if t.is_inference()]
        if not all(map(_counts_writes, self._counted)):
            raise UnsupportedModelError("a tensor made in inference mode was given other data")
        # Tensors in the layout of oneDNN have no address, and are copies.
        addresses = {t.data_ptr() for t in shared if t.layout == torch.strided}
        addresses -= {t.data_ptr() for t in copied}
        live = [t for t in self._tensors if t.data_ptr() in addresses]
        hashed = [t for t in self._tensors if t.data_ptr() not in addresses]
        self._mapped = MappedTensors(hashed if mapped else ())
        live += self._mapped.tensors
        unread = set(map(id, self._mapped.tensors))
        read = [t for t in hashed if id(t) not in unread]
        self._watched = WatchedTensors(read, self._tensors)
        # By what pages tell: that none was written to, or nothing.
        self._hashes: dict[bool | None, ContentHash] = {None: ContentHash(read, live)}
        if self._watched.pages:
            self._hashes[False] = ContentHash(self._watched.rest, [*read, *live])
        self._contents = {told: read_now() for told, read_now in self._hashes.items()}
        self._values = self._read()

    def _read(self) -> tuple[object, ...]:
        return (
            self._mapped.are_written(),
            list(map(_version_of, self._counted)),
            [torch.hash_tensor(tensor).item() for tensor in self._uncounted],
        )

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is that of these very tensors."""
        return [*map(id, self._tensors)] == [*map(id, tensors)]

    def is_current(self) -> bool:
        """Whether no tensor has changed."""
        try:
            return self._holds_contents() and self._read() == self._values
        except RuntimeError:
            if all(map(_counts_writes, self._counted)):
                raise
            return False

    def _holds_contents(self) -> bool:
        written = self._watched.are_written()
        return not written and self._hashes[written]() == self._contents[written]

    def page_out(self) -> None:
        """Take what is mapped out of memory."""
        self._mapped.page_out()

    def outdate(self) -> None:
        """Make :meth:`is_current` return False from now on."""
        self._values = ()


def derive(
    tensors: Iterable[Tensor],
    make: Callable[[], Derived],
    copied: Iterable[Tensor] = (),
    mapped: bool = False,
) -> tuple[Derived, Fingerprint]:
    """What `make` derives from `tensors`, and their fingerprint, which takes `copied`, `mapped`.

    If another thread writes to them in the meantime, the fingerprint is outdated at once.
    """
    tensors = list(tensors)
    before = Fingerprint(tensors, (), mapped=mapped)
    derived = make()
    fingerprint = Fingerprint(tensors, tensors_in(derived), copied, mapped)
    if not before.is_current():
        fingerprint.outdate()
    fingerprint.page_out()
    return derived, fingerprint
