"""Texts to ids: what the tokenizer itself gives, cut texts included, from a private copy."""

from __future__ import annotations

import pickle
import random
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, processors
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from checks import assert_same_vectors
from families import MAX_TOKENS, VARIANTS, make_sentence_transformer, make_texts, make_tokenizer
from sbert_fast import FastEncoder, few, inference, tokenization
from sbert_fast.data import multilingual_texts, sample_texts
from sbert_fast.errors import InputError, TokenIdError
from sbert_fast.tokenization import TextTokenizer, TokenizedTexts, check_texts

TEXTS = make_texts(50, max_words=150)


@pytest.fixture(scope="module")
def real(minilm_path: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(minilm_path)


def expected_ids(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []


def split(tokens: TokenizedTexts) -> list[list[int]]:
    assert tokens.ids.dtype == tokens.lengths.dtype == np.int32
    assert tokens.offsets.tolist() == [0, *np.cumsum(tokens.lengths)]
    assert tokens.ids.shape == (tokens.offsets[-1],)
    return [part.tolist() for part in np.split(tokens.ids, tokens.offsets[1:-1])]


def assert_same_ids(tokenizer: Any, texts: list[str], max_length: int) -> None:
    tokens = TextTokenizer(tokenizer, max_length)(texts)
    assert split(tokens) == expected_ids(tokenizer, texts, max_length)
    whole = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    assert tokens.truncated == sum(len(ids) > max_length for ids in whole)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [2, 3, 10, MAX_TOKENS])
@pytest.mark.parametrize("family", VARIANTS)
def test_families(family: str, max_length: int, side: str) -> None:
    tokenizer = make_tokenizer(family)
    tokenizer.truncation_side = side
    assert_same_ids(tokenizer, TEXTS, max_length)


@pytest.mark.parametrize("max_length", [2, 16, 128, 512])
def test_real_tokenizer(real: Any, max_length: int) -> None:
    assert_same_ids(real, [*sample_texts()[:300], *multilingual_texts(), "", " \n"], max_length)


@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 51])
def test_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(tokenization, "_CHUNK", chunk)
    assert_same_ids(make_tokenizer("bert"), TEXTS, 10)


def test_no_text() -> None:
    tokens = TextTokenizer(make_tokenizer("bert"), 10)([])
    assert tokens.ids.shape == tokens.lengths.shape == (0,)
    assert tokens.offsets.tolist() == [0]
    assert tokens.truncated == 0


# Texts that are cut before they are tokenised

LIMIT = 8 * 64
_PIECES = (
    st.sampled_from(["sea ", "a", ".", " ", "\n", "\u0301", "\u4e2d", "\U0001f600", "\x00", "-"]),
    st.integers(1, 2000),
)


@given(st.lists(st.tuples(*_PIECES), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_cut_texts_have_the_tokens_of_whole_ones(pieces: list[tuple[str, int]]) -> None:
    text = "".join(piece * count for piece, count in pieces)
    tokenizer = make_tokenizer("bert")
    tokens = TextTokenizer(tokenizer, 8)(["short", text, "sea " * 300])
    assert split(tokens) == expected_ids(tokenizer, ["short", text, "sea " * 300], 8)


@pytest.mark.parametrize("gap", [LIMIT - 1100, LIMIT - 10, LIMIT - 1, LIMIT, LIMIT + 1, 3 * LIMIT])
@pytest.mark.parametrize("filler", [" ", "\u0301", "a", "\x00"])
def test_words_around_the_cut(real: Any, filler: str, gap: int) -> None:
    gap = max(gap, 1)
    rng = random.Random(gap)
    words = " ".join(rng.choices(["unbelievable", "sea", "caf\u00e9", "\u4e2d\u6587"], k=300))
    texts = [filler * gap + words, words + filler * gap, words[: gap // 2] + filler * gap + words]
    assert_same_ids(real, texts, 8)


def test_words_on_the_cut(real: Any) -> None:
    """The last token that is kept, moved over the cut one character at a time."""
    limit = 32 * 64
    words = "unbelievable caf\u00e9s misunderstandings " * 20
    texts = [" " * gap + words for gap in range(limit - 300, limit + 10)]
    assert_same_ids(real, texts, 32)


@pytest.mark.parametrize("words", [28, 29, 30])
def test_a_word_that_goes_on_behind_the_cut(real: Any, words: int) -> None:
    """What the normalizer takes out of a word is as long as the margin of any cut."""
    assert_same_ids(real, ["sea " * words + "a" + "\u0301" * 3000 + "bcd sea"], 32)


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Replace(Regex(r"<!--[^>]*-->"), ""),
        normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"^[\s\S]*-->"), "")]),
        normalizers.Replace("sea ", ""),
    ],
    ids=["comments", "up to the last", "words"],
)
def test_a_normalizer_that_looks_far(normalizer: Any) -> None:
    tokenizer = make_tokenizer("bert")
    tokenizer.backend_tokenizer.normalizer = normalizer
    text = f"<!-- {'sea ' * 600} --> the old man and the house"
    tokens = TextTokenizer(tokenizer, 8)([text, "short"])
    assert split(tokens) == expected_ids(tokenizer, [text, "short"], 8)


