"""What a run must find unchanged of a model before it goes on: its digest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

from families import make_sentence_transformer
from sbert_fast import FastEncoder
from sbert_fast.corpus.identity import model_digest


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "prompts", {"query": "seek: "}),
        lambda model: setattr(model, "max_seq_length", 7),
        lambda model: model.tokenizer.add_tokens(["seaside"]),
        lambda model: setattr(model.tokenizer, "truncation_side", "left"),
        lambda model: setattr(model.tokenizer, "padding_side", "left"),
        lambda model: setattr(model.tokenizer, "split_special_tokens", True),
        lambda model: setattr(model.tokenizer, "model_input_names", ["input_ids"]),
        lambda model: setattr(model.tokenizer, "chat_template", "{{ messages }}"),
        lambda model: setattr(model[1], "pooling_mode", "cls"),
        lambda model: setattr(model[0].auto_model.config, "layer_norm_eps", 0.5),
    ],
    ids=[
        *("prompts", "length", "tokenizer", "truncation side", "padding side"),
        *("special tokens", "input names", "template", "pooling", "config"),
    ],
)
def test_whatever_changes_embeddings_changes_the_digest(
    change: Callable[[Any], None],
) -> None:
    model = FastEncoder(make_sentence_transformer(prompts={"query": "find: "}))
    before = model_digest(model)
    change(model)
    assert model_digest(model) != before


def test_vocabularies_of_tokenizers_without_a_backend_change_the_digest() -> None:
    def digest(words: list[str], lower: bool = False) -> str:
        tokenizer = WhitespaceTokenizer(words, do_lower_case=lower)
        module = WordEmbeddings(tokenizer, np.zeros((2, 4)))
        return model_digest(SentenceTransformer(modules=[module, Pooling(4)], device="cpu"))

    assert digest(["red", "sea"]) == digest(["red", "sea"])
    assert len({digest(["red", "sea"]), digest(["sea", "red"]), digest(["red", "sea"], True)}) == 3
