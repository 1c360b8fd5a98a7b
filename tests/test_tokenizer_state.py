"""Tokenizers that are changed after loading, or cannot be copied: the tokens are stock's."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from sentence_transformers import SentenceTransformer
from tokenizers import (
    AddedToken,
    NormalizedString,
    PreTokenizedString,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from changed import WAYS, assert_as_stock, tiny
from checks import assert_same_vectors
from families import make_tokenizer
from sbert_fast import FastEncoder, accelerate, explain
from sbert_fast.tokenization import TextTokenizer

# Words of the vocabulary inside other words, capitals, accents, Chinese, special tokens, and more
# tokens than are kept.
TEXTS = [
    "The SEA was cold, seas are seaing",
    "caf\u00e9 new_york \u4e2d boatsea",
    "[MASK] boat [SEP] red-tree",
    "red " * 40 + "sea " * 50,
    "a",
]


def backend(model: Any) -> Any:
    return model.tokenizer.backend_tokenizer


def wordpiece(model: Any, entries: dict[str, int]) -> None:
    backend(model).model = models.WordPiece(entries, unk_token="[UNK]")


def rotate_vocabulary(model: Any) -> None:
    entries = backend(model).get_vocab()
    words = sorted(word for word in entries if len(word) > 1 and word[0] != "[")
    ids = [entries[word] for word in words]
    wordpiece(model, entries | dict(zip(words, ids[1:] + ids[:1], strict=True)))


def exchange(model: Any, one: str, other: str) -> None:
    entries = backend(model).get_vocab()
    wordpiece(model, entries | {one: entries[other], other: entries[one]})


def template(model: Any, single: str) -> None:
    names = [name for name in ("[CLS]", "[SEP]", "[MASK]") if name in single]
    backend(model).post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, backend(model).get_vocab()[name]) for name in names]
    )


def another_backend(model: Any) -> None:
    other = Tokenizer.from_str(backend(model).to_str())
    other.normalizer = normalizers.BertNormalizer(lowercase=False)
    model.tokenizer._tokenizer = other


def other_flags(model: Any) -> None:
    for single_word in (True, False):
        model.tokenizer.add_tokens([AddedToken("sea", single_word=single_word)])
        model.encode("a")


def normalizer_behind_an_entry(model: Any) -> None:
    """Entries are normalised when they are added: whether anew later is the library's business."""
    model.tokenizer.add_tokens(["sea"])
    backend(model).normalizer = normalizers.Replace("s", "t")


def written_behind_an_entry(*lowercase: bool) -> Callable[[Any], None]:
    """An entry is added under the first setting of the normalizer, and stays so under others."""

    def change(model: Any) -> None:
        first, *others = lowercase
        set_on("normalizer", "lowercase", first)(model)
        model.tokenizer.add_tokens([AddedToken("[MASK]", normalized=True)])
        for value in others:
            set_on("normalizer", "lowercase", value)(model)

    return change


def sequence_item(model: Any) -> None:
    backend(model).pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits()]
    )
    model.encode("a")
    backend(model).pre_tokenizer[1] = pre_tokenizers.Split("e", "isolated")


def set_on(part: str, name: str, value: object) -> Callable[[Any], None]:
    """Set an attribute of a part of the backend, in place."""

    def change(model: Any) -> None:
        holder = getattr(backend(model), part)
        assert hasattr(holder, name)
        setattr(holder, name, value)

    return change


def replace(part: str, value: object) -> Callable[[Any], None]:
    return lambda model: setattr(backend(model), part, value)