@pytest.mark.parametrize("family", VARIANTS)
def test_long_texts_are_cut_before_they_are_tokenised(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, given = TextTokenizer(make_tokenizer(family), 32), []
    encode = tokenization.tokenize
    monkeypatch.setattr(
        tokenization, "tokenize", lambda call, texts: given.append(texts) or encode(call, texts)
    )
    tokenizer(["the sea " * 5000])
    ((text,),) = given
    assert 4 * LIMIT - 8 <= len(text) <= 4 * LIMIT


def test_left_truncation_is_never_cut_before() -> None:
    tokenizer = make_tokenizer("bert")
    tokenizer.truncation_side = "left"
    texts = ["sea " * 3000 + "sun", "sun " + "." * 100_000, "sea " * 100 + " " * 5000 + "sun"]
    assert_same_ids(tokenizer, texts, 32)


# Other kinds of tokenizers


def test_python_tokenizer() -> None:
    tokenizer = transformers.CanineTokenizer()
    assert getattr(tokenizer, "backend_tokenizer", None) is None
    tokens = TextTokenizer(tokenizer, 20)(TEXTS)
    assert split(tokens) == expected_ids(tokenizer, TEXTS, 20)
    assert tokens.truncated == sum(len(text) + 2 > 20 for text in TEXTS)


def test_token_types_other_than_zero() -> None:
    model = make_sentence_transformer("bert")
    tokenizer = model.tokenizer
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:1 [SEP]:1", special_tokens=ids
    )
    tokens = TextTokenizer(tokenizer, 10)(["sea sun", ""])
    assert tokens.types is not None
    assert tokens.types.tolist() == [0, 1, 1, 1, 0, 1]
    encoder = FastEncoder(model)
    assert_same_vectors(encoder.encode(TEXTS), model.encode(TEXTS))
    features = encoder.encode("sea sun", output_value=None)
    assert features["token_type_ids"].tolist() == [0, 1, 1, 1]

    plain = TextTokenizer(make_tokenizer("bert"), 10)(["sea"])
    assert plain.types is None


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "distilbert"])
@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_special_tokens_inside_a_text(family: str, split_special_tokens: bool) -> None:
    model = make_sentence_transformer(family)
    encoder = FastEncoder(model)
    model.tokenizer.split_special_tokens = split_special_tokens
    special = model.tokenizer.all_special_tokens
    assert model.tokenizer.pad_token in special
    texts = ["sea " + " sun ".join(special) + " moon", model.tokenizer.pad_token * 3, *special]
    assert_same_vectors(encoder.encode(texts), model.encode(texts))


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_side_reaches_the_vectors(side: str) -> None:
    model = make_sentence_transformer()
    encoder = FastEncoder(model)
    model.tokenizer.truncation_side = side
    assert_same_vectors(encoder.encode(TEXTS), model.encode(TEXTS))


def test_tokens_added_later_are_known() -> None:
    model = make_sentence_transformer()
    encoder = FastEncoder(model)
    before = encoder.encode("sea zzzyx sun")
    model.tokenizer.add_tokens(["zzzyx"])
    model[0].auto_model.resize_token_embeddings(len(model.tokenizer))
    after = encoder.encode("sea zzzyx sun")
    assert_same_vectors(after, model.encode("sea zzzyx sun"))
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings", None])
def test_tokens_without_a_row_in_the_table(
    monkeypatch: pytest.MonkeyPatch, batch_tokens: list[int], output_value: Any
) -> None:
    monkeypatch.setitem(inference._SLICES, "cpu", (4_000_000, 4))
    monkeypatch.setattr(few, "_MOST_TEXTS", 0)
    model = make_sentence_transformer()
    encoder = FastEncoder(model)
    texts = ["sea"] * 5 + ["sea foobarx", "sun " * 30, "foobarx"]
    encoder.encode(texts)
    model.tokenizer.add_tokens([AddedToken("foobarx", normalized=False)])
    rows = model[0].auto_model.embeddings.word_embeddings.num_embeddings
    message = (
        rf"^inputs\[5\] holds the token 'foobarx', whose id {rows} is outside the {rows} rows of "
        r".*model\.resize_token_embeddings\(len\(tokenizer\)\)"
    )
    batch_tokens.clear()
    with pytest.raises(TokenIdError, match=message) as error:
        encoder.encode(texts, output_value=output_value)
    assert isinstance(error.value, ValueError) and error.value.indices == [5, 7]
    assert batch_tokens == [4 * 3], "only the slice before is computed"
    assert pickle.loads(pickle.dumps(error.value)).indices == [5, 7]
    with pytest.raises(IndexError):
        model.encode(texts)
    model[0].auto_model.resize_token_embeddings(len(model.tokenizer))
    assert_same_vectors(encoder.encode(texts), model.encode(texts))


