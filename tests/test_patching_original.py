"""What the packed path does not do runs in the original forward, and is counted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import families
from checks import assert_same_vectors
from patched import (
    LENGTHS,
    Batch,
    assert_identical,
    assert_raises_as_original,
    assert_same_states,
    pair,
    run,
)
from sbert_fast import accelerate
from sbert_fast.errors import InvalidWeightsError
from sbert_fast.patching import counts


def _left_padded(batch: Batch) -> Batch:
    return {name: tensor.flip(1) for name, tensor in batch.items()}


def _fully_masked_row(batch: Batch) -> Batch:
    mask = batch["attention_mask"].clone()
    mask[2] = 0
    return batch | {"attention_mask": mask}


def _mask_4d(batch: Batch) -> Batch:
    mask = batch["attention_mask"].bool()
    return batch | {"attention_mask": mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)}


REASONS: dict[str, tuple[Callable[[Batch], Batch], str]] = {
    "left padding": (_left_padded, "the first token of a row is masked"),
    "empty row": (_fully_masked_row, "the first token of a row is masked"),
    "4-D mask": (_mask_4d, "attention_mask is not a tensor [B, S]"),
    "attentions": (lambda b: b | {"output_attentions": True}, "output_attentions was asked for"),
    "unknown": (lambda b: b | {"is_causal": False}, "is_causal was given"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_the_packed_path_lacks_runs_in_the_original(case: str) -> None:
    change, reason = REASONS[case]
    original = families.make_model("bert", attn_implementation="eager")
    model = accelerate(copy.deepcopy(original))
    batch = change(families.make_batch("bert", LENGTHS))
    assert_identical(run(model, batch), run(original, batch))
    assert counts(model) == {reason: 1}
    run(model, families.make_batch("bert", LENGTHS))
    assert counts(model) == {reason: 1, "packed": 1}


def test_a_flag_of_the_config() -> None:
    original = families.make_model("bert", attn_implementation="eager", output_attentions=True)
    model = accelerate(copy.deepcopy(original))
    batch = families.make_batch("bert", LENGTHS)
    assert_identical(run(model, batch), run(original, batch))
    assert counts(model) == {"output_attentions was asked for": 1}
    ours, theirs = (run(m, batch | {"output_attentions": False}) for m in (model, original))
    assert_same_states(ours, theirs, batch["attention_mask"])
    assert counts(model)["packed"] == 1


def _ids(*values: int) -> Batch:
    return {"input_ids": torch.tensor([values])}


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("bert", _ids(*[7] * 65)),
        ("roberta", _ids(*[7] * 65)),
        ("bert", _ids(7, 10_000)),
        ("bert", _ids(7, 2**32 + 7)),
        ("bert", _ids(7, -1)),
        ("bert", _ids(7, 7, 7) | {"position_ids": torch.tensor([[0, 1, 64]])}),
        ("bert", _ids(7, 7, 7) | {"token_type_ids": torch.tensor([[0, 1, 2]])}),
        ("bert", _ids(7, 7, 7) | {"inputs_embeds": torch.ones(1, 3, 64)}),
        ("bert", {"input_ids": torch.tensor([7, 7, 7])}),
        ("bert", {}),
    ],
)
def test_invalid_inputs_raise_what_the_original_raises(name: str, batch: Batch) -> None:
    assert_raises_as_original(name, batch)


def test_training_with_dropout() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    outputs = []
    for m in (original, model):
        torch.manual_seed(0)
        outputs.append(run(m.train(), batch))
    assert_identical(outputs[1], outputs[0])
    assert counts(model) == {"training mode with dropout": 1}


def test_training_mode_without_dropout() -> None:
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    original, model = pair("bert", **dropouts)
    batch = families.make_batch("bert", LENGTHS)
    assert_same_states(run(model.train(), batch), run(original, batch), batch["attention_mask"])
    assert counts(model) == {"packed": 1}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("bert", {"attention_probs_dropout_prob": 0.4}),
        ("roberta", {"attention_probs_dropout_prob": 0.4}),
        ("electra", {"attention_probs_dropout_prob": 0.4}),
        ("distilbert", {"attention_dropout": 0.4}),
        ("modernbert", {"attention_dropout": 0.4}),
    ],
)
@pytest.mark.parametrize("without_modules", [False, True])
def test_training_that_drops_attention_weights_alone(
    name: str, overrides: dict[str, float], without_modules: bool
) -> None:
    """ModernBERT's rate is an attribute of the attention, which no module of dropout shows."""
    rates = {"hidden_dropout_prob": 0.0} if "prob" in str(overrides) else {"dropout": 0.0}
    original, model = pair(name, **rates | overrides)
    for module in [*original.modules(), *model.modules()] if without_modules else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch, outputs = families.make_batch(name, LENGTHS), []
    for m in (original, model):
        torch.manual_seed(0)
        outputs.append(run(m.train(), batch))
    if without_modules and name != "modernbert":
        assert_same_states(outputs[1], outputs[0], batch["attention_mask"])
        assert counts(model) == {"packed": 1}
        return
    assert_identical(outputs[1], outputs[0])
    assert counts(model) == {"training mode with dropout": 1}


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_inside_the_model_are_called(register: str) -> None:
    _, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    called: list[nn.Module] = []
    layer = model.encoder.layer[1].attention
    handle = getattr(layer, register)(lambda module, *_: called.append(module))
    run(model, batch)
    assert called == [layer]
    assert counts(model) == {"BertAttention has forward hooks": 1}
    handle.remove()
    run(model, batch)
    assert counts(model)["packed"] == 1


