"""Few short texts: the same bits as among many, and nothing done that they do not need."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from families import FAMILIES, make_cross_encoder, make_sentence_transformer, make_texts
from instruction_sets import NATIVE
from sbert_fast import FastCrossEncoder, FastEncoder, few, forking, packing, session
from sbert_fast.errors import NonFiniteEmbeddingError
from sbert_fast.stats import Counters, Tally

pytestmark = pytest.mark.skipif(not NATIVE, reason="few texts run on the C++ ops")
TEXTS = make_texts(7)
MANY = make_texts(40)


def unavailable(*_: Any, **__: Any) -> None:
    raise AssertionError("not for one text")


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is planned, sliced or shown on a progress bar."""
    for module, name in (
        (packing, "plan_batches"),
        (packing, "plan_tiles"),
        (session, "tqdm"),
        (session.results, "run"),
    ):
        monkeypatch.setattr(module, name, unavailable)


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize("texts", [TEXTS[0], TEXTS[:1], TEXTS], ids=["text", "list", "texts"])
def test_few_texts_need_no_plan(encoder: FastEncoder, texts: Any) -> None:
    encoder.encode(texts)
    count = 1 if isinstance(texts, str) else len(texts)
    assert (encoder.stats.texts, encoder.stats.batches) == (count, 1)


@pytest.mark.usefixtures("lean")
def test_one_pair_needs_no_plan() -> None:
    FastCrossEncoder(make_cross_encoder("bert")).predict(("sea", "sun"))


def assert_same_bits_alone(family: str, dtype: str) -> None:
    encoder = FastEncoder(make_sentence_transformer(family), dtype=dtype)
    among_many = encoder.encode(MANY)
    alone = np.stack([encoder.encode(text) for text in MANY])
    np.testing.assert_array_equal(alone.view(np.int32), among_many.view(np.int32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_of_a_text_alone(family: str, dtype: str) -> None:
    assert_same_bits_alone(family, dtype)


@pytest.mark.usefixtures("isa", "int8_anywhere")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_bits_of_a_text_alone_on_every_instruction_set(dtype: str) -> None:
    assert_same_bits_alone("bert", dtype)


def test_a_lock_is_never_waited_for(encoder: FastEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder.encode("sea")
    with monkeypatch.context() as patch:
        patch.setattr(forking.Lock, "__enter__", unavailable)
        encoder.encode("sun")
    assert encoder.stats.texts == 2


def test_operations_of_torch_for_one_text(encoder: FastEncoder) -> None:
    encoder.encode("sea")
    with profile(activities=[ProfilerActivity.CPU]) as found:
        encoder.encode("sea")
    counts = {event.key: event.count for event in found.key_averages()}
    layers = encoder.packed_engine.architecture.num_layers
    assert {name: n for name, n in counts.items() if name.startswith("sbert_fast::")} == {
        "sbert_fast::content_hash": 1,
        "sbert_fast::embed_norm": 1,
        "sbert_fast::linear": 2 * layers,
        "sbert_fast::varlen_attention": layers,
        "sbert_fast::linear_norm": 2 * layers,
        "sbert_fast::segment_pool_out": 1,
    }
    # The embedding, and its row among the results; torch copies and computes nothing.
    assert counts["aten::empty"] == 2
    assert counts["aten::view"] == 2 * layers, "states as heads, and back"
    assert not {"aten::copy_", "aten::cat", "aten::index", "aten::abs", "aten::sum"} & counts.keys()


@pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 31])
def test_rows_of_one_text_on_panels(
    encoder: FastEncoder, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    rows: list[int] = []
    pack_all = packing.pack_all

    def record(*args: Any, **how: Any) -> packing.PackedBatch:
        batch = pack_all(*args, **how)
        rows.append(batch.input_ids.shape[0])
        return batch

    monkeypatch.setattr(few, "pack_all", record)
    encoder.encode("sea " * length)
    alignment = encoder.packed_pipeline.prepared.row_alignment
    assert rows == [-(-encoder.stats.tokens // alignment) * alignment]


def test_whatever_the_default_device_is(encoder: FastEncoder) -> None:
    expected = encoder.encode(TEXTS)
    with torch.device("meta"):
        np.testing.assert_array_equal(encoder.encode(TEXTS), expected)


def test_more_tokens_than_a_batch_holds(st: Any) -> None:
    encoder = FastEncoder(st, batch_tokens=20)
    few_texts = encoder.encode(MANY[:8])
    assert encoder.stats.batches > 1 and encoder.stats.texts == 8
    np.testing.assert_array_equal(few_texts, FastEncoder(st).encode(MANY[:8]))


def test_a_result_that_is_not_finite(encoder: FastEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(*args: Any) -> None:
        args[4].zero_()[1] = torch.inf

    monkeypatch.setattr(few, "embed_batch", poison)
    with pytest.raises(NonFiniteEmbeddingError, match=r"for inputs\[1\] computed in") as error:
        encoder.encode(["sea", "sun", "sky"])
    assert error.value.indices == [1]
    assert encoder.stats.texts == 3


def test_tallies_and_counters_lose_nothing() -> None:
    tally, counters = Tally(), Counters()

    def work() -> None:
        for _ in range(500):
            tally.add()
            counters.add(texts=2, tokens=3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = [tally.value() for _ in range(50)]
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert tally.value() == tally.value() == 2000
    assert (counters.snapshot().texts, counters.snapshot().tokens) == (4000, 6000)
    tally.reset()
    assert tally.value() == 0
