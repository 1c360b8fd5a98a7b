"""Copies between host and GPU: one for what a batch needs, one for what a slice gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbert_fast.packing import PackedBatch

# In int32 elements: every part of a buffer starts at a multiple of 16 bytes.
_ALIGNMENT = 4


_of_thread = threading.local()


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """This thread's two streams: torch sets memory aside for every stream that was ever used."""
    held = _of_thread.__dict__.setdefault("streams", {})
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in held:
        held[index] = torch.cuda.Stream(index), torch.cuda.Stream(index)
    pair: tuple[torch.cuda.Stream, torch.cuda.Stream] = held[index]
    return pair


def device_error(device: torch.device) -> str | None:
    """The error after which every call on a CUDA device fails, until the process ends; None if the
    device works, and on a CPU. Waits for what runs on the device."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


class Transfers:
    """The copies of one call, on streams beside the current one of `device`.

    On a CPU nothing is copied, and the same calls return what they were given.

    Args:
        device: where the engine runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            self._incoming, self._outgoing = _streams(device)

    @contextmanager
    def current_device(self) -> Iterator[None]:
        """Make `device` the one that kernels are launched on."""
        if not self._is_cuda:
            yield
            return
        with torch.cuda.device(self.device):
            yield

    def stage(self, batch: PackedBatch, rows: NDArray[np.int64]) -> tuple[PackedBatch, Tensor]:
        """A batch on the device, and the rows of its sequences, int32 `[B]`.

        Everything travels through one pinned buffer in one copy, ordered before whatever is
        launched on the current stream from now on.
        """
        where = torch.from_numpy(rows.astype(np.int32))
        if not self._is_cuda:
            return batch, where
        parts = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "token_type_ids": batch.token_type_ids,
            "cu_seqlens": batch.cu_seqlens,
            "tiles": batch.tiles,
            "rows": where,
        }
        held = {name: part for name, part in parts.items() if part is not None}
        sizes = [-(-part.numel() // _ALIGNMENT) * _ALIGNMENT for part in held.values()]
        buffer = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
        for part, into in zip(held.values(), buffer.split(sizes), strict=True):
            into[: part.numel()].copy_(part.reshape(-1))

        stream = torch.cuda.current_stream()
        with torch.cuda.stream(self._incoming):
            copied = buffer.to(self.device, non_blocking=True)
        stream.wait_stream(self._incoming)
        copied.record_stream(stream)
        moved = {
            name: whole[: part.numel()].view(part.shape)
            for (name, part), whole in zip(held.items(), copied.split(sizes), strict=True)
        }
        where = moved.pop("rows")
        return replace(batch, **moved), where

    def collect(self, embeddings: Tensor, to: torch.device) -> Arrival:
        """Start copying fp32 `[n, dimension]` rows and checking that they are finite.

        Both begin once everything already launched on the current stream is done.

        Args:
            embeddings: on the device.
            to: the CPU, or the device itself: the rows then stay as they are.
        """
        if not self._is_cuda:
            return Arrival(embeddings, _finite_rows(embeddings), None)
        self._outgoing.wait_stream(torch.cuda.current_stream())
        rows = embeddings
        if to.type == "cpu":
            rows = torch.empty(embeddings.shape, dtype=torch.float32, pin_memory=True)
        finite = torch.empty(embeddings.shape[0], dtype=torch.bool, pin_memory=True)
        with torch.cuda.stream(self._outgoing):
            if rows is not embeddings:
                rows.copy_(embeddings, non_blocking=True)
            finite.copy_(_finite_rows(embeddings), non_blocking=True)
            embeddings.record_stream(self._outgoing)
            done = self._outgoing.record_event()
        return Arrival(rows, finite, done)


def _finite_rows(x: Tensor) -> Tensor:
    """Bool `[n]` for `[n, dimension]`: the largest magnitude is NaN if any value is."""
    return torch.isfinite(torch.linalg.vector_norm(x, ord=float("inf"), dim=1))


class Arrival:
    """A pending copy of rows."""

    def __init__(self, rows: Tensor, finite: Tensor, done: torch.cuda.Event | None) -> None:
        self._rows, self._finite, self._done = rows, finite, done

    def wait(self) -> tuple[Tensor, Tensor]:
        """The rows, and bool `[n]`, which of them are finite. Blocks until they have arrived."""
        if self._done is not None:
            self._done.synchronize()
        return self._rows, self._finite
