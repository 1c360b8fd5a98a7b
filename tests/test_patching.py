"""accelerate: padded in, padded out, the same results as the untouched model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

import families
from checks import assert_same_vectors, cosine_distances
from patched import LENGTHS, assert_packed, assert_same_states, pair, run
from sbert_fast import accelerate, restore
from sbert_fast.patching import counts, forward_of
from sbert_fast.state import Snapshot
from sbert_fast.testing import assert_close_to_oracle


@pytest.mark.parametrize("name", families.VARIANTS)
def test_forward_gives_what_the_original_gives(
    name: str, launches: Callable[[], dict[tuple[str, str], int]]
) -> None:
    original, model = pair(name)
    batch = families.make_batch(name, LENGTHS)
    expected = run(original, batch)
    assert launches() == {}
    ours = run(model, batch)
    assert {op for op, _ in launches()} >= {"embed_norm", "varlen_attention"}
    assert_same_states(ours, expected, batch["attention_mask"])
    assert counts(model) == {"packed": 1}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, None])
def test_any_kind_of_2d_mask(dtype: torch.dtype | None) -> None:
    batch = families.make_batch("bert", [9, 9] if dtype is None else LENGTHS)
    mask = batch.pop("attention_mask")
    if dtype is not None:
        batch["attention_mask"] = mask.to(dtype)
    assert_packed("bert", batch)


@pytest.mark.parametrize("name", families.WITHOUT_DISTANCES)
def test_holes_in_the_mask(name: str) -> None:
    batch = families.make_batch(name, LENGTHS)
    batch["attention_mask"][0, 3:5] = 0
    batch["attention_mask"][1, 1:39:2] = 0
    batch["attention_mask"][4, 10] = 0
    assert_packed(name, batch)


@pytest.mark.parametrize(
    "name", [n for n in families.ROBERTA_LIKE if n in families.WITHOUT_DISTANCES]
)
def test_positions_follow_pad_tokens_and_not_the_mask(name: str) -> None:
    batch = families.make_batch(name, [20, 30, 30])
    batch["input_ids"][0, [4, 7]] = 1  # pads that the mask keeps
    batch["attention_mask"][1, 5:9] = 0  # other tokens that it drops
    batch["input_ids"][2, 12:14] = 1
    batch["attention_mask"][2, 12:20] = 0
    assert_packed(name, batch)


def test_wide_rectangles_of_short_texts() -> None:
    # Only tokens advance positions here, so the rectangle may be wider than the position table.
    assert_packed("roberta", families.make_batch("roberta", [5, 64], padded_to=80))


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("rows", [1, 3])
def test_given_positions_and_types(name: str, rows: int) -> None:
    batch = families.make_batch(name, [30, 12, 30])
    generator = torch.Generator().manual_seed(3)
    batch["position_ids"] = torch.randint(2, 60, (rows, 30), generator=generator)
    if name != "distilbert":
        batch["token_type_ids"] = torch.randint(0, 2, (3, 30), generator=generator)
    assert_packed(name, batch)


def test_token_types_mean_nothing_to_distilbert() -> None:
    batch = families.make_batch("distilbert", LENGTHS)
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    assert_packed("distilbert", batch)


@pytest.mark.parametrize("name", ["bert", "electra", "distilbert"])
def test_tuples(name: str) -> None:
    original, model = pair(name)
    batch = families.make_batch(name, LENGTHS)
    for set_up in ({"return_dict": False}, {}):
        if not set_up:
            model.config.return_dict = original.config.return_dict = False
        ours, theirs = run(model, batch | set_up), run(original, batch | set_up)
        assert type(ours) is type(theirs) is tuple
        assert len(ours) == len(theirs)
        keep = batch["attention_mask"].bool()
        assert_same_vectors(ours[0][keep], theirs[0][keep])
    assert counts(model) == {"packed": 2}


def test_positional_arguments() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    with torch.inference_mode():
        arguments = (batch["input_ids"], batch["attention_mask"])
        ours, theirs = model(*arguments), original(*arguments)
    assert_same_states(ours, theirs, batch["attention_mask"])
    assert counts(model) == {"packed": 1}


def test_without_a_pooler() -> None:
    original = families.randomize(BertModel(families.make_config("bert"), add_pooling_layer=False))
    model = accelerate(copy.deepcopy(original))
    batch = families.make_batch("bert", LENGTHS)
    ours = run(model, batch)
    assert_same_states(ours, run(original, batch), batch["attention_mask"])
    assert "pooler_output" not in ours


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_results_are_normal_tensors(mode: Callable[[], Any]) -> None:
    model = accelerate(families.make_model("bert"))
    with mode():
        hidden = model(**families.make_batch("bert", LENGTHS)).last_hidden_state
    assert not hidden.is_inference()
    head = nn.Linear(64, 2)
    head(hidden).sum().backward()  # saves `hidden` for the backward pass
    assert head.weight.grad is not None
    assert counts(model) == {"packed": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    keep = batch["attention_mask"].bool()
    expected = run(original, batch).last_hidden_state[keep]
    peer, ours = run(original.to(dtype), batch), run(model.to(dtype), batch)
    assert ours.last_hidden_state.dtype == ours.pooler_output.dtype == dtype
    bound = 2 * cosine_distances(peer.last_hidden_state[keep].float(), expected).max()
    assert cosine_distances(ours.last_hidden_state[keep].float(), expected).max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_compute_dtype_is_not_the_dtype_of_the_results(dtype: str | torch.dtype) -> None:
    model = accelerate(families.make_model("bert"), dtype=dtype, impl="reference")
    forward = forward_of(model)
    assert forward is not None
    output = run(model, families.make_batch("bert", LENGTHS))
    assert output.last_hidden_state.dtype == torch.float32
    assert forward.engine.prepared().target.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, "auto"])
@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_model_is_the_default(dtype: str | None, of_model: torch.dtype) -> None:
    model = accelerate(families.make_model("bert").to(of_model), dtype=dtype, impl="reference")
    assert model.forward.engine.prepared().target.dtype == of_model


def test_threads() -> None:
    original, model = pair("bert")
    batches = [families.make_batch("bert", LENGTHS, seed=seed) for seed in range(4)]
    outputs: list[Any] = [None] * len(batches)

    def work(index: int) -> None:
        outputs[index] = run(model, batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, output in zip(batches, outputs, strict=True):
        assert_same_states(output, run(original, batch), batch["attention_mask"])
    assert counts(model) == {"packed": len(batches)}


HEADS = {
    "AutoModelForMaskedLM": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForMultipleChoice": MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "AutoModelForNextSentencePrediction": MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


@pytest.mark.parametrize(
    ("name", "head"), [(n, h) for n in families.FAMILIES for h in HEADS if n in HEADS[h]]
)
def test_heads(name: str, head: str) -> None:
    labels = {"num_labels": 3} if "Sequence" in head else {}
    original = families.make_model(name, head=head, **labels)
    model = accelerate(copy.deepcopy(original), padding="zeros")
    batch = families.make_batch(name, 4 * LENGTHS)  # the worst of a few logits is left to chance
    keep = batch["attention_mask"].bool()
    if "Choice" in head:
        batch = {key: value[None] for key, value in batch.items()}
    try:
        peer = run(original, batch)
    except IndexError:
        pytest.skip("transformers 5.3 gives this head no pooler")
    ours, oracle = run(model, batch), run(original.double(), batch)
    for field in {"logits", "start_logits", "end_logits"} & peer.keys():
        # A few logits are no vector with a norm to hold them to: they have an oracle instead.
        logits = [each[field] for each in (ours, oracle, peer)]
        if logits[0].shape[:2] == keep.shape:
            logits = [each[keep] for each in logits]
        assert_close_to_oracle(*logits, torch.float32)
    assert counts(model) == {"packed": 1}


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_cross_encoder(name: str) -> None:
    model = families.make_cross_encoder(name, num_labels=2)
    texts = families.make_texts(12)
    pairs = list(zip(texts[:6], texts[6:], strict=True))
    oracle = copy.deepcopy(model).double().predict(pairs, convert_to_tensor=True)
    peer = model.predict(pairs, batch_size=4, convert_to_tensor=True)
    assert accelerate(model) is model
    ours = model.predict(pairs, batch_size=4, convert_to_tensor=True)
    assert_close_to_oracle(ours, oracle, peer, torch.float32)
    assert counts(model) == {"packed": 2}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_sentence_transformer(name: str) -> None:
    pooling = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
    model = families.make_sentence_transformer(name, pooling=pooling, normalize=False)
    texts = families.make_texts(20)
    expected = model.encode(texts, batch_size=8)
    accelerate(model)
    ours = model.encode(texts, batch_size=8)
    assert counts(model) == {"packed": 3}
    # Each pooling mode on its own, so that a large one cannot hide a small one.
    assert_same_vectors(ours.reshape(20, 6, 64), expected.reshape(20, 6, 64))
    tokens, expected_tokens = (
        m.encode(texts, output_value="token_embeddings") for m in (model, restore(model))
    )
    for a, b in zip(tokens, expected_tokens, strict=True):
        assert_same_vectors(a, b)


def test_sentence_transformer_with_left_padding() -> None:
    model = families.make_sentence_transformer("bert")
    model.tokenizer.padding_side = "left"
    texts = families.make_texts(8)
    expected = model.encode(texts)
    assert np.array_equal(accelerate(model).encode(texts), expected)


def test_a_call_compares_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("bert")
    batch, compared = families.make_batch("bert", LENGTHS), []
    run(model, batch)
    compare = Snapshot.is_current
    monkeypatch.setattr(Snapshot, "is_current", lambda s: compared.append(s) or compare(s))
    run(model, batch)
    assert len(compared) == 1 and counts(model) == {"packed": 2}
