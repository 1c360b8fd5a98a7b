"""Texts to token ids: checked, tokenised once, into one int32 array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from sbert_fast.cutting import beginning, reads_nearby
from sbert_fast.errors import InputError, UnsupportedModelError
from sbert_fast.forking import Lock
from sbert_fast.values import lone_surrogate, shown

# Characters per token of `max_length` beyond which a text is cut before it is tokenised.
_CHARACTERS_PER_TOKEN = 64
# Up to 0.22, added tokens are normalised when they are added, whatever normalizer comes later.
_HIDES_HISTORY = tuple(map(int, tokenizers.__version__.split(".")[:2])) < (0, 23)
# Added tokens beyond which a backend is kept for the next call: adding them takes milliseconds.
_MANY_ADDED = 64
# Added tokens beyond which looking for a cut, which no token may span, takes longer than it saves.
_MOST_ADDED_OF_CUT = 1000
# Texts tokenised at once: bounds the memory of the tokenizer's own objects.
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """The tokens of some texts, one text after the other.

    Attributes:
        ids: int32 `[sum of lengths]`.
        lengths: int32 `[N]`, tokens of each text, special tokens included.
        offsets: int64 `[N + 1]`, where each text starts in `ids`.
        types: int32, parallel to `ids`, or None if all are 0.
        truncated: how many of the texts were cut.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    types: NDArray[np.int32] | None
    truncated: int

    def part(self, first: int, last: int) -> TokenizedTexts:
        """The tokens of texts `first` to `last`; the first text's part counts all that were cut."""
        start, end = self.offsets[first], self.offsets[last]
        types = None if self.types is None else self.types[start:end]
        lengths, offsets = self.lengths[first:last], self.offsets[first : last + 1] - start
        truncated = 0 if first else self.truncated
        return TokenizedTexts(self.ids[start:end], lengths, offsets, types, truncated)

    @classmethod
    def join(cls, parts: Sequence[TokenizedTexts]) -> TokenizedTexts:
        """The tokens of all texts, one after the other."""
        return cls.of([(part.ids, part.lengths, part.types, part.truncated) for part in parts])

    @classmethod
    def of(cls, chunks: list[TokenizedChunk]) -> TokenizedTexts:
        ids, lengths, types, truncated = chunks[0] if len(chunks) == 1 else _joined(chunks)
        offsets = np.zeros(lengths.shape[0] + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(ids, lengths, offsets, types, truncated)


_ids_of = attrgetter("ids")

# Ids of some texts, their lengths, types or None, and how many texts were cut.
TokenizedChunk = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32] | None, int]


def check_texts(
    texts: Sequence[Any], name: str = "inputs", *, besides: tuple[type, ...] = ()
) -> None:
    """Refuse anything that is not a string, before anything is computed.

    Args:
        texts: what to check.
        name: what the caller calls them.
        besides: other types of elements to let through.

    Raises:
        InputError: names the index, what was expected and what came.
    """
    for index, text in enumerate(texts):
        if isinstance(text, str):
            where = None if text.isascii() else lone_surrogate(text)
            if where is not None:
                raise InputError(
                    f"{name}[{index}] must be valid Unicode, got a lone surrogate "
                    f"{text[where]!r} at character {where}"
                )
        elif not isinstance(text, besides):
            raise InputError(
                f"{name}[{index}] must be a str, got {type(text).__name__}{_about(text)}"
            )


def _about(element: object) -> str:
    """What a message adds about an element that is not a string."""
    if element is None or isinstance(element, (int, float)):
        return f" ({shown(element)})"
    if isinstance(element, dict):
        return ": pass the text that it holds"
    if isinstance(element, (list, tuple)):
        return ": pairs and nested lists are not embedded"
    return ""


