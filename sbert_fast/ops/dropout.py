"""Dropout of attention weights: which of them stay, by a seed and the places of two tokens alone.

Four keys of a row share a counter of Philox4x32-10, which the seed is the key of: `(key / 4, packed
row of the query, head, 0)`. Each has a word of the result, and is dropped where that is below the
rate.

Source:
    Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WORD = 2**32 - 1
_ROUNDS = 10


def draw_seed(device: torch.device) -> Tensor:
    """A seed int64 `[1]`, of torch's default generator of `device`."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Four words of Philox4x32-10 for each of the counters, four words; all in int64."""
    x0, x1, x2, x3 = counter
    low, high = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        # They wrap; the bits of both halves are right all the same.
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = ((b >> 32) & _WORD) ^ x1 ^ low, b & _WORD
        x2, x3 = ((a >> 32) & _WORD) ^ x3 ^ high, a & _WORD
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return x0, x1, x2, x3


def kept(rate: float, seed: Tensor, rows: Tensor, heads: int, keys: int) -> Tensor:
    """Which weights stay.

    Args:
        rate: in [0, 1).
        seed: int64 `[1]`.
        rows: packed rows `[n, Q]` of queries.
        heads, keys: how many there are.

    Returns:
        bool `[n, H, Q, keys]`.
    """
    sizes: dict[str, Any] = {"dtype": torch.int64, "device": rows.device}
    row = rows.to(torch.int64)[:, None, :, None]
    head = torch.arange(heads, **sizes)[:, None, None]
    group = torch.arange(-(-keys // 4), **sizes)
    counter = torch.broadcast_tensors(group, row, head, torch.zeros(1, **sizes))
    words = torch.stack(philox(counter, seed), dim=-1).flatten(-2)
    return words[..., :keys] >= int(rate * 2**32)


def drop(weights: Tensor, rate: float, seed: Tensor | None, rows: Tensor) -> Tensor:
    """`weights` `[n, H, Q, L]` of queries in the packed `rows` `[n, Q]`: zeros where they are
    dropped, and otherwise larger by `1 / (1 - rate)`."""
    if rate == 0:
        return weights
    if seed is None:
        raise ValueError("seed must be given with dropout, got None")
    stay = kept(rate, seed, rows, weights.shape[1], weights.shape[3])
    return torch.where(stay, weights / (1 - rate), 0)
