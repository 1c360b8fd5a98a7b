"""A text that is cut before it is tokenised has the first tokens of the whole text."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from families import VARIANTS, make_tokenizer
from sbert_fast import cutting, tokenization

# Whatever may stick together, be split or vanish somewhere.
PIECES = [
    *"abzABZ09éßσΣİǅ²ªж中国あ한ㄱ각ไل .,-'_[]<>!▁Ġ\n\r\t\x00\xa0\u3000\u200d\u2028\x1c",
    *("e\u0301", "\u0301", "\u0323", "\u0345", "\u037a", "\u1100", "\u1161", "\u0600", "\u0d4e"),
    *("\ufb01", "\u00a8", "\ud55c\uae00", "\U0001f44d\U0001f3fd", "\U0001f469\u200d\U0001f467"),
    *("'s", "'re", " \u0301", "\u0301" * 9, "  ", "   ", " a ", "a b", "x" * 12),
    *("new york", "foo.", "foo", "中国", "<mask>", " <mask> ", "[MASK]"),
]
TEXTS = st.lists(
    st.tuples(st.sampled_from(PIECES), st.integers(1, 6)), min_size=3, max_size=30
).map(lambda parts: "".join(piece * count for piece, count in parts))

ALPHABET = sorted({c for piece in PIECES for c in piece} | set("bcdefgmnoprswyk▁Ġ"))
PAIRS = [a + b for a, b in itertools.product("abxo .\n▁中", repeat=2)]
VOCABULARY = {t: i for i, t in enumerate(["[UNK]", *ALPHABET, *(f"##{c}" for c in ALPHABET)])}
MERGES = [(a, b) for a, b in itertools.product("abxo .▁Ġ", repeat=2)]
MODELS: dict[str, Callable[[], Any]] = {
    "WordPiece": lambda: models.WordPiece(
        VOCABULARY, unk_token="[UNK]", max_input_chars_per_word=10**6
    ),
    "WordLevel": lambda: models.WordLevel(VOCABULARY, unk_token="[UNK]"),
    "BPE": lambda: models.BPE(
        {t: i for i, t in enumerate(dict.fromkeys([*VOCABULARY, *map("".join, MERGES)]))},
        MERGES,
        unk_token="[UNK]",
        fuse_unk=True,
    ),
    "Unigram": lambda: models.Unigram(
        [("[UNK]", 0.0), *((t, -len(t) % 3 - 1.0) for t in dict.fromkeys([*ALPHABET, *PAIRS]))], 0
    ),
}
NORMALIZERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "BERT": normalizers.BertNormalizer,
    "BERT, cased": lambda: normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False),
    **{form: getattr(normalizers, form) for form in ("NFC", "NFD", "NFKC", "NFKD")},
    "accents, lower case, ends": lambda: normalizers.Sequence(
        [
            *(normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()),
            *(normalizers.Nmt(), normalizers.Strip()),
        ]
    ),
    "spaces": lambda: normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    ),
    "bytes": lambda: normalizers.ByteLevel(),
    "far": lambda: normalizers.Replace(Regex(r"a[\s\S]*b"), "ab"),
    "spaces replaced": lambda: normalizers.Replace(" ", "▁"),
}
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "BERT": pre_tokenizers.BertPreTokenizer,
    "words": pre_tokenizers.Whitespace,
    "white space": pre_tokenizers.WhitespaceSplit,
    "bytes": pre_tokenizers.ByteLevel,
    "bytes, no pattern": lambda: pre_tokenizers.ByteLevel(use_regex=False),
    "Metaspace": pre_tokenizers.Metaspace,
    "Metaspace, first": lambda: pre_tokenizers.Metaspace(prepend_scheme="first"),
    "Metaspace, whole": lambda: pre_tokenizers.Metaspace(split=False),
    "white space, Metaspace": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    ),
    "punctuation": pre_tokenizers.Punctuation,
    "digits, bytes": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    ),
    "punctuation that goes with the next, words": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("merged_with_next"), pre_tokenizers.WhitespaceSplit()]
    ),
}
ADDED = {
    "none": [],
    "special": [AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("[MASK]")],
    "single words": [AddedToken(t, single_word=True) for t in ("foo.", "foo", "中", "a.", ".")],
    "with spaces": [AddedToken("new york", normalized=False), AddedToken("a b"), AddedToken("b ")],
}
TOKENIZERS = st.tuples(
    *map(st.sampled_from, ([*MODELS], [*NORMALIZERS], [*PRE_TOKENIZERS], [*ADDED]))
)
made: dict[tuple[str, ...], Tokenizer] = {}


def make(names: tuple[str, ...]) -> Tokenizer:
    if names not in made:
        model, normalizer, pre_tokenizer, added = names
        tokenizer = made[names] = Tokenizer(MODELS[model]())
        for part, value in (
            ("normalizer", NORMALIZERS[normalizer]()),
            ("pre_tokenizer", PRE_TOKENIZERS[pre_tokenizer]()),
        ):
            if value is not None:
                setattr(tokenizer, part, value)
        tokenizer.add_tokens(ADDED[added])
    return made[names]


def assert_first_tokens(backend: Any, text: str, limit: int) -> bool:
    """What is left of a text has the first tokens of it; returns whether it was cut."""
    part = cutting.beginning(backend, text, limit) if cutting.reads_nearby(backend) else text
    assert text.startswith(part) and (len(part) <= limit or part == text)
    ids = backend.encode(part, add_special_tokens=False).ids
    assert backend.encode(text, add_special_tokens=False).ids[: len(ids)] == ids
    return part != text


@given(TOKENIZERS, TEXTS, st.integers(1, 120))
@settings(max_examples=1000, deadline=None)
def test_first_tokens(names: tuple[str, ...], text: str, limit: int) -> None:
    assert_first_tokens(make(names), text, limit)


@pytest.mark.parametrize(
    ("names", "text", "limit"),
    [
        (("WordPiece", "BERT", "BERT", "single words"), "-foo.b" * 30, 37),
        (("WordPiece", "BERT", "BERT", "with spaces"), "zza b" * 30, 49),
        (("BPE", "none", "punctuation", "none"), "zx " * 40, 50),
        (("BPE", "bytes", "white space", "none"), "zx " * 40, 50),
    ],
    ids=["a token is no word by itself", "a token goes on", "no words", "no spaces"],
)
def test_places_where_no_word_ends(names: tuple[str, ...], text: str, limit: int) -> None:
    assert_first_tokens(make(names), text, limit)


@pytest.mark.parametrize("family", VARIANTS)
def test_first_tokens_of_families(family: str) -> None:
    tokenizer = make_tokenizer(family).backend_tokenizer
    cut: list[bool] = []

    @given(TEXTS, st.integers(1, 120))
    @example("the sea " * 40, 120)
    @settings(max_examples=60, deadline=None)
    def check(text: str, limit: int) -> None:
        cut.append(assert_first_tokens(tokenizer, text, limit))

    check()
    assert any(cut)


@pytest.mark.parametrize("pre_tokenizer", ["none", "bytes, no pattern", "Metaspace, whole"])
def test_without_words_nothing_is_cut(pre_tokenizer: str) -> None:
    backend = make(("Unigram", "none", pre_tokenizer, "none"))
    assert not assert_first_tokens(backend, "the sea and the sun " * 20, 100)


@pytest.mark.parametrize("pre_tokenizer", ["BERT", "words", "white space", "bytes", "Metaspace"])
@pytest.mark.parametrize("text", ["the sea and ", "море и солнце ", "sea.\nsun 中国\n"])
def test_words_are_cut(pre_tokenizer: str, text: str) -> None:
    assert assert_first_tokens(make(("BPE", "NFC", pre_tokenizer, "none")), text * 20, 100)


@pytest.mark.parametrize("text", [".", "中", "a-"])
def test_words_of_bert_need_no_spaces(text: str) -> None:
    assert assert_first_tokens(make(("WordPiece", "BERT", "BERT", "none")), text * 200, 100)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_characters_beside_a_cut_combine_with_no_space(form: Any) -> None:
    plain = cutting.re.compile(cutting._PLAIN)
    for character in filter(plain.fullmatch, map(chr, range(0x110000))):
        alone = unicodedata.normalize(form, character)
        around = unicodedata.normalize(form, f"{character} {character}")
        assert around == f"{alone} {alone}" and not alone[-1].isspace(), hex(ord(character))
        assert not unicodedata.combining(character)


def test_no_cut_is_sought_beside_many_added_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    original = make_tokenizer("bert")
    original.add_tokens([AddedToken(f"zq{i}", normalized=False) for i in range(3)])
    tokenizer = tokenization.TextTokenizer(original, 8)
    monkeypatch.setattr(tokenization, "_MOST_ADDED_OF_CUT", len(original.added_tokens_decoder) - 1)
    monkeypatch.setattr(tokenization, "beginning", None)
    assert tokenizer(["sea " * 1000]).lengths.tolist() == [8]
