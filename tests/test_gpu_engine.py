"""What a GPU adds to the engine: budgets, running out of memory, Triton kernels, copies.

Without a GPU the kernels run in Triton's interpreter; what needs a device is marked `gpu`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import families
from sbert_fast import FastEncoder, accelerate, ops
from sbert_fast.data import sample_texts
from sbert_fast.errors import NonFiniteEmbeddingError
from sbert_fast.testing import worst_cosine

TEXTS = ["", "a", *sample_texts()[:60]]


# What a plain model with one pooling mode runs.
ENGINE_OPS = {"embed_norm", "varlen_attention", "add_norm", "bias_gelu", "norm_pool_out"}

every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


triton = pytest.mark.skipif(
    (reason := ops.refusal("triton", torch.device("cpu"), torch.float32)) is not None,
    reason=str(reason),
)

# Tables of distances, norms that come first, layers that are one.
_OTHERS = ("deberta-v2", "modernbert", "qwen3", "gemma3_text", "albert-one-group")


@triton
@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("bert", ("mean", "max")),
        *((n, "mean") for n in ("bert", *_OTHERS) if n in families.VARIANTS),
    ],
    ids=str,
)
def test_engine_on_triton_kernels(
    name: str,
    pooling: str | tuple[str, ...],
    launches: Callable[[], dict[tuple[str, str], int]],
) -> None:
    """The whole engine, in the interpreter: the last layer is normalised and pooled in one op."""
    st = families.make_sentence_transformer(name, pooling=pooling)
    texts = [*TEXTS[:2], " ".join(["sea"] * 40)]
    expected = FastEncoder(st, impl="reference").encode(texts, prompt="find: ")
    ops.reset_launches()
    got = FastEncoder(st, impl="triton").encode(texts, prompt="find: ")
    assert worst_cosine(got, expected) >= 1 - 1e-6
    assert {name for _, name in launches()} == {"triton"}
    ran = {op for op, _ in launches()}
    assert {"embed_norm", "varlen_attention"} <= ran and ran & {"add_norm", "add_norm_sum"}
    assert ("norm_pool_out" in ran) == isinstance(pooling, str)


# Heads of a width, and texts of a length, that compute capability 9.0 has a kernel of its own for.
LONG = {"num_attention_heads": 2, "max_position_embeddings": 160}


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize(
    ("name", "dtype", "overrides"),
    [
        # The other families are laid out like one of these.
        *((n, torch.float16, {}) for n in ("bert", "roberta", "distilbert", "albert", "electra")),
        *((name, torch.bfloat16, LONG) for name in ("bert", "capability 9.0")),
    ],
    ids=str,
)
def test_engine_on_cuda_kernels(
    name: str,
    dtype: torch.dtype,
    overrides: dict[str, int],
    launches: Callable[[], dict[tuple[str, str], int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole engine, thread by thread: no worse than twice what the original loses."""
    if name == "capability 9.0":
        monkeypatch.setenv("SBF_EMULATED_SM90", "1")
        name = "bert"
    texts = [*TEXTS[:3], "word " * 200]
    st = families.make_sentence_transformer(name, overrides=overrides)
    st.max_seq_length = overrides.get("max_position_embeddings", families.MAX_TOKENS)
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

    def test_slices_keep_the_order(
        self, st_cuda: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder = FastEncoder(st_cuda, dtype="float32")
        texts = sample_texts()[:400]
        whole = encoder.encode(texts)
        monkeypatch.setattr("sbert_fast.inference._SLICES", {"cuda": (10**9, 37)})
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
        monkeypatch.setattr("sbert_fast.inference._SLICES", {"cuda": (10**9, 7)})
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
