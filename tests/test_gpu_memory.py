"""Batches that fit a GPU, and what running out of memory or losing the device does."""

from __future__ import annotations

import pickle
import weakref

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import families
from sbert_fast import FastEncoder, budget, few, session
from sbert_fast.data import sample_texts
from sbert_fast.engine import PackedEncoder, Prepared
from sbert_fast.errors import DeviceLostError
from sbert_fast.models import Architecture
from sbert_fast.packing import PackedBatch
from sbert_fast.transfer import device_error

TEXTS = ["", "a", *sample_texts()[:60]]
HOPPER = 141 * 2**30, 132  # bytes and multiprocessors of one GPU


def architecture(hidden: int, inner: int) -> Architecture:
    model = families.make_model("bert")
    read = PackedEncoder(model).architecture
    fields = {name: getattr(read, name) for name in read.__slots__}
    return Architecture(**(fields | {"hidden_size": hidden, "intermediate_size": inner}))


@pytest.mark.parametrize(("hidden", "inner"), [(384, 1536), (768, 3072), (1024, 4096)])
def test_gpu_budget_gives_every_processor_the_same_tiles(hidden: int, inner: int) -> None:
    model = architecture(hidden, inner)
    tokens = budget.gpu_tokens(model, torch.float16, *HOPPER)
    assert tokens % (128 * HOPPER[1]) == 0
    assert tokens == budget.gpu_tokens(model, torch.float16, *HOPPER)
    small = budget.gpu_tokens(model, torch.float32, 2 * 2**30, HOPPER[1])
    assert 128 <= small < tokens
    assert small * 4 * max(5 * hidden, 2 * hidden + 2 * inner) <= 2**28
    assert budget.gpu_tokens(model, torch.float32, 1 << 20, HOPPER[1]) == 128


def test_memory_limit_is_remembered_and_gives_up() -> None:
    limit = budget.MemoryLimit()
    assert limit.apply(1000) == 1000
    assert limit.halve(1000) == 500
    assert limit.halve(1000) == 500, "a second thread with the same batch"
    assert limit.apply(1000) == 500
    assert limit.apply(100) == 100
    tokens = 500
    for _ in range(5):
        tokens = limit.halve(tokens)
    assert tokens == 500 // 32
    assert limit.halve(tokens) is None


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that holds 250 tokens; the tokens of the batches it refused."""
    refused: list[int] = []
    forward = PackedEncoder.__call__

    def call(self: PackedEncoder, batch: PackedBatch, prepared: Prepared | None = None) -> Tensor:
        if batch.num_tokens > 250:
            refused.append(batch.num_tokens)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, prepared)

    monkeypatch.setattr(PackedEncoder, "__call__", call)
    # A few texts on a CPU are tried in one batch before.
    monkeypatch.setattr(few, "_MOST_TEXTS", 0)
    return refused


@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings"])
def test_out_of_memory_halves_the_batches_and_goes_on(
    st_minilm: SentenceTransformer,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    output_value: str,
) -> None:
    expected = FastEncoder(st_minilm).encode(TEXTS, output_value=output_value)
    refused = request.getfixturevalue("small_memory")
    encoder = FastEncoder(st_minilm, batch_tokens=1500)
    with caplog.at_level("WARNING", "sbert_fast"):
        got = encoder.encode(TEXTS, output_value=output_value)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert "out of memory" in caplog.text and "batch_tokens=" in caplog.text
    assert encoder.stats.memory_shortages == len(refused) > 0
    assert not encoder.stats.bit_repeatable
    assert encoder.stats.texts == len(TEXTS)

    tried = len(refused)
    encoder.encode(TEXTS)
    assert len(refused) == tried, "what failed once was tried again"


def test_out_of_memory_with_a_single_text_is_raised(
    st_minilm: SentenceTransformer, small_memory: list[int]
) -> None:
    encoder = FastEncoder(st_minilm)
    message = (
        r"^inputs\[1\] with its 256 tokens does not fit the memory of cpu: CUDA out of memory$"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message):
        encoder.encode(["a", " ".join(["word"] * 400)])
    assert small_memory == [259, 256], "what cannot be cut was tried again"
    assert encoder.stats.memory_shortages == 2


def test_memory_is_given_back_before_the_next_try(
    st_minilm: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch had allocated hangs on the traceback of the error."""
    held: list[weakref.ref[Tensor]] = []
    forward = PackedEncoder.__call__

    def call(self: PackedEncoder, batch: PackedBatch, prepared: Prepared | None = None) -> Tensor:
        if batch.num_tokens > 250:
            activations = torch.zeros(1000)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, prepared)

    def empty_cache() -> None:
        assert held and all(reference() is None for reference in held)
        emptied.append(len(held))

    emptied: list[int] = []
    monkeypatch.setattr(PackedEncoder, "__call__", call)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    FastEncoder(st_minilm, batch_tokens=1500).encode(TEXTS)
    assert emptied == list(range(1, len(held) + 1))


class TestLostDevice:
    """After some errors of CUDA every call of the process fails."""

    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """A device that fails; how often it was asked."""
        calls: list[int] = []

        def call(*_: object) -> Tensor:
            calls.append(1)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(PackedEncoder, "__call__", call)
        return calls

    def test_later_calls_say_so_at_once(
        self, st_minilm: SentenceTransformer, failing: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder = FastEncoder(st_minilm)
        monkeypatch.setattr(session, "device_error", lambda device: "CUDA error: illegal")
        message = "^cpu is unusable in this process; restart the process: CUDA error: illegal$"
        for output_value in ("sentence_embedding", "token_embeddings", "sentence_embedding"):
            with pytest.raises(DeviceLostError, match=message):
                encoder.encode(TEXTS, output_value=output_value)
        assert len(failing) == 1
        assert pickle.loads(pickle.dumps(encoder))._session.lost is None

    def test_an_error_of_the_comparison_with_the_model_says_so_too(
        self, st_minilm: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def current(_: PackedEncoder) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        encoder = FastEncoder(st_minilm)
        monkeypatch.setattr(PackedEncoder, "current", current)
        monkeypatch.setattr(session, "device_error", lambda device: "CUDA error: illegal")
        for device in (None, "meta"):
            with pytest.raises(DeviceLostError, match="is unusable in this process"):
                encoder.encode(TEXTS, device=device)
        assert encoder.device.type == "cpu"

    def test_an_error_that_passes_is_raised_as_it_is(
        self, st_minilm: SentenceTransformer, failing: list[int]
    ) -> None:
        encoder = FastEncoder(st_minilm)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="^CUDA error: an illegal memory access was"):
                encoder.encode(TEXTS)
        assert len(failing) == 2

    def test_the_device_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def synchronize(device: torch.device) -> None:
            assert device == torch.device("cuda", 1)
            raise RuntimeError("CUDA error: device-side assert triggered\nCompile with ...")

        assert device_error(torch.device("cpu")) is None
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        device = torch.device("cuda", 1)
        assert device_error(device) == "CUDA error: device-side assert triggered"
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        assert device_error(device) is None