class TextTokenizer:
    """A Hugging Face tokenizer with fixed truncation and no padding, for one encoder.

    :meth:`refresh` makes its backend again from the very parts that the tokenizer has at that time:
    no change to them is missed, and concurrent calls cannot truncate to each other's lengths.

    Args:
        tokenizer: a `transformers` tokenizer.
        max_length: tokens kept of a text, special tokens included.

    Raises:
        UnsupportedModelError: tokens were added to the backend in a way that cannot be repeated.

    Attributes:
        returns_types: whether the tokenizer's own output holds `token_type_ids`.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:  # noqa: ANN401
        self.max_length = max_length
        self.returns_types = "token_type_ids" in tokenizer.model_input_names
        self._tokenizer, self._right = tokenizer, tokenizer.truncation_side == "right"
        # A Python tokenizer keeps per-call state: one call at a time.
        self._lock = Lock()
        self._backend: Any = None
        self._added, self._num_added = "", 0
        self.refresh()

    def refresh(self) -> None:
        """Take over the tokenizer as it is now.

        Raises:
            UnsupportedModelError: tokens were added to it in a way that cannot be repeated.
        """
        live = getattr(self._tokenizer, "backend_tokenizer", None)
        if live is None:
            return
        added = live.get_added_tokens_decoder()
        if _HIDES_HISTORY and live.normalizer and any(t.normalized for t in added.values()):
            raise UnsupportedModelError(
                "this version of tokenizers does not expose how added tokens are normalised"
            )
        described = repr(added)
        # Calls share a backend that is kept: nothing may be set that they are to find otherwise.
        splits = {live.encode_special_tokens, self._tokenizer.split_special_tokens}
        keeps = (
            len(added) > _MANY_ADDED
            and described == self._added
            and {self._backend.encode_special_tokens} == splits
        )
        self._take_over(live, added, keeps)
        self._added, self._num_added = described, len(added)

    def _take_over(self, live: Any, added: dict[int, Any], keeps: bool) -> None:  # noqa: ANN401
        """Make the backend of the parts of `live`; it keeps its added tokens, or gets `added`."""
        backend = self._private(live, added, self._backend if keeps else None)
        side = self._tokenizer.truncation_side
        backend.enable_truncation(self.max_length, strategy="longest_first", direction=side)
        self._backend = backend

    def _private(self, live: Any, added: dict[int, Any], known: Any | None) -> Any:  # noqa: ANN401
        private = type(live)(live.model) if known is None else known
        private.model = live.model
        for part in ("normalizer", "pre_tokenizer", "post_processor"):
            setattr(private, part, getattr(live, part))
        if known is None:
            private.add_tokens([added[index] for index in sorted(added)])
            if repr(private.get_added_tokens_decoder()) != repr(added):
                raise UnsupportedModelError("the ids of the tokenizer's added tokens have gaps")
        private.encode_special_tokens = live.encode_special_tokens
        normalized = [t.content for t in added.values() if t.normalized and live.normalizer]
        # They are normalised when they are added and when a normalizer is assigned, and stay so
        # when it is written to.
        if normalized and _found(live, normalized) != _found(private, normalized):
            raise UnsupportedModelError("the normalizer was written to after tokens were added")
        private.encode_special_tokens = self._tokenizer.split_special_tokens
        return private

    def __call__(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenise checked texts.

        Args:
            texts: texts that :func:`check_texts` accepts.
        """
        return TokenizedTexts.of(
            [self._chunk(texts[i : i + _CHUNK]) for i in range(0, len(texts), _CHUNK)]
        )

    def prepend(self, prompt: str, texts: Sequence[Any]) -> list[Any]:
        """The texts with a prompt in front."""
        return [prompt + text for text in texts]

    def token(self, token_id: int) -> str:
        """The token that an id stands for."""
        if self._backend is None:
            return str(self._tokenizer.convert_ids_to_tokens(token_id))
        return str(self._backend.id_to_token(token_id))

    def _chunk(self, texts: Sequence[Any]) -> TokenizedChunk:
        if self._backend is None:
            return self._slow_chunk(texts)
        encodings = self._encode(texts)
        lengths = np.fromiter(map(len, encodings), dtype=np.int32, count=len(encodings))
        total = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(map(_ids_of, encodings)), np.int32, total)
        types = None
        # A few tokenizers number the segments of a single text with something other than 0.
        if self.returns_types and any(encodings[int(lengths.argmax())].type_ids):
            types = np.fromiter(chain.from_iterable(e.type_ids for e in encodings), np.int32, total)
        full = np.flatnonzero(lengths == self.max_length)
        return ids, lengths, types, sum(1 for i in full if encodings[i].overflowing)

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        # Another call may replace it meanwhile.
        backend, limit = self._backend, self.max_length * _CHARACTERS_PER_TOKEN
        encode, longest = backend.encode_batch_fast, max(map(len, texts), default=0)
        cuts = longest > limit and self._right and self._num_added <= _MOST_ADDED_OF_CUT
        if not (cuts and reads_nearby(backend)):
            return tokenize(encode, texts)
        parts = [beginning(backend, text, limit) for text in texts]
        encodings = tokenize(encode, parts)
        # A beginning that has no more tokens than are kept does not tell all of them.
        whole = [
            index
            for index, (text, part) in enumerate(zip(texts, parts, strict=True))
            if len(part) < len(text) and not encodings[index].overflowing
        ]
        for index in whole:
            encodings[index] = tokenize(encode, [texts[index]])[0]
        return encodings

    def _slow_chunk(self, texts: Sequence[Any]) -> TokenizedChunk:
        tokenizer, texts = self._tokenizer, list(texts)
        with self._lock:
            whole = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
            encoded = tokenizer(texts, truncation=True, max_length=self.max_length)
        kept, types = encoded["input_ids"], None
        lengths = np.fromiter(map(len, kept), dtype=np.int32, count=len(kept))
        total = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(kept), np.int32, total)
        if self.returns_types and any(map(any, encoded["token_type_ids"])):
            types = np.fromiter(chain.from_iterable(encoded["token_type_ids"]), np.int32, total)
        cut = sum(len(a) > len(b) for a, b in zip(whole, kept, strict=True))
        return ids, lengths, types, cut


def _joined(parts: list[TokenizedChunk]) -> TokenizedChunk:
    ids = np.concatenate([part[0] for part in parts] or [np.zeros(0, dtype=np.int32)])
    lengths = np.concatenate([part[1] for part in parts] or [np.zeros(0, dtype=np.int32)])
    types = None
    if any(part[2] is not None for part in parts):
        types = np.concatenate([np.zeros_like(p[0]) if p[2] is None else p[2] for p in parts])
    return ids, lengths, types, sum(part[3] for part in parts)


def _found(backend: Any, contents: list[str]) -> set[tuple[Any, ...]]:  # noqa: ANN401
    """What a backend makes of each of some texts, whatever it cuts and pads: of each token the
    number of its text, its place there and its id."""
    first = backend.encode(contents, is_pretokenized=True, add_special_tokens=False)
    return {
        token[1:]
        for part in (first, *first.overflowing)
        for token in zip(part.attention_mask, part.word_ids, part.offsets, part.ids, strict=True)
        if token[0]
    }


def tokenize(encode: Any, texts: Sequence[Any]) -> list[Any]:  # noqa: ANN401
    """`encode(texts)`; a panic of the tokenizer becomes an InputError."""
    try:
        return encode(texts)
    except BaseException as error:
        # A panic in Rust is a BaseException, which a caller's `except Exception` does not catch.
        if type(error).__name__ == "PanicException":
            raise InputError(
                f"the tokenizer failed on one of {len(texts)} texts: {error}"
            ) from error
        raise
