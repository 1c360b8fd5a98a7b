"""Counters of an encoder."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import count

from sbert_fast.forking import Lock

# Additions that wait until someone reads the counters, or there are this many.
_MOST_WAITING = 100


class Tally:
    """A count to which threads add without waiting for one another: to take the next number is a
    single step."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._numbers = count()
        self._taken = 0  # numbers that stand for no addition

    def add(self) -> None:
        next(self._numbers)

    def value(self) -> int:
        with self._lock:
            value = next(self._numbers) - self._taken
            self._taken += 1
            return value

    def reset(self) -> None:
        with self._lock:
            self._taken = next(self._numbers) + 1


@dataclass
class EncoderStats:
    """What an encoder has done so far.

    Attributes:
        texts: texts encoded by the packed engine.
        tokens: tokens computed, including special tokens; there is no padding.
        batches: packed batches run.
        truncated: texts cut at `max_seq_length`.
        memory_shortages: batches that did not fit the memory of the device and were cut again.
        forwards: calls of a base model that ran packed because the encoder itself was called, as in
            training.
        fallbacks: calls handed to sentence-transformers, by reason; of those of a base model, only
            the ones in training.
    """

    texts: int = 0
    tokens: int = 0
    batches: int = 0
    truncated: int = 0
    memory_shortages: int = 0
    forwards: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)

    @property
    def bit_repeatable(self) -> bool:
        """Whether another run gives the same bits on a GPU: not if memory ran out."""
        return self.memory_shortages == 0


class Counters:
    """Thread-safe counters behind :class:`EncoderStats`; a copy starts from zero."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._stats = EncoderStats()
        self._waiting: deque[dict[str, int]] = deque()
        self._told: set[str] = set()

    def __reduce__(self) -> tuple[type[Counters], tuple[()]]:
        return type(self), ()

    def snapshot(self) -> EncoderStats:
        with self._lock:
            self._add_waiting()
            return replace(self._stats, fallbacks=dict(self._stats.fallbacks))

    def add(self, **amounts: int) -> None:
        """Add to the counters of these names."""
        self._waiting.append(amounts)
        if len(self._waiting) >= _MOST_WAITING:
            with self._lock:
                self._add_waiting()

    def _add_waiting(self) -> None:
        while self._waiting:
            for name, amount in self._waiting.popleft().items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)

    def expect_fallback(self, reason: str) -> None:
        """Note that the user knows a reason."""
        with self._lock:
            self._told.add(reason)

    def add_fallback(self, reason: str) -> bool:
        """Count a fallback; True if the user does not know the reason yet."""
        with self._lock:
            self._stats.fallbacks[reason] = self._stats.fallbacks.get(reason, 0) + 1
            is_new = reason not in self._told
            self._told.add(reason)
            return is_new
