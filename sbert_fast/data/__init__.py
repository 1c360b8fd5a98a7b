"""The bundled sample text, for the demo, the tests and the benchmarks. See README.md beside it."""

from __future__ import annotations

from importlib import resources

__all__ = ["multilingual_texts", "sample_texts"]


def sample_texts() -> list[str]:
    """Read the bundled English texts: sentences and paragraphs on some twenty topics, mixed.

    Returns:
        About 1,070 distinct texts in a fixed order, of 6 to 160 words each, plain ASCII.
    """
    return _lines("sample_texts.txt")


def multilingual_texts() -> list[str]:
    """Read the bundled texts in other languages and scripts, emoji and mixed scripts among them.

    Returns:
        About 130 distinct texts in a fixed order, of 1 to 60 words each, grouped by language. One
        holds decomposed accents and one no-break spaces, on purpose.
    """
    return _lines("multilingual_texts.txt")


def _lines(name: str) -> list[str]:
    text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    # Not splitlines(): that also cuts at characters which may stand inside a text.
    return text.removesuffix("\n").split("\n")
