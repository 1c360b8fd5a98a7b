"""The corpora that the benchmarks make of the bundled sample text."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sbert_fast.bench import corpora
from sbert_fast.bench.checkpoint import Checkpoint
from sbert_fast.bench.corpora import CORPORA, length_stats, load_corpus, target_lengths

TEXTS = 2000
every_corpus = pytest.mark.parametrize("name", CORPORA)


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) + 1 for text in texts]


@every_corpus
def test_texts_are_distinct_repeatable_and_of_exactly_the_target_lengths(
    name: str, minilm: Checkpoint
) -> None:
    """By the model's own tokenizer, special tokens included."""
    texts = load_corpus(name, TEXTS, 3, minilm.count)
    assert len(texts) == len(set(texts)) == TEXTS
    assert load_corpus(name, TEXTS, 3, minilm.count) == texts
    assert set(load_corpus(name, TEXTS, 2, minilm.count)) != set(texts)
    ids = AutoTokenizer.from_pretrained(minilm.path)(texts, truncation=False)["input_ids"]
    assert sorted(map(len, ids)) == sorted(target_lengths(name, TEXTS))


@pytest.mark.parametrize(
    ("name", "mean", "margin"), [("short", 14.7, 0.5), ("passages", 84.6, 0.5), ("mixed", 30, 2)]
)
def test_target_lengths_have_the_means_of_the_data(name: str, mean: float, margin: float) -> None:
    stats = length_stats(target_lengths(name, TEXTS))
    assert abs(stats["mean"] - mean) <= margin
    seen_by_a_token = {"short": 18.4, "passages": 95.9}
    assert abs(stats["Le"] - seen_by_a_token.get(name, stats["Le"])) <= 0.5


@every_corpus
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_lengths_stay_within_the_limits_for_any_n(name: str, n: int) -> None:
    lengths = target_lengths(name, n)
    assert len(lengths) == n
    assert min(lengths) >= min(model.low for model in CORPORA[name])
    assert max(lengths) <= max(model.high for model in CORPORA[name])


def test_large_corpus_of_short_texts_stays_distinct(minilm: Checkpoint) -> None:
    assert len(set(load_corpus("short", 20_000, 0, minilm.count))) == 20_000


def test_lengths_follow_the_callers_tokenizer() -> None:
    texts = load_corpus("passages", 200, 0, count_words)
    assert sorted(count_words(texts)) == sorted(target_lengths("passages", 200))


def test_path_gives_distinct_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n\ntwo\n\u0442\u0440\u0438\n", encoding="utf-8")
    assert sorted(load_corpus(str(path), 3, 0, len)) == ["one", "two", "\u0442\u0440\u0438"]
    assert load_corpus(str(path), 2, 5, len) == load_corpus(str(path), 2, 5, len)
    with pytest.raises(ValueError, match=r"n must be at most 3, the distinct lines of .*, got 4"):
        load_corpus(str(path), 4, 0, len)


def test_bad_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = "one of 'short', 'passages', 'wiki', 'mixed' or the path of a text file, got 'shirt'"
    with pytest.raises(ValueError, match=f"name_or_path must be {known}"):
        load_corpus("shirt", 1, 0, count_words)
    one_word = corpora.LengthModel(1.0, 0.0, 0.1, 3, 3)
    monkeypatch.setitem(corpora.CORPORA, "short", (one_word,))
    with pytest.raises(ValueError, match=r"n must be small enough .* of 3 tokens in 'short', got"):
        load_corpus("short", 100_000, 0, count_words)


def test_length_stats() -> None:
    stats = length_stats([1, 3])
    assert (stats["mean"], stats["sd"], stats["p50"], stats["max"]) == (2.0, 1.0, 2.0, 3.0)
    assert stats["Le"] == (1 + 9) / (1 + 3)