def test_ids_of_a_python_tokenizer_without_a_row_in_the_table() -> None:
    encoder = FastEncoder(make_sentence_transformer())
    pipeline = encoder._pipeline()
    tokenizer = TextTokenizer(transformers.CanineTokenizer(), 20)
    prepared = pipeline.engine.prepared()
    with pytest.raises(TokenIdError, match=r"^inputs\[3\] holds the token '\\ue000'"):
        inference.check_tokens(
            replace(pipeline, tokenizer=tokenizer), tokenizer(["a"]), 3, prepared
        )


def test_token_types_without_a_row_in_the_table() -> None:
    model = make_sentence_transformer("bert")
    ids = [(token, model.tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:2 [SEP]:0", special_tokens=ids
    )
    encoder = FastEncoder(model)
    with pytest.raises(TokenIdError, match=r"^inputs\[1\] holds a token of type 2, .* 2 rows"):
        encoder.encode(["", "sea"])


# Privacy, threads, failures


def test_the_tokenizer_of_the_caller_is_left_alone() -> None:
    tokenizer = make_tokenizer("bert")
    tokenizer.backend_tokenizer.enable_padding(length=20)
    tokenizer.backend_tokenizer.enable_truncation(5)
    before = tokenizer.backend_tokenizer.to_str()
    private = TextTokenizer(tokenizer, 10)
    private(TEXTS)
    assert tokenizer.backend_tokenizer.to_str() == before
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert private(TEXTS).lengths.max() == 10
    assert private(["sea"]).lengths.tolist() == [3]


def test_threads_of_other_lengths_do_not_disturb() -> None:
    """Encoders that share a tokenizer, each with a length of its own."""
    tokenizer = make_tokenizer("bert")
    lengths = (4, 9, 17, 33)
    ours = {length: TextTokenizer(tokenizer, length) for length in lengths}
    expected = {length: expected_ids(tokenizer, TEXTS, length) for length in lengths}
    wrong: list[int] = []

    def work(length: int) -> None:
        for _ in range(25):
            if split(ours[length](TEXTS)) != expected[length]:
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in lengths * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class PanicException(BaseException):
    """What the Rust side raises when it panics: not an Exception."""


@pytest.mark.parametrize("texts", [["sea", "sun"], ["sea", "sun " * 1000]], ids=["short", "long"])
def test_panic_becomes_an_input_error(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    class Panicking:
        normalizer, pre_tokenizer = BertNormalizer(), BertPreTokenizer()

        def encode_batch(self, _: list[str]) -> Any:
            raise PanicException("index out of bounds")

        encode_batch_fast, get_added_tokens_decoder = encode_batch, dict

    tokenizer = TextTokenizer(make_tokenizer("bert"), 10)
    monkeypatch.setattr(tokenizer, "_backend", Panicking())
    with pytest.raises(InputError, match="failed on one of 2 texts: index out of bounds"):
        tokenizer(texts)


def test_other_interruptions_pass_unchanged() -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenization.tokenize(interrupt, ["sea"])


@given(st.lists(st.text(st.characters(codec=None), max_size=20), max_size=5))
@settings(max_examples=200, deadline=None)
def test_check_texts_accepts_exactly_what_utf8_can_hold(texts: list[str]) -> None:
    broken = [i for i, text in enumerate(texts) if any("\ud800" <= c <= "\udfff" for c in text)]
    if broken:
        with pytest.raises(InputError, match=rf"^texts\[{broken[0]}\] must be valid Unicode"):
            check_texts(texts, "texts")
    else:
        check_texts(texts, "texts")
        assert len(TextTokenizer(make_tokenizer("bert"), 10)(texts).lengths) == len(texts)
