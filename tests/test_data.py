"""The bundled texts."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import sbert_fast.data
from sbert_fast.data import multilingual_texts, sample_texts


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("read", [sample_texts, multilingual_texts])
def test_bundled_texts_are_distinct_clean_lines(read: Callable[[], list[str]]) -> None:
    texts = read()
    assert len(set(texts)) == len(texts)
    assert [text for text in texts if not text or text != text.strip()] == []


def test_sample_has_the_sizes_that_its_readme_states() -> None:
    texts = sample_texts()
    limits = {"sentences": (6, 25), "short": (40, 80), "long": (100, 160)}
    sizes = Counter(
        name for text in texts for name, (low, high) in limits.items() if low <= words(text) <= high
    )
    assert len(texts) >= 1000
    assert sizes.total() == len(texts)

    readme = (Path(sbert_fast.data.__file__).parent / "README.md").read_text(encoding="utf-8")
    for count in (len(texts), len(multilingual_texts()), *sizes.values()):
        assert f" {count:,} " in readme


def test_sample_is_ascii() -> None:
    assert [text for text in sample_texts() if not text.isascii()] == []


def test_sample_repeats_no_run_of_seven_words() -> None:
    runs: Counter[tuple[str, ...]] = Counter()
    for text in sample_texts():
        parts = text.lower().split()
        runs.update({tuple(parts[i : i + 7]) for i in range(len(parts) - 6)})
    assert [run for run, count in runs.items() if count > 1] == []


def test_multilingual_texts_are_short_and_cover_the_scripts() -> None:
    texts = multilingual_texts()
    assert len(texts) >= 100
    assert max(map(words, texts)) <= 60

    names = {unicodedata.name(c, "").split(" ")[0] for c in "".join(texts)}
    scripts = {"CJK", "HIRAGANA", "HANGUL", "ARABIC", "DEVANAGARI", "CYRILLIC", "GREEK", "LATIN"}
    assert scripts <= names
    assert any(unicodedata.category(c) == "So" for c in "".join(texts)), "no emoji"
    assert any(unicodedata.normalize("NFC", text) != text for text in texts), "nothing decomposed"
