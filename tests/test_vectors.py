"""The vectors: equal to sentence-transformers' on real weights, and independent of the batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from checks import assert_same_vectors, bits, cosine_distances
from families import make_sentence_transformer, make_texts
from instruction_sets import EMULATED_TILES, NATIVE
from sbert_fast import FastEncoder, ops, packing
from sbert_fast.data import multilingual_texts, sample_texts
from sbert_fast.linears import choose
from sbert_fast.packing import PackedBatch
from sbert_fast.pooling import PoolingHead
from sbert_fast.target import Target

MAX_LENGTH = 512
# Most that a 16-bit vector may turn away from the fp32 one, whatever the original loses itself.
MAX_16_BIT_DISTANCE = 5e-4
EVERY = 6  # One text in this many is compared in bfloat16 too.


# Equality on real weights


def _recombine(texts: Sequence[str], sizes: Sequence[int], seed: int) -> list[str]:
    """Texts of the given sizes in characters, cut from random chains of `texts`."""
    rng = random.Random(seed)
    result = []
    for size in sizes:
        chain = rng.choice(texts)
        while len(chain) < size:
            chain += " " + rng.choice(texts)
        start = rng.randrange(len(chain) - size + 1)
        result.append(chain[start : start + size])
    return result


def _sizes(count: int, longest: int, seed: int) -> list[int]:
    """Characters of texts: every order of magnitude up to `longest`, the short ones more often."""
    rng = random.Random(seed)
    most = [int(6 * (longest / 6) ** (rng.random() ** 8)) for _ in range(count - 11)]
    return [1, *[longest] * 10, *most]


@pytest.fixture(scope="module")
def st_512(minilm_path: str) -> SentenceTransformer:
    model = SentenceTransformer(minilm_path, device="cpu")
    model.max_seq_length = MAX_LENGTH
    return model


@pytest.fixture(scope="module")
def texts() -> list[str]:
    english = _recombine(sample_texts(), _sizes(1500, 2600, seed=1), seed=2)
    others = _recombine(multilingual_texts(), _sizes(560, 900, seed=3), seed=4)
    return [*english, *others, "", *multilingual_texts()]


def test_corpus_is_as_wide_as_it_claims(texts: list[str], st_512: SentenceTransformer) -> None:
    tokens = st_512.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    lengths = np.array([len(ids) for ids in tokens])
    assert len(set(texts)) >= 2000
    assert sum(not text.isascii() for text in texts) >= 500
    assert lengths.min() == 2
    assert lengths.max() > MAX_LENGTH
    histogram, _ = np.histogram(lengths, bins=[2, 4, 8, 16, 32, 64, 128, 256, 512, 10_000])
    assert histogram.min() >= 10


def _encode_stock(st: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """Vectors of unpatched sentence-transformers."""
    ops.reset_launches()
    vectors = st.encode(texts)
    assert ops.launches() == {}
    return vectors


def _encode_packed(st: SentenceTransformer, texts: list[str], dtype: str) -> np.ndarray:
    """Vectors of the packed engine, with the proof that it was it, and all of it."""
    encoder = FastEncoder(st, dtype=dtype)
    assert encoder.packed_engine is not None
    ops.reset_launches()
    vectors = encoder.encode(texts)
    layers, batches = encoder.packed_engine.architecture.num_layers, encoder.stats.batches
    implementation = encoder.packed_engine.implementation
    launches = ops.launches()
    engine = encoder.packed_engine
    expected = {"embed_norm": 1, "varlen_attention": layers, "segment_pool_out": 1}
    match choose(Target(engine.compute_dtype, engine.device)).kind.name:
        case "panels":
            expected |= {"linear": 2 * layers, "linear_norm": 2 * layers}
        case "onednn":
            expected |= {"add_norm": 2 * layers}
        case "torch":
            expected |= {"add_norm": 2 * layers, "bias_gelu": layers}
    assert launches == {(op, implementation): count * batches for op, count in expected.items()}
    assert encoder.stats.texts == len(texts)
    assert encoder.stats.fallbacks == {}
    return vectors


def test_fp32_vectors_are_those_of_sentence_transformers(
    st_512: SentenceTransformer, texts: list[str]
) -> None:
    theirs = _encode_stock(st_512, texts)
    # Unit vectors: the budget of a component is absolute.
    assert np.allclose(np.linalg.norm(theirs, axis=1), 1)
    assert_same_vectors(_encode_packed(st_512, texts, "float32"), theirs)


def test_bf16_vectors_lose_no_more_than_those_of_sentence_transformers(
    st_512: SentenceTransformer, texts: list[str], minilm_path: str
) -> None:
    model_kwargs = {"dtype": torch.bfloat16}
    peer = SentenceTransformer(minilm_path, device="cpu", model_kwargs=model_kwargs)
    peer.max_seq_length = MAX_LENGTH
    some = texts[::EVERY]
    exact, theirs = _encode_stock(st_512, some), _encode_stock(peer, some)
    allowed = 2 * cosine_distances(theirs, exact).max() + 1e-6
    ours = cosine_distances(_encode_packed(st_512, some, "bfloat16"), exact).max()
    assert ours <= min(allowed, MAX_16_BIT_DISTANCE)


# Batch independence

Encode = Callable[[list[str]], np.ndarray]


def first_difference(
    encoder: FastEncoder, needles: Sequence[str], others: list[str], rounds: int, most: int
) -> str | None:
    """Encode `needles` among random others, in random batches; None if no bit of them changes."""
    rng = random.Random(rounds)
    expected = [bits(encoder.encode([needle]))[0] for needle in needles]
    budget = encoder.batch_tokens
    for turn in range(rounds):
        texts = [*needles, *rng.choices(others, k=rng.randint(0, most))]
        order = rng.sample(range(len(texts)), len(texts))
        encoder.batch_tokens = rng.choice([1, 48, 100, 333, 2048])
        arguments = rng.choice([{}, {"batch_size": 1}, {"batch_size": 5}])
        try:
            ours = bits(encoder.encode([texts[i] for i in order], **arguments))
        finally:
            limit, encoder.batch_tokens = encoder.batch_tokens, budget
        for needle, theirs in enumerate(expected):
            at = order.index(needle)
            if (changed := int((ours[at] != theirs).sum())) > 0:
                return (
                    f"round {turn}: {changed} of {theirs.size} components of needle {needle} "
                    f"changed at position {at} of {len(texts)} texts, batch_tokens={limit}, "
                    f"{arguments}"
                )
    return None


def exact_encoder(st: SentenceTransformer, dtype: str) -> FastEncoder:
    """An encoder whose vectors are promised to depend on no batch mate, bit for bit."""
    encoder = FastEncoder(st, dtype=dtype)
    assert encoder.packed_engine is not None
    if encoder.packed_engine.implementation == "reference":
        pytest.skip("the reference ops promise no bits: torch's matmul depends on the batch")
    return encoder


@pytest.fixture(scope="module")
def tiny() -> SentenceTransformer:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    return make_sentence_transformer(overrides=sizes)


NEEDLE = "the young woman under the old stone tree said so many years after that night"
# No token, one, a score, and more than a batch of the least budgets holds.
NEEDLES = ("", "sea", NEEDLE, NEEDLE * 4, NEEDLE * 9)


every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])


@every_dtype
@pytest.mark.usefixtures("int8_anywhere")
def test_needles_in_500_batches(tiny: SentenceTransformer, dtype: str) -> None:
    encoder = exact_encoder(tiny, dtype)
    assert first_difference(encoder, NEEDLES, make_texts(300, seed=5), rounds=500, most=30) is None


@every_dtype
@pytest.mark.usefixtures("isa", "int8_anywhere")
@pytest.mark.parametrize("isa", [*NATIVE[1:], *EMULATED_TILES], indirect=True)
def test_needles_on_other_instruction_sets(tiny: SentenceTransformer, dtype: str) -> None:
    encoder = exact_encoder(tiny, dtype)
    assert first_difference(encoder, NEEDLES, make_texts(100, seed=6), rounds=30, most=20) is None


@every_dtype
@pytest.mark.usefixtures("int8_anywhere")
def test_threads_change_no_bit(tiny: SentenceTransformer, dtype: str) -> None:
    encoder, texts, found = exact_encoder(tiny, dtype), make_texts(80, seed=9), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            found.append(bits(encoder.encode(texts)))
    finally:
        torch.set_num_threads(threads)
    assert all((each == found[0]).all() for each in found[1:])


@every_dtype
@pytest.mark.usefixtures("int8_anywhere")
def test_needle_in_batches_of_the_real_model(st_minilm: SentenceTransformer, dtype: str) -> None:
    encoder = exact_encoder(st_minilm, dtype)
    others = sample_texts()[:200] + multilingual_texts()
    assert first_difference(encoder, [sample_texts()[500]], others, rounds=40, most=10) is None


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra-projection"])
@pytest.mark.parametrize("pooling", ["mean", ("max", "weightedmean")])
def test_needle_in_batches_of_other_models(family: str, pooling: str | tuple[str, ...]) -> None:
    encoder = exact_encoder(make_sentence_transformer(family, pooling=pooling), "float32")
    assert first_difference(encoder, [NEEDLE], make_texts(100, seed=7), rounds=60, most=30) is None


def test_a_sum_whose_order_depends_on_the_batch_is_caught(
    tiny: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the checker must fail where there is something to find."""

    def pool(
        self: PoolingHead,
        x: torch.Tensor,
        batch: PackedBatch,
        kernels: Any,
        out: torch.Tensor,
        rows: Any,
        **_: Any,
    ) -> None:
        for position, (row, states) in enumerate(
            zip(rows.tolist(), batch.split_rows(x), strict=True)
        ):
            total = torch.zeros(x.shape[1])
            for state in states.roll(position, dims=0):
                total += state
            out[row] = total / len(states)

    encoder = FastEncoder(tiny)
    expected = encoder.encode(make_texts(20), normalize_embeddings=True)
    monkeypatch.setattr(PoolingHead, "__call__", pool)
    broken = encoder.encode(make_texts(20))
    assert_same_vectors(broken / np.linalg.norm(broken, axis=1, keepdims=True), expected)
    difference = first_difference(encoder, [NEEDLE], make_texts(100, seed=8), rounds=60, most=30)
    assert difference is not None
    assert "changed at position" in difference


