"""What people do to the tokenizer of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import AddedToken, PreTrainedTokenizerBase

from families import make_tokenizer
from model_operations import operation, setting
from walks import LENGTH, TEXTS, NotNow, Subject, Undo


def _tokenizer(name: str, *values: Any, **how: Any) -> None:
    setting(lambda s: s.tokenizer, "tokenizer", name, *values, **how)


_tokenizer("truncation_side", "left", "right")
_tokenizer("padding_side", "left", "right")
_tokenizer("model_max_length", 6, 12, LENGTH)
_tokenizer("split_special_tokens", True, False)
_tokenizer("clean_up_tokenization_spaces", True, False, changes=False, weight=0.3)
_tokenizer(
    "model_input_names",
    ["input_ids", "attention_mask"],
    ["input_ids", "token_type_ids", "attention_mask"],
    changes=False,
)
_tokenizer(
    "chat_template",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    changes=False,
    weight=0.3,
)
setting(lambda s: s.model, "model", "max_seq_length", 5, 9, LENGTH)


@operation
def without_attention_mask(s: Subject) -> Undo:
    old = s.tokenizer.model_input_names
    s.tokenizer.model_input_names = ["input_ids"]
    return lambda s: setattr(s.tokenizer, "model_input_names", old)


@operation
def length_out_of_range(s: Subject) -> Undo:
    old = s.model.max_seq_length
    s.model.max_seq_length = s.rng.choice([1, 2, 10**30])
    return lambda s: setattr(s.model, "max_seq_length", old)


@operation
def existing_entry_made_special(s: Subject) -> None:
    s.tokenizer.add_special_tokens({"extra_special_tokens": [s.rng.choice(["river", "sea"])]})


@operation
def existing_entry_added(s: Subject) -> None:
    # As an added token it is also found inside words.
    s.tokenizer.add_tokens(["r", "##r", "ri"][: s.rng.choice([1, 3])])
    _resize(s)


@operation
def entry_added(s: Subject) -> None:
    s.tokenizer.add_tokens(["young people", "riv"])
    _resize(s)


@operation
def entry_added_without_resizing(s: Subject) -> Undo:
    s.tokenizer.add_tokens(["THE ship"])
    return _resize


def _resize(s: Subject) -> None:
    table = s.base.get_input_embeddings()
    if len(s.tokenizer) > table.num_embeddings:
        s.base.resize_token_embeddings(len(s.tokenizer), mean_resizing=False)


@operation
def special_entry_with_options(s: Subject) -> None:
    token = AddedToken("sea", lstrip=True, rstrip=True, normalized=False)
    s.tokenizer.add_tokens([token])


def _backend(part: str, *makes: Callable[[Subject], Any], **how: Any) -> None:
    def act(s: Subject) -> Undo:
        old = copy.deepcopy(getattr(s.backend, part))
        setattr(s.backend, part, s.rng.choice(makes)(s))
        return lambda s: setattr(s.backend, part, old)

    operation(act, name=f"backend.{part} replaced", **how)


class Underscores:
    """A pre-tokenizer in Python, as those of jieba and MeCab are."""

    def pre_tokenize(self, text: Any) -> None:
        text.split(lambda _, part: part.split("e", "removed"))


def _processor(s: Subject) -> Any:
    token = "[MASK]" if "[MASK]" in s.tokenizer.get_vocab() else "<mask>"
    return processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A $B",
        special_tokens=[(token, s.tokenizer.convert_tokens_to_ids(token))],
    )


def _shuffled(s: Subject) -> Any:
    vocabulary = s.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    ids = list(vocabulary.values())
    rolled = dict(zip(vocabulary, ids[7:] + ids[:7], strict=True))
    return WordPiece(rolled, unk_token=s.tokenizer.unk_token)


_backend("normalizer", lambda _: normalizers.BertNormalizer(lowercase=False))
_backend("pre_tokenizer", lambda _: pre_tokenizers.Split("e", "isolated"))
_backend("post_processor", _processor)
_backend("model", _shuffled)
_backend("decoder", lambda _: decoders.ByteLevel(), changes=False)


@operation(name="pre-tokenizer in Python", weight=0.5)
def python_pre_tokenizer(s: Subject) -> Undo:
    s.backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Underscores())
    return lambda s: setattr(s.backend, "pre_tokenizer", pre_tokenizers.BertPreTokenizer())


@operation
def normalizer_written(s: Subject) -> Undo:
    normalizer = s.backend.normalizer
    if not hasattr(normalizer, "lowercase"):
        raise NotNow
    normalizer.lowercase = not normalizer.lowercase
    return lambda s: setattr(s.backend.normalizer, "lowercase", True)


@operation
def unknown_entry_of_the_model_written(s: Subject) -> Undo:
    s.backend.model.unk_token = "sea"
    unknown = s.tokenizer.unk_token
    return lambda s: setattr(s.backend.model, "unk_token", unknown)


@operation
def entry_added_to_the_backend(s: Subject) -> None:
    s.backend.add_special_tokens([s.rng.choice(["side", "oad"])])
    _resize(s)


@operation
def backend_replaced(s: Subject) -> Undo:
    # Another tokenizer may have another vocabulary by the time it is undone.
    old, tokenizer = s.backend, s.tokenizer
    tokenizer._tokenizer = Tokenizer.from_str(
        old.to_str().replace('"lowercase":true', '"lowercase":false')
    )
    return lambda _: setattr(tokenizer, "_tokenizer", old)


@operation
def trained_anew(s: Subject) -> None:
    new = s.tokenizer.train_new_from_iterator([TEXTS], 150)
    new.model_max_length = LENGTH
    s.first.processor = new


@operation
def call_of_tokenizers_patched(s: Subject) -> Undo:
    cls, old = PreTrainedTokenizerBase, PreTrainedTokenizerBase.__call__

    def restore(*_: Any) -> None:
        cls.__call__ = old

    def call(self: Any, text: Any, *args: Any, **how: Any) -> Any:
        return old(self, [t.upper()[::-1] for t in text], *args, **how)

    s.globals.callback(restore)
    cls.__call__ = call
    return restore


@operation
def word_limit_of_the_model_written(s: Subject) -> Undo:
    s.backend.model.max_input_chars_per_word = 4
    return lambda s: setattr(s.backend.model, "max_input_chars_per_word", 100)


@operation(changes=False)
def backend_truncates(s: Subject) -> Undo:
    s.backend.enable_truncation(4)
    return lambda s: s.backend.no_truncation()


@operation(changes=False)
def backend_pads(s: Subject) -> Undo:
    s.backend.enable_padding(length=30)
    return lambda s: s.backend.no_padding()


@operation(changes=False)
def backend_encodes_special_tokens(s: Subject) -> Undo:
    s.backend.encode_special_tokens = True
    return lambda s: setattr(s.backend, "encode_special_tokens", False)


@operation
def tokenizer_replaced(s: Subject) -> Undo:
    old = s.tokenizer
    other = copy.deepcopy(old)
    other.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    s.first.processor = other
    return lambda s: setattr(s.first, "processor", old)


@operation(weight=0.5)
def tokenizer_subclassed(s: Subject) -> Undo:
    old = type(s.tokenizer)

    class Finder(old):  # type: ignore[misc,valid-type]
        def __call__(self, text: Any, **how: Any) -> Any:
            texts = [text] if isinstance(text, str) else text
            return super().__call__([f"find {t}" for t in texts], **how)

    s.tokenizer.__class__ = Finder
    return lambda s: setattr(s.tokenizer, "__class__", old)


@operation(changes=False)
def used_by_somebody_else(s: Subject) -> None:
    s.tokenizer(["a b", "c"], padding="max_length", max_length=7, truncation=True)


@operation(changes=False)
def fresh_tokenizer(s: Subject) -> None:
    s.first.processor = make_tokenizer(s.base.config.model_type)
    s.model.max_seq_length = LENGTH
