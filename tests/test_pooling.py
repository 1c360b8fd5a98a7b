"""From hidden states to embeddings: every pooling mode, and the modules that follow."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn

from checks import assert_same_result, assert_same_vectors
from families import make_sentence_transformer, make_texts, randomize
from sbert_fast import FastEncoder, ops
from sbert_fast.errors import InvalidWeightsError
from sbert_fast.layers import PoolKernels
from sbert_fast.packing import pack
from sbert_fast.pooling import PoolingHead, read_pooling

WIDTH = 64
TEXTS = make_texts(40)
PROMPT = "find the old book: "
# Nothing of the text, or nothing at all but the final token, is left after the prompt.
SHORT = ["", " ", "a", ".", "sea", *TEXTS[:5]]
MODES = Pooling.POOLING_MODES
Launches = Callable[[], dict[tuple[str, str], int]]


def build(pooling: str | tuple[str, ...], *tail: nn.Module) -> SentenceTransformer:
    """A random model that ends in the modules `tail`, their weights random too."""
    st = make_sentence_transformer(pooling=pooling, normalize=False)
    for seed, module in enumerate(tail):
        randomize(module, seed=seed)
    return SentenceTransformer(modules=[*st, *tail], device="cpu").eval()


def check(st: SentenceTransformer, texts: list[str], launches: Launches, **arguments: Any) -> None:
    theirs = st.encode(texts, **arguments)
    assert launches() == {}
    encoder = FastEncoder(st)
    ours = encoder.encode(texts, **arguments)
    assert_same_result(ours, theirs)
    assert encoder.stats.texts == len(texts)
    assert launches() != {}


# Modes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        *(("bert", "cls"), ("modernbert", "cls"), ("albert-one-group", "cls")),
        ("qwen3", "lasttoken"),
    ],
)
def test_of_the_last_layer_only_what_is_pooled_is_computed(
    family: str,
    pooling: str,
    dtype: str,
    feed_forward_rows: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = FastEncoder(make_sentence_transformer(family, pooling=pooling), dtype=dtype)
    embeddings, rows = encoder.encode(TEXTS), feed_forward_rows
    assert rows[-1] == 48 and rows[-2] > 300
    monkeypatch.setattr(PoolingHead, "reads", lambda *_: None)
    assert np.array_equal(encoder.encode(TEXTS), embeddings)
    assert rows[-1] == rows[-2]


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode: str, normalize: bool, launches: Launches) -> None:
    check(build(mode, *[Normalize()] * normalize), TEXTS, launches)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize(
    "modes", [*permutations(["mean", "cls", "max"], 2), ("lasttoken", "weightedmean"), MODES]
)
def test_concatenation(modes: tuple[str, ...], normalize: bool, launches: Launches) -> None:
    st = build(modes, *[Normalize()] * normalize)
    assert st.encode(TEXTS[:1]).shape == (1, WIDTH * len(modes))
    check(st, TEXTS, launches)


@pytest.mark.parametrize("modes", ["mean", ("cls", "mean")])
@pytest.mark.parametrize("tail", [0, 1, 2], ids=["plain", "normalized", "normalized twice"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dimension", [8, 30, WIDTH, 1000])
def test_truncation_comes_after_the_modules(
    modes: str | tuple[str, ...], tail: int, normalize: bool, dimension: int, launches: Launches
) -> None:
    st = build(modes, *[Normalize() for _ in range(tail)])
    check(st, TEXTS, launches, truncate_dim=dimension, normalize_embeddings=normalize)


# Prompts left out of pooling


@pytest.mark.parametrize("prompt", [PROMPT, "one", "", None])
@pytest.mark.parametrize("modes", [*MODES, ("mean", "lasttoken", "cls")])
def test_prompt_left_out(
    modes: str | tuple[str, ...], prompt: str | None, launches: Launches
) -> None:
    st = build(modes)
    st.set_pooling_include_prompt(False)
    check(st, TEXTS + SHORT, launches, prompt=prompt)


def test_prompt_kept_and_left_out_differ() -> None:
    st = build("mean")
    encoder = FastEncoder(st)
    kept = encoder.encode(TEXTS, prompt=PROMPT)
    encoder.set_pooling_include_prompt(False)
    left_out = encoder.encode(TEXTS, prompt=PROMPT)
    assert_same_vectors(left_out, st.encode(TEXTS, prompt=PROMPT))
    assert np.abs(kept - left_out).max() > 0.1
    st.set_pooling_include_prompt(True)
    assert_same_vectors(encoder.encode(TEXTS, prompt=PROMPT), kept)


@pytest.mark.parametrize("mode", MODES)
def test_prompt_longer_than_max_seq_length(mode: str, launches: Launches) -> None:
    st = build(mode)
    st.max_seq_length = 5
    st.set_pooling_include_prompt(False)
    encoder = FastEncoder(st)
    ours = encoder.encode(TEXTS, prompt=PROMPT)
    theirs = st.encode(TEXTS, prompt=PROMPT)
    # Only the final token is left; the prompt's own truncation keeps one too.
    assert_same_vectors(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_left_to_pool(mode: str) -> None:
    st = build(mode)
    # Without special tokens, nothing of an empty text is left after its prompt.
    st.tokenizer.backend_tokenizer.post_processor = None
    assert st.tokenizer("")["input_ids"] == []
    st.set_pooling_include_prompt(False)
    encoder = FastEncoder(st)
    ours = encoder.encode(["", *TEXTS], prompt="find")
    theirs = st.encode(["", *TEXTS], prompt="find")
    if mode == "max":
        # sentence-transformers returns -inf, the largest of no values.
        assert np.isneginf(theirs[0]).all()
        theirs[0] = 0
    assert (ours[0] == 0).all() == (mode != "cls")
    assert_same_vectors(ours, theirs)


# Dense


def dense(features: int = WIDTH, out: int = WIDTH, **arguments: Any) -> Dense:
    return Dense(features, out, **arguments)


TAILS: dict[str, Callable[[], list[nn.Module]]] = {
    "tanh": lambda: [dense()],
    "narrower": lambda: [dense(out=20)],
    "odd": lambda: [dense(out=37)],
    "no bias, identity": lambda: [dense(bias=False, activation_function=nn.Identity())],
    "gelu": lambda: [dense(out=128, activation_function=nn.GELU())],
    "residual": lambda: [dense(use_residual=True)],
    "projected residual": lambda: [dense(out=24, use_residual=True, activation_function=nn.ReLU())],
    "normalize after": lambda: [dense(out=20), Normalize()],
    "normalize before": lambda: [Normalize(), dense(out=20)],
    "normalize between": lambda: [dense(out=48), Normalize(), dense(48, 20), Normalize()],
    "activation with weights": lambda: [dense(activation_function=nn.PReLU(WIDTH))],
}


@pytest.mark.parametrize("truncate_dim", [None, 12, 30])
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_dense(
    tail: Callable[[], list[nn.Module]], truncate_dim: int | None, launches: Launches
) -> None:
    st = build("mean", *tail())
    check(st, TEXTS, launches, truncate_dim=truncate_dim)
    assert FastEncoder(st).get_embedding_dimension() == st.get_embedding_dimension()


def test_dense_after_a_concatenation(launches: Launches) -> None:
    check(build(("cls", "max"), dense(2 * WIDTH, 30)), TEXTS, launches, normalize_embeddings=True)


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_dense_rows_do_not_depend_on_the_batch(tail: Callable[[], list[nn.Module]]) -> None:
    """The head alone: the same hidden states in batches of other sizes give the same bits."""
    head = PoolingHead(read_pooling(dict(list(build("mean", *tail()).named_children())[1:]), WIDTH))
    head.prepare(torch.float32, torch.device("cpu"), "auto")
    pool = ops.bind("segment_pool_out", torch.device("cpu"), torch.float32, width=WIDTH)
    kernels = PoolKernels(pool, None)
    lengths = np.array([5, 1, 17, 2, 30, 9, 4] * 7)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.zeros(offsets[-1], dtype=np.int32)
    states = torch.randn(int(offsets[-1]), WIDTH, generator=torch.Generator().manual_seed(0))

    def embed(rows: list[int]) -> torch.Tensor:
        batch = pack(ids, offsets, np.array(rows))
        x = torch.full((batch.input_ids.shape[0], WIDTH), float("nan"))
        x[: batch.num_tokens] = torch.cat([states[offsets[r] : offsets[r + 1]] for r in rows])
        out = torch.empty(len(rows), head.spec.dimension)
        where = torch.arange(len(rows), dtype=torch.int32)
        head(x, batch, kernels, out, where, normalize=True, skip=0)
        return out

    expected = embed(list(range(len(lengths))))
    assert torch.isfinite(expected).all()
    for rows in ([3], [0, 1], list(range(16)), list(range(20, 37)), list(range(48, -1, -1))):
        assert torch.equal(embed(rows), expected[rows])


def test_dense_weights_are_followed() -> None:
    tail = dense(out=24, use_residual=True)
    st = build("mean", tail)
    encoder = FastEncoder(st)
    before = encoder.encode(TEXTS)
    for parameter in (tail.linear.weight, tail.linear.bias, tail.residual.weight):
        with torch.no_grad():
            parameter.mul_(1.5)
        after = encoder.encode(TEXTS)
        assert_same_vectors(after, st.encode(TEXTS))
        assert np.abs(after - before).max() > 1e-3
        before = after
    tail.linear = nn.Linear(WIDTH, 24)
    assert_same_vectors(encoder.encode(TEXTS), st.encode(TEXTS))
    tail.activation_function = nn.ReLU()
    assert_same_vectors(encoder.encode(TEXTS), st.encode(TEXTS))
    tail.linear.weight.data.mul_(2)
    encoder.refresh()
    assert_same_vectors(encoder.encode(TEXTS), st.encode(TEXTS))


def test_dense_computes_in_fp32_under_a_16_bit_encoder() -> None:
    st = build("mean", dense(out=24))
    plain = build("mean")
    encoder = FastEncoder(st, dtype="bfloat16")
    pooled = torch.from_numpy(FastEncoder(plain, dtype="bfloat16").encode(TEXTS))
    with torch.inference_mode():
        expected = st[2]({"sentence_embedding": pooled})["sentence_embedding"]
    assert_same_vectors(encoder.encode(TEXTS), expected.numpy())


@pytest.mark.parametrize("name", ["2.linear.bias", "4.residual.weight"])
def test_dense_weights_that_are_not_finite(name: str) -> None:
    st = build("mean", dense(), Normalize(), dense(out=24, use_residual=True))
    encoder = FastEncoder(st)
    encoder.encode(TEXTS)
    with torch.no_grad():
        dict(st.named_parameters())[name].view(-1)[7] = float("nan")
    message = f"weights hold NaN or infinity: {name}$"
    with pytest.raises(InvalidWeightsError, match=message):
        FastEncoder(st)
    with pytest.raises(InvalidWeightsError, match=message):
        encoder.encode(TEXTS)
