"""What a GPU adds to the engine: budgets, running out of memory, Triton kernels, copies.

Without a GPU the kernels run in Triton's interpreter; what needs a device is marked `gpu`.
"""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import cuda_emulation
import families
from sbert_fast import FastEncoder, accelerate, budget, ops, session
from sbert_fast.data import sample_texts
from sbert_fast.engine import PackedEncoder, Prepared
from sbert_fast.errors import DeviceLostError, NonFiniteEmbeddingError
from sbert_fast.models import Architecture
from sbert_fast.ops import extension
from sbert_fast.packing import PackedBatch
from sbert_fast.testing import worst_cosine
from sbert_fast.transfer import device_error

TEXTS = ["", "a", *sample_texts()[:60]]
HOPPER = 141 * 2**30, 132  # bytes and multiprocessors of one GPU
# What a plain model with one pooling mode runs.
ENGINE_OPS = {"embed_norm", "varlen_attention", "add_norm", "bias_gelu", "norm_pool_out"}

every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


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
        message = "^cpu serves this process no more, start another one: CUDA error: illegal$"
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
            with pytest.raises(DeviceLostError, match="serves this process no more"):
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


triton = pytest.mark.skipif(
    (reason := ops.refusal("triton", torch.device("cpu"), torch.float32)) is not None,
    reason=str(reason),
)


@triton
@pytest.mark.parametrize("pooling", ["mean", "cls", ("mean", "max")], ids=str)
def test_engine_on_triton_kernels(
    pooling: str | tuple[str, ...], launches: Callable[[], dict[tuple[str, str], int]]
) -> None:
    """The whole engine, in the interpreter: the last layer is normalised and pooled in one op."""
    st = families.make_sentence_transformer("bert", pooling=pooling)
    expected = FastEncoder(st, impl="reference").encode(TEXTS[:9], prompt="find: ")
    ops.reset_launches()
    got = FastEncoder(st, impl="triton").encode(TEXTS[:9], prompt="find: ")
    assert worst_cosine(got, expected) >= 1 - 1e-6
    assert {name for _, name in launches()} == {"triton"}
    ran = {op for op, _ in launches()}
    assert {"embed_norm", "varlen_attention", "add_norm"} <= ran
    assert ("norm_pool_out" in ran) == isinstance(pooling, str)


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA ops take CPU tensors."""
    cuda_emulation.load()
    library = extension.load_emulated_cuda(cuda_emulation.library())
    monkeypatch.setattr(extension, "CUDA", library)


@pytest.mark.usefixtures("emulated_cuda")
@every_dtype
@pytest.mark.parametrize("name", [*families.FAMILIES, "capability 9.0"])
def test_engine_on_cuda_kernels(
    name: str,
    dtype: torch.dtype,
    launches: Callable[[], dict[tuple[str, str], int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole engine, thread by thread: no worse than twice what the original loses."""
    if name == "capability 9.0":
        monkeypatch.setenv("SBF_EMULATED_SM90", "1")
        name = "bert"
    texts = [*TEXTS[:7], "word " * 200]
    st = families.make_sentence_transformer(name)
    expected = st.encode(texts, normalize_embeddings=True)
    ops.reset_launches()
    got = FastEncoder(st, impl="cuda", dtype=dtype).encode(texts, normalize_embeddings=True)
    assert set(launches()) == {(op, "cuda") for op in ENGINE_OPS}
    peer = copy.deepcopy(st).to(dtype).encode(texts, normalize_embeddings=True)
    lost = 1 - worst_cosine(peer.astype(np.float32), expected)
    assert 1 - worst_cosine(got, expected) <= max(2 * lost, 1e-6)


@pytest.fixture(scope="module")
def st_cuda(minilm_path: str) -> SentenceTransformer:
    return SentenceTransformer(minilm_path, device="cuda")


@pytest.fixture(scope="module")
def exact(st_minilm: SentenceTransformer) -> np.ndarray:
    """The vectors of 500 texts in fp32, on the host."""
    return st_minilm.encode(sample_texts()[:500])


