"""FastCrossEncoder of rerankers that generate, under settings that change after loading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import nn

from checks import assert_same_scores
from families import make_texts
from rerankers import CHAT_TEMPLATE, assert_runs_in_stock, make_reranker
from sbert_fast import FastCrossEncoder
from sbert_fast.errors import InputError, NonFiniteEmbeddingError
from sbert_fast.sentence_transformers.stock import as_stock

TEXTS = [*make_texts(12, max_words=10), "", "a", "the sea [SEP] is old"]
PAIRS = [(TEXTS[i % 5], text) for i, text in enumerate(TEXTS)]

pytestmark = pytest.mark.filterwarnings("ignore:FastCrossEncoder runs this model in")


def _template(model: CrossEncoder) -> None:
    model.tokenizer.chat_template = CHAT_TEMPLATE.replace("the ", "our old ")


def _named_templates(model: CrossEncoder) -> None:
    model.tokenizer.chat_template = {"default": CHAT_TEMPLATE.replace("the ", "see ")}


def _asked(model: CrossEncoder) -> None:
    model[0].processing_kwargs["chat_template"] = {"add_generation_prompt": True}


def _other_template(model: CrossEncoder) -> None:
    other = CHAT_TEMPLATE.replace("the ", "one of the ")
    model[0].processing_kwargs["chat_template"] = {"chat_template": other}


def _structured(model: CrossEncoder) -> None:
    model[0].input_formatter.message_format = "structured"


def _tokens(model: CrossEncoder) -> None:
    model[1].true_token_id, model[1].false_token_id = 61, 7


def _one_token(model: CrossEncoder) -> None:
    model[1].false_token_id = None


def _written_head(model: CrossEncoder) -> None:
    model[0].model.lm_head.weight.data[57] += 0.1


def _other_head(model: CrossEncoder) -> None:
    torch.manual_seed(0)
    model[0].model.lm_head = nn.Linear(64, len(model.tokenizer))


def _as_pairs(model: CrossEncoder) -> None:
    del model[0].modality_config["message"]


def _shorter(model: CrossEncoder) -> None:
    model.max_seq_length = 12


def _cut_on_the_left(model: CrossEncoder) -> None:
    model.max_seq_length, model.tokenizer.truncation_side = 12, "left"


def _all_logits(model: CrossEncoder) -> None:
    model[0].processing_kwargs["text"] = {"logits_to_keep": 0}


@pytest.mark.parametrize(
    "change",
    [
        _template,
        _named_templates,
        _asked,
        _other_template,
        _structured,
        _tokens,
        _one_token,
        _written_head,
        _other_head,
        _as_pairs,
        _shorter,
        _cut_on_the_left,
        _all_logits,
    ],
)
def test_what_changes_after_loading_runs_packed(change: Callable[[Any], None]) -> None:
    model = FastCrossEncoder(make_reranker())
    before = model.predict(PAIRS)
    change(model)
    scores = model.predict(PAIRS)
    assert_same_scores(scores, as_stock(model).predict(PAIRS))
    assert not model.stats.fallbacks
    assert (np.abs(scores - before).max() > 1e-3) == (change is not _all_logits)


def _length_of_texts(model: CrossEncoder) -> None:
    model[0].processing_kwargs["text"] = {"max_length": 9}


def _length_of_chats(model: CrossEncoder) -> None:
    model[0].processing_kwargs["chat_template"] = {"max_length": 9}


def _uncut(model: CrossEncoder) -> None:
    model[0].processing_kwargs["text"] = {"truncation": False}


def _hook(model: CrossEncoder) -> None:
    model[0].model.lm_head.register_forward_hook(lambda _, __, logits: logits * 2)


def _replaced(model: CrossEncoder) -> None:
    forward = model[0].model.forward
    model[0].model.forward = lambda **inputs: forward(**inputs)


def _doubled(model: CrossEncoder) -> None:
    model[0].model.lm_head = nn.Sequential(model[0].model.lm_head, nn.Tanh())


def _other_dtype(model: CrossEncoder) -> None:
    model[1].false_token_id = torch.tensor(83)


class OwnScore(LogitScore):
    """Somebody's own."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {
            name: -x if name == "scores" else x for name, x in super().forward(features).items()
        }


