"""Pairs of texts are tokenised as the tokenizer itself does, each different text once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, processors
from transformers import BertTokenizer

from families import FAMILIES, make_texts, make_tokenizer
from sbert_fast import pairs
from sbert_fast.pairs import PairTokenizer
from sbert_fast.tokenization import TokenizedTexts

TEXTS = [*make_texts(40, max_words=40), "", "a", "  ", "中文 ñ 😀"]


def drawn(count: int) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [(rng.choice(TEXTS[-9:]), rng.choice(TEXTS)) for _ in range(count)]


def split(tokens: TokenizedTexts) -> dict[str, list[list[int]]]:
    ends = list(zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True))
    types = tokens.types if tokens.types is not None else tokens.ids * 0
    return {
        "input_ids": [tokens.ids[a:b].tolist() for a, b in ends],
        "token_type_ids": [types[a:b].tolist() for a, b in ends],
    }


def check(tokenizer: Any, limit: int, texts: list[tuple[str, str]]) -> None:
    tokens = PairTokenizer(tokenizer, limit)(texts)
    given = [list(pair) for pair in texts]
    expected = tokenizer(given, truncation="longest_first", max_length=limit)
    whole = tokenizer(given, truncation=False)["input_ids"]
    found = split(tokens)
    assert found["input_ids"] == expected["input_ids"]
    if "token_type_ids" in tokenizer.model_input_names:
        assert found["token_type_ids"] == expected["token_type_ids"]
    assert tokens.truncated == sum(len(ids) > limit for ids in whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_ids_and_types(family: str, side: str) -> None:
    tokenizer = make_tokenizer(family)
    tokenizer.truncation_side = side
    for limit in (4, 8, 9, 20, 21, 64, 512):
        check(tokenizer, limit, drawn(150))


def test_what_surrounds_the_texts_may_take_any_form() -> None:
    tokenizer = make_tokenizer("bert")
    pair = "$B:1 [SEP]:0 $A:0 [CLS]:1"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=pair, special_tokens=[("[SEP]", 3), ("[CLS]", 2)]
    )
    check(tokenizer, 30, drawn(50))


_CLS, _SEP = ("[CLS]", 2), ("[SEP]", 3)


@pytest.mark.parametrize(
    "processor",
    [
        None,
        processors.BertProcessing(_SEP, _CLS),
        processors.RobertaProcessing(_SEP, _CLS),
        processors.ByteLevel(),
        processors.Sequence([processors.ByteLevel(), processors.BertProcessing(_SEP, _CLS)]),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_any_post_processor(processor: Any) -> None:
    tokenizer = make_tokenizer("bert")
    tokenizer.backend_tokenizer.post_processor = processor
    for limit in (7, 20, 64):
        check(tokenizer, limit, drawn(50))


def test_added_tokens() -> None:
    tokenizer = make_tokenizer("bert")
    tokenizer.add_tokens([AddedToken(f"word{i}", normalized=False) for i in range(80)])
    texts = [("word3 and word4", "some word79 word1 here"), ("the", "word79word3")]
    check(tokenizer, 64, texts)
    reader = PairTokenizer(tokenizer, 64)
    reader.refresh()
    assert reader(texts).ids.tolist() == PairTokenizer(tokenizer, 64)(texts).ids.tolist()


def test_python_tokenizers(tmp_path: Any) -> None:
    vocabulary = tmp_path / "vocab.txt"
    make_tokenizer("bert").backend_tokenizer.model.save(str(tmp_path))
    tokenizer = BertTokenizer(str(vocabulary))
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"backend_tokenizer": None})
    check(tokenizer, 20, drawn(20))


def test_a_text_of_many_pairs_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    tokenize = pairs.tokenize

    def record(encode: Any, texts: Any) -> Any:
        seen.extend(texts)
        return tokenize(encode, texts)

    monkeypatch.setattr(pairs, "tokenize", record)
    PairTokenizer(make_tokenizer("bert"), 64)([("a query", text) for text in TEXTS])
    assert sorted(seen) == sorted({"a query", *TEXTS})