def test_hooks_around_the_model_do_not_slow_it_down() -> None:
    _, model = pair("bert")
    called: list[str] = []
    model.register_forward_hook(lambda *_: called.append("model"))
    model.pooler.register_forward_hook(lambda *_: called.append("pooler"))
    run(model, families.make_batch("bert", LENGTHS))
    assert called == ["pooler", "model"]
    assert counts(model) == {"packed": 1}


def test_replaced_forward_of_a_submodule_is_called() -> None:
    _, model = pair("bert")
    called: list[int] = []
    layer = model.encoder.layer[1]
    forward = layer.forward

    def traced(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return forward(*args, **kwargs)

    layer.forward = traced
    run(model, families.make_batch("bert", LENGTHS))
    assert called == [1]
    assert counts(model) == {"forward of BertLayer was replaced on an instance": 1}


def test_autocast() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(run(model, batch), run(original, batch))
    assert counts(model) == {"torch.autocast is on": 1}


def test_trainable_pooler_on_a_frozen_encoder() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    for m in (original, model):
        m.requires_grad_(False)
        m.pooler.requires_grad_(True)
        m(**batch).pooler_output.sum().backward()
    assert_same_vectors(model.pooler.dense.weight.grad, original.pooler.dense.weight.grad)
    assert counts(model) == {"packed": 1}


def test_weights_that_are_not_finite() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    run(model, batch)
    weight = model.encoder.layer[0].output.dense.bias
    value = weight[0].item()
    with torch.no_grad():
        weight[0] = float("nan")
    for _ in range(2):
        with pytest.raises(InvalidWeightsError, match=r"encoder\.layer\.0\.output\.dense\.bias"):
            run(model, batch)
    with torch.no_grad():
        weight[0] = value
    assert_same_states(run(model, batch), run(original, batch), batch["attention_mask"])
    assert counts(model) == {"packed": 2}


def test_weights_that_the_packed_path_no_longer_takes(caplog: pytest.LogCaptureFixture) -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    run(model, batch)
    for m in (original, model):
        m.adapter = torch.nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, logger="sbert_fast"):
        assert_identical(run(model, batch), run(original, batch))
    reason = "the model is no longer supported: unknown parameter 'adapter.weight' (an adapter?)"
    assert counts(model) == {"packed": 1, reason: 1}
    assert reason in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compile_trace_and_export_capture_the_original() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", [5, 9])
    expected = run(original, batch).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    arguments = (batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        assert torch.equal(compiled(**batch).last_hidden_state, expected)
        traced = torch.jit.trace(model, arguments, strict=False, check_trace=False)
        assert_same_vectors(traced(*arguments)["last_hidden_state"], expected)
        exported = torch.export.export(model, (), batch).module()
        assert_same_vectors(exported(**batch).last_hidden_state, expected)
    assert counts(model) == {}