def _own_score(model: CrossEncoder) -> None:
    model[1].__class__ = OwnScore


def _followed(model: CrossEncoder) -> None:
    model.append(nn.Identity())


def _formatted_elsewhere(model: CrossEncoder) -> None:
    preprocess = model[0].preprocess
    model[0].preprocess = lambda pairs, **how: preprocess([pair[::-1] for pair in pairs], **how)


def _other_output(model: CrossEncoder) -> None:
    model[0].module_output_name = model[1].module_input_name = "logits"


def _another_states(model: CrossEncoder) -> None:
    model[0].modality_config["message"]["method_output_name"] = ("logits",)


REFUSED: dict[Callable[[CrossEncoder], None], str] = {
    _length_of_texts: "the Transformer module sets processing_kwargs",
    _length_of_chats: "the Transformer module sets processing_kwargs",
    _uncut: "the Transformer module sets processing_kwargs",
    _hook: "Linear has forward hooks",
    _replaced: "forward of Qwen3ForCausalLM was replaced on an instance",
    _doubled: "expected torch.nn.Linear, got torch.nn.modules.container.Sequential",
    _other_dtype: "LogitScore has the tokens [57, tensor(83)]",
    _own_score: "LogitScore must follow the Transformer, got OwnScore",
    _followed: "LogitScore must follow the Transformer, got LogitScore, Identity",
    _formatted_elsewhere: "preprocess of Transformer was replaced on an instance",
    _other_output: "Transformer.module_output_name must be causal_logits, got logits",
    _another_states: "Transformer.modality_config must be",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_runs_in_sentence_transformers(change: Callable[[CrossEncoder], None]) -> None:
    assert_runs_in_stock(FastCrossEncoder(make_reranker()), change, PAIRS, REFUSED[change])


def test_capped_logits_run_in_sentence_transformers() -> None:
    stock = make_reranker("gemma3_text", final_logit_softcapping=2.0)
    model = FastCrossEncoder(stock)
    assert np.array_equal(model.predict(PAIRS), stock.predict(PAIRS))
    assert model.stats.fallbacks == {"config.final_logit_softcapping is set": 1}


def test_padding_on_the_right_fails_as_in_sentence_transformers() -> None:
    model = FastCrossEncoder(make_reranker())
    model.tokenizer.padding_side = "right"
    with pytest.raises(ValueError, match="causal models require left padding"):
        model.predict(PAIRS)
    assert model.stats.fallbacks == {"the tokenizer pads on the right": 1}


def test_a_template_without_the_pair_fails_as_in_sentence_transformers() -> None:
    template = "a{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    stock = make_reranker(template=template)
    with pytest.raises(ValueError, match="cannot carry a 'query'/'document' pair") as theirs:
        stock.predict(PAIRS)
    with pytest.raises(ValueError) as ours:
        FastCrossEncoder(stock).predict(PAIRS)
    assert str(ours.value) == str(theirs.value)


def test_pairs_without_tokens_are_refused() -> None:
    stock = make_reranker(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match=r"inputs\[2\] must have tokens, got none"):
        FastCrossEncoder(stock).predict([*PAIRS[:2], ("", "")])


@pytest.mark.parametrize("inputs", ["a text", [[{"role": "query", "content": "a"}]]], ids=str)
def test_other_inputs_run_in_sentence_transformers(inputs: Any) -> None:
    model = FastCrossEncoder(make_reranker())
    assert np.array_equal(model.predict(inputs), as_stock(model).predict(inputs))
    assert sum(model.stats.fallbacks.values()) == 1


def test_scores_that_are_not_finite_are_refused() -> None:
    model = FastCrossEncoder(make_reranker())
    model[0].model.lm_head.weight.data[57] = float("nan")
    with pytest.raises(NonFiniteEmbeddingError, match="for inputs"):
        model.predict(PAIRS[:3])
