"""What padded calls ask for besides ids and a mask, beside the untouched model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import families
import sbert_fast
from checks import assert_same_vectors
from patched import (
    LENGTHS,
    Batch,
    assert_identical,
    assert_packed,
    assert_raises_as_original,
    assert_same_states,
    pair,
    run,
)
from sbert_fast import counts

DISTINCT = ("bert", "roberta", "distilbert", "electra", "electra-projection")
EMBEDDINGS = {"electra-projection": 40}


def _embeddings(batch: Batch, width: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (*batch["input_ids"].shape, width)
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    return rest | {"inputs_embeds": torch.randn(shape, generator=generator)}


def test_counts_is_exported() -> None:
    assert "counts" in sbert_fast.__all__
    assert sbert_fast.counts is sbert_fast.patching.counts


LOSS_ARGUMENTS = {
    "ignore_index": -1,
    "labels": torch.ones(5, dtype=torch.int64),
    "num_items_in_batch": torch.tensor(3),
    "output_router_logits": True,
    "shift_labels": torch.ones(5, 64, dtype=torch.int64),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("argument", LOSS_ARGUMENTS)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
def test_loss_arguments_change_nothing(name: str, argument: str, attention: str) -> None:
    original, model = pair(name, attn_implementation=attention)
    batch = families.make_batch(name, LENGTHS)
    given = batch | {argument: LOSS_ARGUMENTS[argument]}
    assert_identical(run(original, given), run(original, batch))
    assert_same_states(run(model, given), run(original, batch), batch["attention_mask"])
    assert counts(model) == {"packed": 1}


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("AutoModelForSequenceClassification", torch.tensor([0, 1, 1, 0, 1])),
        ("AutoModelForTokenClassification", None),
        ("AutoModelForMaskedLM", None),
    ],
)
@pytest.mark.parametrize("argument", ["num_items_in_batch", "shift_labels"])
def test_heads_with_labels_run_packed(head: str, labels: Any, argument: str) -> None:
    original, model = pair("bert", head=head)
    batch = families.make_batch("bert", LENGTHS)
    if labels is None:
        labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100).clamp(max=1)
    batch |= {"labels": labels, argument: LOSS_ARGUMENTS[argument]}
    ours, theirs = run(model, batch).loss, run(original, batch).loss
    torch.testing.assert_close(ours, theirs)
    assert counts(model) == {"packed": 1}


@pytest.mark.parametrize(
    "given",
    [
        {"is_causal": True},
        {"output_cross_attentions": True},
        {"cu_seq_lens_q": torch.tensor([0, 64])},
        {"max_length_q": 64},
        {"seq_idx": torch.zeros(1, 64)},
        {"position_bias": torch.ones(5, 4, 64, 64)},
        {"encoder_hidden_states": torch.ones(5, 3, 64)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_other_arguments_reach_the_original(given: Batch) -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS) | given
    assert_identical(run(model, batch), run(original, batch))
    assert counts(model) == {f"{next(iter(given))} was given": 1}


@pytest.mark.parametrize("name", DISTINCT)
def test_embeddings_run_packed(name: str) -> None:
    batch = _embeddings(families.make_batch(name, LENGTHS), EMBEDDINGS.get(name, 64))
    batch["attention_mask"][1, 5:30:3] = 0
    assert_packed(name, batch)
    assert_packed(name, batch | {"inputs_embeds": batch["inputs_embeds"].mT.contiguous().mT})
    assert_packed(name, batch | {"position_ids": torch.arange(64).flip(0)[None]})
    if name != "distilbert":
        types = (torch.arange(64) % 2).expand(5, -1)
        assert_packed(name, batch | {"token_type_ids": types})


def test_own_embeddings_are_the_ids() -> None:
    _, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    expected = run(model, batch)
    table = model.get_input_embeddings()
    given = {"inputs_embeds": table(batch["input_ids"]).detach()}
    assert_identical(run(model, given | {"attention_mask": batch["attention_mask"]}), expected)


def _with_nan(batch: Batch) -> Batch:
    batch["inputs_embeds"][1, 50] = float("nan")
    return batch


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with_nan, "inputs_embeds of masked tokens are not finite"),
        (
            lambda b: b | {"inputs_embeds": b["inputs_embeds"].requires_grad_()},
            "gradients of inputs_embeds are recorded",
        ),
    ],
    ids=["NaN", "gradients"],
)
def test_embeddings_that_the_original_takes(change: Callable[[Batch], Batch], reason: str) -> None:
    original, model = (m.requires_grad_(False) for m in pair("bert"))
    batch = change(_embeddings(families.make_batch("bert", LENGTHS)))
    ours, theirs = model(**batch).last_hidden_state, original(**batch).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert ours.requires_grad == theirs.requires_grad
    assert counts(model) == {reason: 1}


@pytest.mark.parametrize(
    "batch",
    [
        {"inputs_embeds": torch.ones(1, 65, 64)},
        {"inputs_embeds": torch.ones(1, 3, 63)},
        {"inputs_embeds": torch.ones(1, 3, 64, dtype=torch.float64)},
        {"inputs_embeds": torch.ones(1, 3, 64), "position_ids": torch.tensor([[0, 1, 64]])},
        {"inputs_embeds": torch.ones(1, 3, 64), "token_type_ids": torch.tensor([[0, 1, 2]])},
    ],
)
def test_embeddings_that_the_original_refuses(batch: Batch) -> None:
    assert_raises_as_original("bert", batch)


def _assert_same_layers(ours: Any, theirs: Any, keep: torch.Tensor) -> None:
    assert_same_states(ours, theirs, keep)
    keep = keep.bool()
    last = ours.hidden_states[-1]
    assert last is None or last is ours.last_hidden_state
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert (a is None) == (b is None)
        if b is None:
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert_same_vectors(a[keep], b[keep])
        assert not a[~keep].any()


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("name", DISTINCT)
def test_hidden_states_of_all_layers(name: str, in_config: bool) -> None:
    flag = {"output_hidden_states": True}
    original, model = pair(name, **(flag if in_config else {}))
    batch = families.make_batch(name, LENGTHS)
    given = batch if in_config else batch | flag
    _assert_same_layers(run(model, given), run(original, given), batch["attention_mask"])
    ours, theirs = (run(m, given | {"return_dict": False}) for m in (model, original))
    assert type(ours) is tuple
    assert [type(part) for part in ours] == [type(part) for part in theirs]
    for unset in (None, False):
        ours = run(model, batch | {"output_hidden_states": unset})
        assert_same_states(
            ours, run(original, batch | {"output_hidden_states": unset}), batch["attention_mask"]
        )
    assert counts(model) == {"packed": 4}


@pytest.mark.parametrize("asked", [2, [0, -1], (1, -9, 9), 0, [], 1, [1, 2]], ids=str)
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_hidden_states_of_some_layers(name: str, asked: Any) -> None:
    original, model = pair(name)
    batch = families.make_batch(name, LENGTHS) | {"output_hidden_states": asked}
    ours, theirs = run(model, batch), run(original, batch)
    if "hidden_states" in theirs:
        _assert_same_layers(ours, theirs, batch["attention_mask"])
    else:
        assert_same_states(ours, theirs, batch["attention_mask"])
    assert counts(model) == {"packed": 1}


def test_hidden_states_of_embeddings_a_head_and_fewer_layers() -> None:
    flag = {"output_hidden_states": True}
    original, model = pair("bert")
    for m in (original, model):
        m.encoder.layer = m.encoder.layer[1:]
    batch = _embeddings(families.make_batch("bert", LENGTHS))
    ours, theirs = run(model, batch | flag), run(original, batch | flag)
    _assert_same_layers(ours, theirs, batch["attention_mask"])
    original, model = pair("distilbert", head="AutoModelForSequenceClassification")
    batch = families.make_batch("distilbert", LENGTHS)
    ours, theirs = (run(m, batch | flag).hidden_states for m in (model, original))
    keep = batch["attention_mask"].bool()
    for a, b in zip(ours, theirs, strict=True):
        assert_same_vectors(a[keep], b[keep])
    assert counts(model) == {"packed": 1}


def _clear(model: Any) -> None:
    for module in model.modules():
        module._forward_hooks.clear()


def _append_fresh(model: Any) -> None:
    model.encoder.layer.append(type(model.encoder.layer[0])(model.config).eval())
    model.config.num_hidden_layers += 1


HOOKS: dict[str, Callable[[Any], Any]] = {
    "removed": _clear,
    "installed twice": lambda model: setattr(model, "_output_capturing_hooks_installed", False),
    "missing in one layer": _append_fresh,
}


@pytest.mark.parametrize("change", HOOKS)
def test_hooks_that_collect_hidden_states(change: str) -> None:
    """transformers installs them once, and takes no notice of what becomes of them."""
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS) | {"output_hidden_states": True}
    for m in (original, model):
        with torch.no_grad():
            type(m).forward(m, **batch)
        HOOKS[change](m)
    if change == "missing in one layer":
        model.load_state_dict(original.state_dict())
    ours, theirs = run(model, batch), run(original, batch)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert "packed" not in counts(model)
