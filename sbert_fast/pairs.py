"""Pairs of texts to token ids: each different text is tokenised once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbert_fast.tokenization import TextTokenizer, TokenizedChunk, tokenize

Pair = tuple[str, str] | list[str]

_NOTHING = np.zeros(0, dtype=np.int32)
# Two texts: what is around them in a pair is around any two.
_PROBE = "a", "b"


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a tokenizer puts around the two texts of a pair.

    Attributes:
        ids, types: int32, the special tokens before, between and behind the texts.
        bounds: where each of these three groups begins in `ids`, and the end.
        own: the types of the tokens of the first and of the second text.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    bounds: tuple[int, int, int, int]
    own: tuple[int, int]

    @classmethod
    def of(cls, first: Any, second: Any, pair: Any) -> _Layout | None:  # noqa: ANN401
        """Read from the encodings of two texts and of the pair of them; None if the pair is not
        one text after the other."""
        ids, types = (np.array(x, dtype=np.int32) for x in (pair.ids, pair.type_ids))
        places = [
            (a, b)
            for a in _places(pair.ids, first.ids)
            for b in _places(pair.ids, second.ids)
            if a + len(first) <= b
        ]
        if len(places) != 1:
            return None
        ((a, b),) = places
        ends = a + len(first), b + len(second)
        special = np.r_[0:a, ends[0] : b, ends[1] : ids.size]
        own = types[a : ends[0]], types[b : ends[1]]
        if any(map(np.ptp, own)):
            return None
        bounds = 0, a, a + b - ends[0], special.size
        return cls(ids[special], types[special], bounds, (int(own[0][0]), int(own[1][0])))


def _places(ids: list[int], part: list[int]) -> list[int]:
    """Where `part`, which is not empty, begins in `ids`."""
    return [i for i in range(len(ids)) if part and ids[i : i + len(part)] == part]


_NO_LAYOUT = _Layout(_NOTHING, _NOTHING, (0, 0, 0, 0), (0, 0))


@dataclass(frozen=True, slots=True)
class _Backend:
    """What tokenises pairs, as of one moment: `parts` tokenises single texts, whole and bare;
    `join` makes one encoding of two, cut to the limit."""

    parts: Any
    join: Any
    layout: _Layout | None


class PairTokenizer(TextTokenizer):
    """A :class:`TextTokenizer` of pairs of texts, as a cross-encoder reads them.

    A text that belongs to many pairs, as a query does, is tokenised once. Pairs that are too long
    are cut by the tokenizer itself, which takes tokens from the longer text.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:  # noqa: ANN401
        self._pairs: _Backend | None = None
        super().__init__(tokenizer, max_length)

    def _take_over(self, live: Any, added: dict[int, Any], keeps: bool) -> None:  # noqa: ANN401
        super()._take_over(live, added, keeps)
        known = self._pairs.parts if keeps and self._pairs is not None else None
        parts, join = self._private(live, added, known), self._backend
        first, second = (parts.encode(text, add_special_tokens=False) for text in _PROBE)
        layout = _Layout.of(first, second, parts.encode(*_PROBE))
        self._pairs = _Backend(parts, join, layout)

    def prepend(self, prompt: str, texts: Sequence[Any]) -> list[Any]:
        return [(prompt + first, second) for first, second in texts]

    def _chunk(self, texts: Sequence[Any]) -> TokenizedChunk:
        return self._slow_chunk(texts) if self._pairs is None else self._join(self._pairs, texts)

    def _join(self, backend: _Backend, pairs: Sequence[Pair]) -> TokenizedChunk:
        numbers: dict[str, int] = {}
        owners = np.fromiter(
            (numbers.setdefault(text, len(numbers)) for text in chain.from_iterable(pairs)),
            dtype=np.int64,
            count=2 * len(pairs),
        ).reshape(-1, 2)
        encode = partial(backend.parts.encode_batch_fast, add_special_tokens=False)
        parts = tokenize(encode, list(numbers))
        sizes = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        layout = backend.layout or _NO_LAYOUT
        room = self.max_length - backend.join.num_special_tokens_to_add(True)
        too_long = sizes[owners].sum(axis=1) > room
        # Those the tokenizer joins: it cuts them, or there is no telling what it puts around them.
        (apart,) = np.nonzero(too_long | (backend.layout is None))
        if backend.layout is None:
            joined = tokenize(backend.join.encode_batch_fast, [tuple(pair) for pair in pairs])
        else:
            joined = [backend.join.post_process(*(parts[i] for i in at)) for at in owners[apart]]

        pieces = [*parts, *joined]
        lengths = np.array([*np.diff(layout.bounds), *map(len, pieces)], dtype=np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        # The pieces of each pair: special tokens and texts in turn.
        which = np.empty((len(pairs), 5), dtype=np.int64)
        which[:, [0, 2, 4]] = 0, 1, 2
        which[:, [1, 3]] = 3 + owners
        counts = lengths[which]
        counts[apart, 1:] = 0
        which[apart, 0] = 3 + len(parts) + np.arange(apart.size)
        counts[apart, 0] = lengths[which[apart, 0]]
        source = _ranges(starts[which].ravel(), counts.ravel())

        own = int(sizes.sum()) + layout.ids.size
        every = int(lengths.sum())
        ids = np.empty(every, dtype=np.int32)
        ids[: layout.ids.size] = layout.ids
        ids[layout.ids.size :] = np.fromiter(
            chain.from_iterable(piece.ids for piece in pieces), np.int32, every - layout.ids.size
        )
        types = None
        if self.returns_types:
            own_types = dict(enumerate(backend.layout.own if backend.layout else ()))
            of_joined = (kind for piece in joined for kind in _types(piece, own_types))
            known = np.zeros(every, dtype=np.int32)
            known[: layout.types.size] = layout.types
            known[own:] = np.fromiter(of_joined, np.int32, every - own)
            of_texts = np.tile([0, layout.own[0], 0, layout.own[1], 0], len(pairs))
            types = known[source] + np.repeat(of_texts, counts.ravel()).astype(np.int32)
        return ids[source], counts.sum(axis=1, dtype=np.int32), types, int(too_long.sum())


def _types(joined: Any, own: dict[int, int]) -> Iterator[int]:  # noqa: ANN401
    """The types of the tokens of a pair, given those of its texts: what it was joined of does not
    know that it comes second."""
    for text, kind in zip(joined.sequence_ids, joined.type_ids, strict=True):
        yield own.get(text, kind)


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """`start, start + 1, ...`, as many as each of `counts` says, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