def set_python(name: str, value: object) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        assert hasattr(model.tokenizer, name)
        setattr(model.tokenizer, name, value)

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an entry made special": lambda m: m.tokenizer.add_special_tokens(
        {"extra_special_tokens": ["sea"]}
    ),
    "an entry added again": lambda m: m.tokenizer.add_tokens(["sea"]),
    "an entry added with other flags": other_flags,
    "an entry made the mask": lambda m: m.tokenizer.add_special_tokens({"mask_token": "sea"}),
    "cls_token": set_python("cls_token", "boat"),
    "another backend": another_backend,
    "normalizer": replace("normalizer", normalizers.BertNormalizer(lowercase=False)),
    "normalizer behind an added entry": normalizer_behind_an_entry,
    "a normalizer that replaces": replace(
        "normalizer", normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("s", "t")])
    ),
    "lowercase, in place": set_on("normalizer", "lowercase", False),
    "lowercase behind an added entry, in place": written_behind_an_entry(True, False),
    "lowercase around an added entry, in place": written_behind_an_entry(False, True),
    "accents, in place": set_on("normalizer", "strip_accents", False),
    "pre-tokenizer": replace("pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
    "a pre-tokenizer with a pattern": replace(
        "pre_tokenizer", pre_tokenizers.Split(Regex("[ _a]"), "removed")
    ),
    "item of a pre-tokenizer, in place": sequence_item,
    "post-processor with another token": lambda m: template(m, "[CLS] [MASK] $A [SEP]"),
    "post-processor without tokens": lambda m: template(m, "$A"),
    "post-processor with types": lambda m: template(m, "[CLS]:1 $A:1 [SEP]:1"),
    "longest word, in place": set_on("model", "max_input_chars_per_word", 4),
    "prefix, in place": set_on("model", "continuing_subword_prefix", "@@"),
    "unknown token, in place": set_on("model", "unk_token", "[MASK]"),
    "vocabulary of the same size": rotate_vocabulary,
    "two entries exchanged": lambda m: exchange(m, "sea", "boat"),
    "two rare entries exchanged": lambda m: exchange(m, "##f", "##q"),
    "truncation_side": set_python("truncation_side", "left"),
    "padding_side": set_python("padding_side", "left"),
    "model_max_length": set_python("model_max_length", 9),
    "split_special_tokens": set_python("split_special_tokens", True),
    "model_input_names": set_python("model_input_names", ["input_ids"]),
}


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_tokenizers(change: str, way: str) -> None:
    # Up to 0.22, an added entry stays as it was normalised when it was added.
    of_entries = tokenizers.__version__ < "0.23" and "around an added entry" in change
    matters = change != "cls_token" and not of_entries
    assert_as_stock(CHANGES[change], way, texts=TEXTS, matters=matters)


# What stock sets anew for each call, or reads nowhere on the way to ids.
INERT: dict[str, Callable[[Any], Any]] = {
    "decoder": replace("decoder", decoders.WordPiece(prefix="@@")),
    "truncation of the backend": lambda m: backend(m).enable_truncation(3),
    "padding of the backend": lambda m: backend(m).enable_padding(length=50),
    "special tokens of the backend": lambda m: setattr(backend(m), "encode_special_tokens", True),
    "clean_up_tokenization_spaces": set_python("clean_up_tokenization_spaces", True),
    "a call with other arguments": lambda m: m.tokenizer(
        ["a b"], padding="max_length", truncation=True, max_length=3, split_special_tokens=True
    ),
}


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("change", INERT)
def test_changes_of_no_effect(change: str, way: str) -> None:
    encoder = assert_as_stock(INERT[change], way, texts=TEXTS, matters=False)
    assert encoder.stats.fallbacks == {}


def with_model(model: Any, normalizer: Any = None) -> Callable[[], SentenceTransformer]:
    """Makes a model whose tokenizer runs `model`: a copy, so that changes stay with it."""

    def make() -> SentenceTransformer:
        result = tiny()
        result.tokenizer.backend_tokenizer.model = copy.deepcopy(model)
        result.tokenizer.backend_tokenizer.normalizer = normalizer
        return result

    return make


