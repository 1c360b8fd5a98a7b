"""Texts to time: the bundled sample text, recombined to known length distributions.

Lengths are tokens including the model's special tokens ([CLS] and [SEP]). The named corpora:

* ``short``: LogN(2.575, 0.475) in 5..70, like the sentences of STS-B; mean 14.7.
* ``passages``: LogN(4.375, 0.354) in 30..256, like the passages of MS MARCO; mean 84.6.
* ``wiki``: N(137.6, 11.9) in 96..208, like 100-word passages of Wikipedia; mean 137.6.
* ``mixed``: four of five texts from ``short``, one from LogN(4.35, 0.6) in 30..256; mean 30.1.

A corpus of n texts has the n evenly spaced quantiles of its distribution as lengths, in random
order: two corpora of one name differ in their words, and hardly in their lengths.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sbert_fast.bench.checkpoint import Checkpoint, Tokens
from sbert_fast.data import sample_texts

CountTokens = Callable[[list[str]], list[int]]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_TRIES = 64
_TRIES_FROM_SENTENCE_START = 16


@dataclass(frozen=True)
class LengthModel:
    """A distribution of lengths in tokens, log-normal unless `logarithmic` is False (then normal),
    rounded and clipped to [low, high]."""

    weight: float
    mu: float
    sigma: float
    low: int
    high: int
    logarithmic: bool = True

    def quantile(self, probability: float) -> int:
        """The length that a share `probability` of the texts, between 0 and 1, stays below."""
        length = NormalDist(self.mu, self.sigma).inv_cdf(probability)
        length = math.exp(length) if self.logarithmic else length
        return min(max(round(length), self.low), self.high)


CORPORA: dict[str, tuple[LengthModel, ...]] = {
    "short": (LengthModel(1.0, 2.575, 0.475, 5, 70),),
    "passages": (LengthModel(1.0, 4.375, 0.354, 30, 256),),
    "wiki": (LengthModel(1.0, 137.6, 11.9, 96, 208, logarithmic=False),),
    "mixed": (LengthModel(0.8, 2.575, 0.475, 5, 70), LengthModel(0.2, 4.35, 0.6, 30, 256)),
}


def load_corpus(name_or_path: str, n: int, seed: int, count_tokens: CountTokens) -> list[str]:
    """Make or read `n` distinct texts; the same arguments always give the same texts.

    Args:
        name_or_path: one of `CORPORA`, the tokens of every text ("64"), or the path of a UTF-8 file
            with one text a line, from which `n` distinct lines are drawn (not blank ones).
        n: how many texts, at least 1.
        seed: of the random choices.
        count_tokens: tokens of each text, special tokens included, such as
            :meth:`Checkpoint.count`. Called on single words: a text counts as the sum of its
            words, which is exact for WordPiece. Not used for a path.

    Returns:
        The texts, in random order.

    Raises:
        ValueError: `name_or_path` is neither a known name nor a file, or there are no `n` distinct
            texts.
    """
    if name_or_path in CORPORA or name_or_path.isdecimal():
        return _recombine(name_or_path, n, seed, count_tokens)
    if Path(name_or_path).is_file():
        return _draw_lines(Path(name_or_path), n, seed)
    names = ", ".join(repr(name) for name in CORPORA)
    raise ValueError(
        f"name_or_path must be one of {names} or the path of a text file, got {name_or_path!r}"
    )


def target_lengths(name: str, n: int) -> list[int]:
    """The `n` lengths of the corpus `name`, in tokens: evenly spaced quantiles, model by model."""
    if name.isdecimal():
        return [int(name)] * n
    models = CORPORA[name]
    edges = [round(n * share) for share in accumulate((m.weight for m in models), initial=0.0)]
    sizes = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
    return [
        model.quantile((i + 0.5) / size)
        for model, size in zip(models, sizes, strict=True)
        for i in range(size)
    ]


class Corpus(NamedTuple):
    """Texts and their tokens; `name` is that of a corpus or of a file."""

    texts: list[str]
    tokens: Tokens
    name: str = ""

    @staticmethod
    def load(name_or_path: str, n: int, seed: int, checkpoint: Checkpoint) -> Corpus:
        """As :func:`load_corpus`, tokenised by `checkpoint`."""
        texts = load_corpus(name_or_path, n, seed, checkpoint.count)
        return Corpus(texts, checkpoint.tokenize(texts), Path(name_or_path).name)

    def first(self, count: int) -> Corpus:
        """The corpus of the first texts."""
        lengths = self.tokens.lengths[:count]
        few = Tokens(self.tokens.ids[: lengths.sum()], lengths)
        return Corpus(self.texts[:count], few, self.name)

    def describe(self) -> dict[str, Any]:
        """As results tell of it."""
        lengths = self.tokens.lengths
        made = {"name": self.name, "texts": len(self.texts), "tokens": int(lengths.sum())}
        return made | {"lengths": length_stats(lengths)}


def length_stats(lengths: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
    """Summarise lengths in tokens.

    Args:
        lengths: tokens of each text, at least one text and one token.

    Returns:
        `mean`, `sd` (of the population), the percentiles `p5` to `p99`, `max`, and
        `Le = E[L^2] / E[L]`: the mean length seen by a token, which attention's cost grows with.
    """
    values = np.asarray(lengths, dtype=np.float64)
    stats = {"mean": float(values.mean()), "sd": float(values.std())}
    for percent in (5, 25, 50, 75, 95, 99):
        stats[f"p{percent}"] = float(np.percentile(values, percent))
    stats["max"] = float(values.max())
    stats["Le"] = float((values**2).sum() / values.sum())
    return stats


@dataclass(frozen=True)
class _Sentence:
    """Words of a sentence and how many tokens the first k + 1 of them make."""

    words: list[str]
    ends: list[int]


def _recombine(name: str, n: int, seed: int, count_tokens: CountTokens) -> list[str]:
    rng = random.Random(f"{name}/{n}/{seed}")
    sentences, special_tokens = _sentences(count_tokens)
    seen: dict[str, None] = {}
    for target in target_lengths(name, n):
        text = _new_text(rng, sentences, target - special_tokens, seen)
        if text is None:
            raise ValueError(
                f"n must be small enough for distinct texts of {target} tokens in {name!r}, got {n}"
            )
        seen[text] = None
    texts = list(seen)
    rng.shuffle(texts)
    return texts


def _sentences(count_tokens: CountTokens) -> tuple[list[_Sentence], int]:
    """The bundled sentences with their token counts, and the special tokens of a text."""
    split = [s.split() for text in sample_texts() for s in _SENTENCE_END.split(text)]
    words = list(dict.fromkeys(word for sentence in split for word in sentence))
    # Counted behind another word, where byte-level tokenizers see the space that is there later.
    empty, lead, *behind_lead = count_tokens(["", "a", *(f"a {word}" for word in words)])
    cost = {word: count - lead for word, count in zip(words, behind_lead, strict=True)}
    made = [_Sentence(ws, list(accumulate(cost[word] for word in ws))) for ws in split]
    return made, empty


def _new_text(
    rng: random.Random, sentences: list[_Sentence], target: int, seen: dict[str, None]
) -> str | None:
    """A text not in `seen` of `target` tokens, or as near as a number of tries gets."""
    best: tuple[int, str] | None = None
    for attempt in range(_TRIES):
        # Few texts of a handful of words start a sentence: later tries start anywhere in one.
        words, tokens = _draw_words(
            rng, sentences, target, anywhere=attempt >= _TRIES_FROM_SENTENCE_START
        )
        text = " ".join(words)
        if text in seen:
            continue
        miss = abs(tokens - target)
        if best is None or miss < best[0]:
            best = (miss, text)
        if miss == 0:
            break
    return best[1] if best else None


def _draw_words(
    rng: random.Random, sentences: list[_Sentence], target: int, *, anywhere: bool
) -> tuple[list[str], int]:
    """Random sentences, the last one cut at the first word with which `target` is reached."""
    words: list[str] = []
    tokens = 0
    while tokens < target or not words:
        sentence = rng.choice(sentences)
        first = rng.randrange(len(sentence.words)) if anywhere and not words else 0
        skipped = sentence.ends[first - 1] if first else 0
        stop = bisect_left(sentence.ends, target - tokens + skipped, lo=first) + 1
        stop = min(stop, len(sentence.words))
        words += sentence.words[first:stop]
        tokens += sentence.ends[stop - 1] - skipped
    return words, tokens


def read_texts(path: Path) -> list[str]:
    """The distinct lines of a file in UTF-8, without blank ones.

    Raises:
        ValueError: it holds no text, or something else.
    """
    expected = f"corpus must be text in UTF-8, one text a line, got {path}"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{expected}: byte {error.start + 1} is not UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{expected}: it holds NUL characters, as binary files do")
    texts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not texts:
        raise ValueError(f"{expected}: there is no text in it")
    return list(dict.fromkeys(texts))


def _draw_lines(path: Path, n: int, seed: int) -> list[str]:
    texts = read_texts(path)
    if n > len(texts):
        raise ValueError(
            f"n must be at most {len(texts)}, the distinct lines of {str(path)!r}, got {n}"
        )
    return random.Random(seed).sample(texts, n)