# Isolation


def _words(rng: random.Random, count: int) -> str:
    """A text of exactly `count` tokens besides the special ones."""
    return " ".join(rng.choices(["sea", "sun", "tree", "road", "house", "river", "night"], k=count))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_content_of_other_texts_changes_no_bit(tiny: SentenceTransformer, dtype: str) -> None:
    """The lengths, and so the batches, stay what they are: only the content differs."""
    encoder = exact_encoder(tiny, dtype)
    rng = random.Random(0)
    lengths = [rng.randint(1, 40) for _ in range(40)]
    texts = [_words(rng, length) for length in lengths]
    expected = bits(encoder.encode(texts))
    for turn in range(30):
        kept = rng.randrange(len(texts))
        others = [_words(rng, length) for length in lengths]
        others[kept] = texts[kept]
        ours = bits(encoder.encode(others))
        assert (ours[kept] == expected[kept]).all(), f"round {turn}"
        assert (ours != expected).any(axis=1).sum() >= len(texts) - 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_in_other_texts_reaches_nobody(tiny: SentenceTransformer, dtype: str) -> None:
    """A token whose embedding overflows turns its own text into NaN, and nothing else."""
    st = make_sentence_transformer()
    token = st.tokenizer.convert_tokens_to_ids("wind")
    with torch.no_grad():
        st[0].auto_model.embeddings.word_embeddings.weight[token] = 3e38
    engine = FastEncoder(st, dtype=dtype).packed_engine
    assert engine is not None
    rng = random.Random(1)
    lengths = np.array([7, 30, 1, 12, 60, 3, 19])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.array(rng.choices(range(50, token), k=int(offsets[-1])), dtype=np.int32)

    def states(ids: np.ndarray) -> list[torch.Tensor]:
        batch = packing.pack(ids, offsets, np.arange(len(lengths)))
        return list(batch.split_rows(engine(batch)))

    clean = states(ids)
    for kept in range(len(lengths)):
        poisoned = np.full_like(ids, token)
        poisoned[offsets[kept] : offsets[kept + 1]] = ids[offsets[kept] : offsets[kept + 1]]
        for row, (now, then) in enumerate(zip(states(poisoned), clean, strict=True)):
            assert torch.equal(now, then) if row == kept else now.isnan().all()


def test_equal_texts_have_equal_vectors(tiny: SentenceTransformer) -> None:
    encoder = exact_encoder(tiny, "float32")
    texts = make_texts(20)
    tripled = bits(encoder.encode(texts * 3)).reshape(3, len(texts), -1)
    assert (tripled == tripled[0]).all()
    assert (bits(encoder.encode(texts)) == tripled[0]).all()