_LETTERS = {letter: 10 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
_PAIRS = _LETTERS | {"se": 40, "ea": 41, "sea": 42, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[PAD]": 0}


def bpe(merges: list[tuple[str, str]]) -> Any:
    return models.BPE(_PAIRS, merges, unk_token="[UNK]")


def unigram(score: float) -> Any:
    scores = {"sea": score, "se": -2.0, "ea": -1.0}
    pieces = sorted(_PAIRS, key=lambda piece: _PAIRS[piece])
    filled = [*pieces[:4], *(f"[{i}]" for i in range(4, 10)), *pieces[4:30]]
    filled += [*(f"[{i}]" for i in range(36, 40)), *pieces[30:]]
    return models.Unigram([(piece, scores.get(piece, -3.0)) for piece in filled], unk_id=1)


BPE_CHANGES: dict[str, Callable[[Any], Any]] = {
    "dropout": set_on("model", "dropout", 1.0),
    "merges of the same vocabulary": replace("model", bpe([("e", "a"), ("s", "ea")])),
}


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("change", BPE_CHANGES)
def test_changed_byte_pairs(change: str, way: str) -> None:
    make = with_model(bpe([("s", "e"), ("se", "a")]))
    texts = ["sea ses eas", "ease sea"]
    assert_as_stock(BPE_CHANGES[change], way, make=make, texts=texts)


@pytest.mark.parametrize("way", WAYS[:2])
def test_changed_scores_of_a_unigram(way: str) -> None:
    change, make = replace("model", unigram(-9.0)), with_model(unigram(-1.0))
    assert_as_stock(change, way, make=make, texts=["sea seas", "ease"])


class Underscores:
    """Cuts words as a segmenter in Python does, such as jieba."""

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(lambda _, part: part.split("_", "removed"))


class Latin:
    def normalize(self, text: NormalizedString) -> None:
        text.replace("\u4e2d", "sea")
        text.lowercase()


UNDERSCORES = pre_tokenizers.PreTokenizer.custom(Underscores())
IN_PYTHON: dict[str, Callable[[Any], Any]] = {
    "pre-tokenizer": replace("pre_tokenizer", UNDERSCORES),
    "pre-tokenizer in a sequence": replace(
        "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), UNDERSCORES])
    ),
    "normalizer": replace("normalizer", normalizers.Normalizer.custom(Latin())),
}


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("change", IN_PYTHON)
@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_parts_in_python(change: str, way: str) -> None:
    assert_as_stock(IN_PYTHON[change], way, texts=TEXTS)


@pytest.mark.parametrize("change", IN_PYTHON)
def test_nothing_raises_for_parts_in_python(change: str) -> None:
    stock = tiny()
    IN_PYTHON[change](stock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = FastEncoder(stock)
    assert "FastEncoder" in explain(encoder)
    assert explain(stock)
    assert (encoder.unsupported_reason is None) == (encoder.packed_engine is not None)
    assert_same_vectors(encoder.encode(TEXTS[1]), stock.encode(TEXTS[1]))
    assert_same_vectors(accelerate(stock).encode(TEXTS), encoder.encode(TEXTS))


def test_a_tokenizer_of_a_pickled_encoder_is_its_own() -> None:
    encoder = FastEncoder(tiny())
    encoder.encode(TEXTS)
    twins = [copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))]
    expected = encoder.encode(TEXTS)
    for twin in twins:
        rotate_vocabulary(twin)
        stock = tiny()
        rotate_vocabulary(stock)
        assert_same_vectors(twin.encode(TEXTS), stock.encode(TEXTS))
        assert_same_vectors(encoder.encode(TEXTS), expected)


def test_an_entry_of_the_real_model_made_special(minilm_path: str) -> None:
    def change(model: Any) -> None:
        model.tokenizer.add_special_tokens({"extra_special_tokens": ["[unused1]"]})

    assert_as_stock(
        change,
        "used before",
        make=lambda: SentenceTransformer(minilm_path, device="cpu"),
        texts=["[unused1] what is love"],
    )


def test_nothing_is_written_to_a_backend_that_calls_share() -> None:
    original = make_tokenizer("bert")
    original.add_tokens([AddedToken(f"zq{i}", normalized=False) for i in range(100)])
    tokenizer = TextTokenizer(original, 20)
    for splits in (True, False):
        used = tokenizer._backend
        original.split_special_tokens = splits
        tokenizer.refresh()
        assert tokenizer._backend is not used
        tokens = tokenizer(["[MASK] sea"])
        expected = original("[MASK] sea")["input_ids"]
        assert tokens.ids.tolist() == expected
    # A stock call has set the original to the same.
    kept = tokenizer._backend
    tokenizer.refresh()
    assert tokenizer._backend is kept
