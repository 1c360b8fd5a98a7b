"""Results of models that run in sentence-transformers: its own, and finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from checks import assert_same_result
from families import make_texts, make_xlnet
from sbert_fast import FastEncoder
from sbert_fast.errors import NonFiniteEmbeddingError

pytestmark = pytest.mark.filterwarnings("ignore:FastEncoder runs this model")

POISON = "river"
CLEAN = [text for text in make_texts(40, max_words=20) if POISON not in text]
# Of two lengths, so that the order of the texts is not that of the batches.
TEXTS = [*CLEAN[:3], f"a {POISON}", *CLEAN[3:20], f"{POISON} and the sea and the sun", *CLEAN[20:]]
BAD = [3, 21]

PRECISIONS = ("int8", "uint8", "binary", "ubinary")
KINDS: dict[str, dict[str, Any]] = {
    "numpy": {},
    "tensor": {"convert_to_tensor": True},
    "list of tensors": {"convert_to_numpy": False},
}
RESULTS: dict[str, dict[str, Any]] = {
    **{
        f"{precision}, {kind}": {"precision": precision} | arguments
        for precision in (None, "float32", *PRECISIONS)
        for kind, arguments in KINDS.items()
    },
    "token_embeddings": {"output_value": "token_embeddings"},
    "token_embeddings, tensor": {"output_value": "token_embeddings", "convert_to_tensor": True},
    "features": {"output_value": None},
}


@pytest.fixture(scope="module")
def st() -> SentenceTransformer:
    return make_xlnet()


@pytest.fixture(scope="module")
def encoder(st: SentenceTransformer) -> FastEncoder:
    return FastEncoder(st)


@pytest.fixture(scope="module")
def poisoned() -> FastEncoder:
    """A model with one NaN, in the embedding of one word."""
    st = make_xlnet()
    token = st.tokenizer.convert_tokens_to_ids(POISON)
    with torch.no_grad():
        st[0].auto_model.get_input_embeddings().weight[token, 5] = float("nan")
    return FastEncoder(st)


def own_result(st: SentenceTransformer, texts: Any, **arguments: Any) -> Any:
    """What sentence-transformers gives. Before 6.2 some of it is out of reach: 6.0 gives no
    features of models that are no BERT, and does not quantise bfloat16."""
    try:
        return st.encode(texts, **arguments)
    except (IndexError, TypeError) as error:
        if hasattr(SentenceTransformer, "_inference"):
            raise
        pytest.skip(f"this sentence-transformers cannot do it: {error}")


@pytest.mark.parametrize("arguments", RESULTS.values(), ids=RESULTS)
def test_non_finite_results_name_the_texts(
    st: SentenceTransformer, poisoned: FastEncoder, arguments: Any
) -> None:
    own_result(st, CLEAN, **arguments)
    with pytest.raises(NonFiniteEmbeddingError, match=r"inputs\[3, 21\]") as caught:
        poisoned.encode(TEXTS, **arguments)
    assert caught.value.indices == BAD
    with pytest.raises(NonFiniteEmbeddingError, match=r"inputs\[0\]") as caught:
        poisoned.encode(f"a {POISON}", **arguments)
    assert caught.value.indices == [0]
    assert len(poisoned.encode(CLEAN, **arguments)) == len(CLEAN)


@pytest.mark.parametrize("arguments", RESULTS.values(), ids=RESULTS)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[0], []], ids=["all", "1", "alone", "0"])
@pytest.mark.filterwarnings("ignore:Computing int8 quantization buckets")
def test_results_are_those_of_sentence_transformers(
    st: SentenceTransformer, encoder: FastEncoder, texts: Any, arguments: Any
) -> None:
    try:
        expected = st.encode(texts, **arguments)
    except Exception as error:
        with pytest.raises(type(error)) as caught:
            encoder.encode(texts, **arguments)
        assert str(caught.value) == str(error)
    else:
        assert_same_result(encoder.encode(texts, **arguments), expected)


@pytest.mark.parametrize("arguments", [{"normalize_embeddings": True}, {"truncate_dim": 24}])
def test_other_arguments_come_before_quantisation(
    st: SentenceTransformer, encoder: FastEncoder, arguments: Any
) -> None:
    arguments |= {"precision": "int8"}
    assert_same_result(encoder.encode(TEXTS, **arguments), st.encode(TEXTS, **arguments))


def test_quantised_bfloat16() -> None:
    st = make_xlnet().bfloat16()
    how: dict[str, Any] = {"precision": "ubinary"}
    expected = own_result(st, TEXTS, **how)
    np.testing.assert_array_equal(FastEncoder(st).encode(TEXTS, **how), expected)


def test_states_of_padding_may_be_anything() -> None:
    st = make_xlnet()

    def spoil(_: Any, __: Any, output: dict[str, Any]) -> dict[str, Any]:
        states = output["token_embeddings"].clone()
        states[output["attention_mask"] == 0] = float("nan")
        return output | {"token_embeddings": states}

    encoder = FastEncoder(st)
    encoder.register_forward_hook(spoil)
    results = encoder.encode(["the sea", "the sea and the sun"], output_value=None)
    assert [bool(r["token_embeddings"].isnan().any()) for r in results] == [True, False]


def test_workers(poisoned: FastEncoder, st: SentenceTransformer) -> None:
    pool = poisoned.start_multi_process_pool(["cpu"])
    try:
        for arguments in (
            {},
            {"convert_to_tensor": True},
            {"convert_to_numpy": False},
            {"precision": "binary"},
            {"precision": "int8", "convert_to_numpy": False},
            {"output_value": "token_embeddings"},
            {"output_value": None},
        ):
            with pytest.raises(NonFiniteEmbeddingError, match=r"inputs\[3, 21\]") as caught:
                poisoned.encode(TEXTS, pool=pool, chunk_size=2, **arguments)
            assert caught.value.indices == BAD
        for arguments in (
            {"precision": "int8"},
            {"precision": "ubinary", "convert_to_numpy": False},
        ):
            ours = poisoned.encode(CLEAN, pool=pool, chunk_size=4, **arguments)
            assert_same_result(ours, st.encode(CLEAN, pool=pool, chunk_size=4, **arguments))
    finally:
        poisoned.stop_multi_process_pool(pool)
