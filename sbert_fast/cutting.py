"""Where a long text may be cut before it is tokenised, so that its first tokens stay the same.

Every part of a tokenizer that is accepted here acts on characters with few neighbours, and the
pre-tokenizer splits at the cut. So what comes before the cut has the words that it has in the whole
text, and the model of a tokenizer reads one word at a time.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Normalizers that look no further than a character and the ones that combine with it,
# pre-tokenizers that split between characters of certain kinds, and the pattern that normalizers
# like XLM-R's replace.
_LOCAL = frozenset(
    "BertNormalizer BertPreTokenizer ByteLevel Digits Lowercase Metaspace NFC NFD NFKC NFKD Nmt "
    "Precompiled Punctuation Strip StripAccents Whitespace WhitespaceSplit".split()
)
_LOCAL_PATTERNS: tuple[dict[str, str], ...] = ({"Regex": " {2,}"},)
# Characters that combine with nothing before them, and with no space behind them: ASCII, and
# letters and digits of scripts without prepended marks.
_PLAIN = r"(?:[!-~]|[^\W_\u0900-\u3040\ua000-\uabff\ud7a4-\U0010ffff])"
# A cut comes before a single space or line break between such characters, and where the words of
# BERT end besides: behind punctuation, and between Chinese characters.
_AT_SPACES = re.compile(rf"{_PLAIN}(?=[ \n]{_PLAIN})")
_OF_BERT = re.compile(
    rf"{_PLAIN}(?=[ \n]{_PLAIN})|[!-/:-@\[-`{{-~](?=[!-~])|[\u4e00-\u9fff](?=[\u4e00-\u9fff])"
)
# Characters before the limit among which a cut is sought, and how many places are tried.
_WINDOW, _MOST_PLACES = 4096, 16


def beginning(backend: Any, text: str, limit: int) -> str:  # noqa: ANN401
    """At most `limit` characters of a text whose tokens are the first ones of the whole text; or
    the whole text, where no cut is known to leave them alone.

    Args:
        backend: a tokenizer of the package `tokenizers` that :func:`reads_nearby`.
        text: the text.
        limit: in characters.
    """
    if len(text) <= limit:
        return text
    is_bert = type(backend.pre_tokenizer).__name__ == "BertPreTokenizer"
    found = (_OF_BERT if is_bert else _AT_SPACES).finditer(text, max(0, limit - _WINDOW), limit)
    for place in [match.end() for match in found][: -_MOST_PLACES - 1 : -1]:
        if _splits(backend, text[place - 1 : place + 2]):
            return text[:place]
    return text


def _splits(backend: Any, around: str) -> bool:  # noqa: ANN401
    """Whether words end behind the first of three characters, whatever surrounds them."""
    normalizer = backend.normalizer
    normal = str if normalizer is None else normalizer.normalize_str
    at_space = around[1] in " \n"
    spaces, around = ((" ", "\n"), around) if at_space else (("",), around[:2])
    first, last, whole = normal(around[0]), normal(around[-1]), normal(around)
    if not first or whole not in [first + space + last for space in spaces]:
        return False
    # A token that was added is found before words are.
    for token in backend.get_added_tokens_decoder().values():
        if around[:2] in token.content or normal(around[:2]) in normal(token.content):
            return False
        if token.single_word and not at_space:
            return False
    pieces = [ends for _, ends in backend.pre_tokenizer.pre_tokenize_str(whole)]
    return all(end <= len(first) or start >= len(first) for start, end in pieces)


def reads_nearby(backend: Any) -> bool:  # noqa: ANN401
    """Whether each word of a text depends only on the characters around it."""
    parts = [part for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    try:
        states = [json.loads(part.__getstate__()) for part in parts]
    except Exception:  # parts written in Python cannot be looked into
        return False
    return backend.pre_tokenizer is not None and all(map(_is_local, states))


def _is_local(part: dict[str, Any]) -> bool:
    inside = part.get("normalizers", part.get("pretokenizers"))
    if inside is not None:
        return all(map(_is_local, inside))
    if part["type"] == "Replace":
        return part["pattern"] in _LOCAL_PATTERNS
    return part["type"] in _LOCAL and part.get("split", True) and part.get("use_regex", True)