@pytest.fixture(params=["triton", "cuda"])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation to ask for; every op has run on it in the end."""
    if (reason := ops.refusal(request.param, torch.device("cuda"), torch.float16)) is not None:
        pytest.skip(reason)
    ops.reset_launches()
    yield request.param
    assert set(ops.launches()) == {(op, request.param) for op in ENGINE_OPS}


class TestOnAGpu:
    pytestmark = gpu

    def test_the_default_is_float16(self, minilm_path: str) -> None:
        assert FastEncoder(minilm_path, device="cuda").compute_dtype == torch.float16
        handed_in = SentenceTransformer(minilm_path, device="cuda")
        assert FastEncoder(handed_in).compute_dtype == torch.float32

    @every_dtype
    def test_vectors(
        self, exact: np.ndarray, minilm_path: str, dtype: torch.dtype, impl: str
    ) -> None:
        texts = sample_texts()[:500]
        theirs = SentenceTransformer(minilm_path, device="cuda").to(dtype).encode(texts)
        ours = FastEncoder(minilm_path, device="cuda", dtype=dtype, impl=impl).encode(texts)
        lost = 1 - worst_cosine(ours, exact)
        assert lost <= min(5e-4, 2 * (1 - worst_cosine(theirs, exact)) + 1e-6)

    def test_float32_vectors(self, exact: np.ndarray, minilm_path: str) -> None:
        texts = sample_texts()[:500]
        ours = FastEncoder(minilm_path, device="cuda", dtype="float32").encode(texts)
        assert 1 - worst_cosine(ours, exact) <= 1e-6
        assert np.abs(ours - exact).max() <= 2e-6

    def test_runs_repeat_bit_for_bit(self, st_cuda: SentenceTransformer, impl: str) -> None:
        encoder = FastEncoder(st_cuda, dtype="float16", impl=impl)
        texts = sample_texts()
        first = encoder.encode(texts)
        assert np.array_equal(first, encoder.encode(texts))
        another = FastEncoder(st_cuda, dtype="float16", impl=impl)
        assert np.array_equal(first, another.encode(texts))
        assert encoder.stats.bit_repeatable

    def test_windows_keep_the_order(
        self, st_cuda: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder = FastEncoder(st_cuda, dtype="float32")
        texts = sample_texts()[:400]
        whole = encoder.encode(texts)
        monkeypatch.setattr("sbert_fast.inference._WINDOWS", {"cuda": (10**9, 37)})
        np.testing.assert_allclose(encoder.encode(texts), whole, atol=2e-6)

    def test_threads_share_an_encoder(self, st_cuda: SentenceTransformer, impl: str) -> None:
        encoder = FastEncoder(st_cuda, dtype="float16", impl=impl)
        texts = sample_texts()[:320]
        alone = [encoder.encode(texts[i : i + 10]) for i in range(0, 320, 10)]
        barrier = threading.Barrier(32)

        def work(index: int) -> np.ndarray:
            barrier.wait()
            return encoder.encode(texts[10 * index : 10 * index + 10])

        with ThreadPoolExecutor(32) as pool:
            together = list(pool.map(work, range(32)))
        assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))

    def test_out_of_memory(self, st_cuda: SentenceTransformer) -> None:
        texts = sample_texts() * 20
        expected = FastEncoder(st_cuda, dtype="float32", batch_tokens=2048).encode(texts)
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((held + (400 << 20)) / total)
        try:
            encoder = FastEncoder(st_cuda, dtype="float32", batch_tokens=60_000)
            got = encoder.encode(texts)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert 0 < encoder.stats.memory_shortages <= 6
        np.testing.assert_allclose(got, expected, atol=2e-6)

    def test_non_finite_embeddings_are_named(self, minilm_path: str, impl: str) -> None:
        st = SentenceTransformer(minilm_path, device="cuda")
        encoder = FastEncoder(st, dtype="float16", impl=impl)
        with torch.no_grad():
            st[0].auto_model.embeddings.word_embeddings.weight[7592] *= 1e30  # "hello"
        with pytest.raises(NonFiniteEmbeddingError, match=r"inputs\[1\]") as error:
            encoder.encode(["a", "hello", "b"])
        assert error.value.indices == [1]

    def test_token_embeddings_and_features(self, st_cuda: SentenceTransformer) -> None:
        encoder = FastEncoder(st_cuda, dtype="float32")
        for value in ("token_embeddings", None):
            ours = encoder.encode(TEXTS, output_value=value)
            theirs = st_cuda.encode(TEXTS, output_value=value)
            for mine, other in zip(ours, theirs, strict=True):
                mine = mine["token_embeddings"] if value is None else mine
                other = other["token_embeddings"] if value is None else other
                np.testing.assert_allclose(mine.cpu(), other.cpu()[: len(mine)], atol=1e-4)

    def test_tensors_stay_on_the_device(
        self, st_cuda: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder = FastEncoder(st_cuda, dtype="float16")
        expected = encoder.encode(TEXTS)
        monkeypatch.setattr("sbert_fast.inference._WINDOWS", {"cuda": (10**9, 7)})
        for convert in ({"convert_to_tensor": True}, {"convert_to_numpy": False}):
            got = encoder.encode(TEXTS, **convert)
            assert all(row.device == st_cuda.device for row in got)
            np.testing.assert_array_equal(torch.stack(list(got)).cpu().numpy(), expected)
        for value in ("token_embeddings", None):
            for each in encoder.encode(TEXTS[:5], output_value=value):
                tensors = [each] if value else [v for v in each.values() if isinstance(v, Tensor)]
                assert {t.device for t in tensors} == {st_cuda.device}

    def test_nothing_waits_but_for_the_results(
        self, st_cuda: SentenceTransformer, impl: str
    ) -> None:
        encoder = FastEncoder(st_cuda, dtype="float16", impl=impl, batch_tokens=1024)
        expected = encoder.encode(TEXTS)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = encoder.encode(TEXTS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        np.testing.assert_array_equal(got, expected)

    def test_accelerated_model(self, minilm_path: str) -> None:
        st = SentenceTransformer(minilm_path, device="cuda")
        expected = st.encode(TEXTS)
        accelerate(st)
        ops.reset_launches()
        np.testing.assert_allclose(st.encode(TEXTS), expected, atol=2e-6)
        assert ops.launches()["varlen_attention", "triton"] > 0

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_two_devices(self, minilm_path: str) -> None:
        encoder = FastEncoder(minilm_path, device="cuda")
        texts = sample_texts()
        both = encoder.encode(texts, device=["cuda:0", "cuda:1"])
        assert worst_cosine(both, encoder.encode(texts)) > 1 - 1e-4
