"""Threads that share an encoder: packed, equal vectors."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from checks import bits
from families import make_texts
from sbert_fast import FastEncoder

# Threads


@pytest.fixture
def one_thread_each() -> Iterator[None]:
    """Threads that call at once share the cores; more threads inside each would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads(st: SentenceTransformer, dtype: str, one_thread_each: None) -> None:
    texts = make_texts(160, seed=3)
    parts = [texts[start : start + 1 + start % 23] for start in range(160)]
    serial = FastEncoder(st, dtype=dtype)
    expected = [bits(serial.encode(part, prompt_name="query")) for part in parts]
    before = FastEncoder(st, dtype=dtype)
    before.refresh()
    start = threading.Barrier(8)
    wrong: list[int] = []
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            # All of them at once, the first time too: weights are not prepared yet.
            start.wait()
            for index in range(thread, 160, 8):
                ours = bits(before.encode(parts[index], prompt_name="query"))
                if not np.array_equal(ours, expected[index]):
                    wrong.append(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert wrong == []
    stats = before.stats
    assert stats.texts == sum(map(len, parts))
    assert Counter(stats.fallbacks) == {}
