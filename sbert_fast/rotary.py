"""Cosines and sines of rotary positions, of as many positions as have occurred."""

from __future__ import annotations

import torch
from torch import Tensor

from sbert_fast.fingerprint import settle
from sbert_fast.forking import Lock

# Positions that are computed together. The last bits of a cosine depend on where in a tensor it is,
# and on how threads share the tensor: in a block of its own, too small to share, a position has the
# same bits however many there are, and whatever batch asks for it.
_BLOCK = 128
# The least of positions that a table has: most texts are no longer.
_LEAST = 512


class RotaryTable:
    """Grows with the largest position that is asked for. Thread-safe.

    Args:
        frequencies: `[D / 2]`, in radians a token; they are copied.
    """

    def __init__(self, frequencies: Tensor) -> None:
        self._frequencies = frequencies.detach().float().clone()
        self._lock = Lock()
        self._turns = self._computed(0, _LEAST)

    def first(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 `[n, D / 2]`, of at least that many positions."""
        turns = self._turns
        if turns[0].shape[0] < positions:
            turns = self._grown(positions)
        return turns

    def _grown(self, positions: int) -> tuple[Tensor, Tensor]:
        with self._lock:
            known = self._turns[0].shape[0]
            if known < positions:
                more = self._computed(known, 1 << (positions - 1).bit_length())
                with torch.inference_mode(False), torch.no_grad():
                    cos, sin = (torch.cat(p) for p in zip(self._turns, more, strict=True))
                settle(cos.device)
                self._turns = cos, sin
            return self._turns

    @torch.inference_mode(False)
    @torch.no_grad()
    def _computed(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        device, width = self._frequencies.device, self._frequencies.shape[0]
        cos, sin = torch.empty(2, end - start, width, dtype=torch.float32, device=device)
        for first in range(start, end, _BLOCK):
            rows = torch.arange(first, first + _BLOCK, device=device)
            angles = rows.float()[:, None] * self._frequencies
            block = slice(first - start, first - start + _BLOCK)
            cos[block], sin[block] = angles.cos(), angles.sin()
        return cos, sin
