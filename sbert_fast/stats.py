"""Counters of an encoder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sbert_fast.forking import Lock


@dataclass
class EncoderStats:
    """What an encoder has done so far.

    Attributes:
        texts: texts encoded by the packed engine.
        tokens: tokens computed, including special tokens; there is no padding.
        batches: packed batches run.
        truncated: texts cut at `max_seq_length`.
        memory_shortages: batches that did not fit the memory of the device and were cut again.
        fallbacks: calls handed to sentence-transformers, by reason.
    """

    texts: int = 0
    tokens: int = 0
    batches: int = 0
    truncated: int = 0
    memory_shortages: int = 0
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
        self._told: set[str] = set()

    def __reduce__(self) -> tuple[type[Counters], tuple[()]]:
        return type(self), ()

    def snapshot(self) -> EncoderStats:
        with self._lock:
            return replace(self._stats, fallbacks=dict(self._stats.fallbacks))

    def add(
        self,
        *,
        texts: int = 0,
        tokens: int = 0,
        batches: int = 0,
        truncated: int = 0,
        memory_shortages: int = 0,
    ) -> None:
        with self._lock:
            self._stats.texts += texts
            self._stats.tokens += tokens
            self._stats.batches += batches
            self._stats.truncated += truncated
            self._stats.memory_shortages += memory_shortages

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
