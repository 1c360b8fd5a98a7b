"""Texts to token ids: checked, tokenised once, into one int32 array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbert_fast.errors import InputError, UnsupportedModelError
from sbert_fast.forking import Lock
from sbert_fast.values import lone_surrogate, shown

# Characters per token of `max_length` beyond which a text is cut before it is tokenised.
_CHARACTERS_PER_TOKEN = 64
# A cut text stands for the whole one only if its last kept token ends this far before the cut.
_CUT_MARGIN = 1024
# Rows of a vocabulary that tell it from another one of its size.
_SAMPLED_IDS = tuple(int(1.4**i) for i in range(36))
# Texts tokenised at once: bounds the memory of the tokenizer's own objects.
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """The tokens of some texts, one text after the other.

    Attributes:
        ids: int32 `[sum of lengths]`.
        lengths: int32 `[N]`, tokens of each text, special tokens included.
        offsets: int64 `[N + 1]`, where each text starts in `ids`.
        types: int32, parallel to `ids`, or None where all are 0.
        truncated: how many of the texts were cut.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    types: NDArray[np.int32] | None
    truncated: int


def check_texts(
    texts: Sequence[Any], name: str = "inputs", *, besides: tuple[type, ...] = ()
) -> None:
    """Refuse anything that is not a text, before anything is computed.

    Args:
        texts: to be checked.
        name: what the caller calls them.
        besides: types of elements that are passed by.

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
    """What a message adds about an element that is not a text."""
    if element is None or isinstance(element, (int, float)):
        return f" ({shown(element)})"
    if isinstance(element, dict):
        return ": pass the text that it holds"
    if isinstance(element, (list, tuple)):
        return ": pairs and nested lists are not embedded"
    return ""


def _part(part: Any) -> object:  # noqa: ANN401
    """What a part of a backend does, in a form that compares."""
    try:
        return None if part is None else part.__getstate__()
    except Exception as error:
        # Written in Python: two of them cannot be told apart.
        return repr(error)


def _vocabulary(model: Any) -> tuple[object, ...]:  # noqa: ANN401
    """The settings of a backend's model, and some of its tokens."""
    settings = (name for name in dir(model) if not name.startswith("_"))
    values = [value for name in settings if not callable(value := getattr(model, name))]
    return (type(model), values, [model.id_to_token(i) for i in _SAMPLED_IDS])


def backend_state(tokenizer: Any) -> tuple[object, ...]:  # noqa: ANN401
    """What decides about the tokens of a text in the Rust backend of a tokenizer.

    Of the vocabulary that is its size and a sample. The attributes of the tokenizer itself are in
    the snapshot of the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ()
    return (
        *map(_part, (backend.normalizer, backend.pre_tokenizer, backend.post_processor)),
        repr(backend.get_added_tokens_decoder()),
        backend.get_vocab_size(),
        *_vocabulary(backend.model),
    )


class TextTokenizer:
    """A private copy of a Hugging Face tokenizer with fixed truncation and no padding.

    The copy belongs to one encoder and its settings never change after construction, so that
    concurrent calls cannot truncate to each other's lengths.

    Args:
        tokenizer: a `transformers` tokenizer.
        max_length: tokens kept of a text, special tokens included.

    Raises:
        UnsupportedModelError: a part of the tokenizer cannot be copied.

    Attributes:
        returns_types: the tokenizer's own output holds `token_type_ids`.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:  # noqa: ANN401
        self.max_length = max_length
        self.returns_types = "token_type_ids" in tokenizer.model_input_names
        self._backend = None
        self._slow = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            # A Python tokenizer keeps per-call state: one call at a time.
            self._slow, self._lock = tokenizer, Lock()
            self._keeps_types = False
            return
        try:
            private = type(backend).from_str(backend.to_str())
        except Exception as error:
            raise UnsupportedModelError(f"the tokenizer cannot be copied: {error}") from error
        private.encode_special_tokens = tokenizer.split_special_tokens
        private.no_padding()
        self._right = tokenizer.truncation_side == "right"
        private.enable_truncation(
            max_length, strategy="longest_first", direction=tokenizer.truncation_side
        )
        self._backend = private
        # A few tokenizers number the segments of a single text other than 0.
        self._keeps_types = self.returns_types and any(private.encode("a").type_ids)

    def __call__(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenise checked texts.

        Args:
            texts: as :func:`check_texts` accepts them.
        """
        parts = [self._chunk(texts[i : i + _CHUNK]) for i in range(0, len(texts), _CHUNK)]
        lengths = np.concatenate([part[1] for part in parts] or [np.zeros(0, dtype=np.int32)])
        ids = np.concatenate([part[0] for part in parts] or [np.zeros(0, dtype=np.int32)])
        types = None
        if self._keeps_types:
            types = np.concatenate([part[2] for part in parts if part[2] is not None])
        offsets = np.zeros(lengths.shape[0] + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return TokenizedTexts(ids, lengths, offsets, types, sum(part[3] for part in parts))

    def token(self, token_id: int) -> str:
        """The token that an id stands for."""
        if self._backend is None:
            assert self._slow is not None
            return str(self._slow.convert_ids_to_tokens(token_id))
        return str(self._backend.id_to_token(token_id))

    def _chunk(
        self, texts: Sequence[str]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32] | None, int]:
        if self._backend is None:
            return self._slow_chunk(texts)
        encodings = self._encode(texts)
        lengths = np.fromiter(map(len, encodings), dtype=np.int32, count=len(encodings))
        total = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, total)
        types = None
        if self._keeps_types:
            types = np.fromiter(chain.from_iterable(e.type_ids for e in encodings), np.int32, total)
        full = np.flatnonzero(lengths == self.max_length)
        return ids, lengths, types, sum(1 for i in full if encodings[i].overflowing)

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        assert self._backend is not None
        limit = self.max_length * _CHARACTERS_PER_TOKEN
        if not self._right or max(map(len, texts), default=0) <= limit:
            return _tokenize(self._backend.encode_batch_fast, texts)
        encodings = _tokenize(self._backend.encode_batch, [text[:limit] for text in texts])
        for index, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            if len(text) > limit and not (
                len(encoding) == self.max_length
                and max(end for _, end in encoding.offsets) <= limit - _CUT_MARGIN
            ):
                encodings[index] = _tokenize(self._backend.encode_batch_fast, [text])[0]
        return encodings

    def _slow_chunk(
        self, texts: Sequence[str]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], None, int]:
        assert self._slow is not None
        with self._lock:
            whole = self._slow(list(texts), truncation=False, verbose=False)["input_ids"]
            kept = self._slow(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        lengths = np.fromiter(map(len, kept), dtype=np.int32, count=len(kept))
        ids = np.fromiter(chain.from_iterable(kept), np.int32, int(lengths.sum()))
        cut = sum(len(a) > len(b) for a, b in zip(whole, kept, strict=True))
        return ids, lengths, None, cut


def _tokenize(encode: Any, texts: Sequence[str]) -> list[Any]:  # noqa: ANN401
    try:
        return encode(texts)
    except BaseException as error:
        # A panic of the Rust side is a BaseException that no `except Exception` of a caller stops.
        if type(error).__name__ == "PanicException":
            raise InputError(
                f"the tokenizer failed on one of {len(texts)} texts: {error}"
            ) from error
        raise
