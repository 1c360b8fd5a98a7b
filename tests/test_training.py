"""Training runs packed: every gradient is the original's, where what is not served trains."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import families
from checks import assert_same_vectors
from patched import LENGTHS, Batch, pair, run
from sbert_fast import FastEncoder, accelerate
from sbert_fast.models import llama
from sbert_fast.models.base import Norm
from sbert_fast.patching import counts

VARIANTS = (
    "bert-gelu-new",
    "bert-head-dim-26",
    "albert-pairs-of-layers",
    "electra-projection",
    "qwen3-one-head-of-keys",
)
NAMES = [
    name
    for name in families.VARIANTS
    if name in VARIANTS or (name in families.FAMILIES and name != "deberta-v2")
]
NOTHING = nullcontext()
PARTS = re.compile(r"\.(query|key|value|[qkv](_lin|_proj)?)\.(base_layer\.|parametrizations\.)?")


def loss(model: Any, batch: Batch) -> Tensor:
    """Of the states of all tokens that are not masked, and of the pooler, where there is one."""
    output = model(**batch)
    states = output.last_hidden_state
    g = torch.Generator().manual_seed(1)
    factors = torch.randn(states.shape, generator=g) * batch["attention_mask"][:, :, None]
    total = (states * factors.to(states.dtype)).sum()
    pooled = output.get("pooler_output")
    return total if pooled is None else total + pooled.square().sum()


def train(
    model: Any, batch: Batch, around: AbstractContextManager[Any] = NOTHING
) -> dict[str, Tensor]:
    """The gradients by parameter, those of queries, keys and values side by side: that of the bias
    of keys is zero, and nothing but rounding. The forward pass runs in a context."""
    model.zero_grad()
    with around:
        total = loss(model, batch)
    total.backward()
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(PARTS.sub(".qkv.", name), []).append(parameter.grad.flatten())
    return {name: torch.cat(some) for name, some in parts.items()}


def exact(original: Any) -> Any:
    """A copy that computes in fp64 throughout: RMSNorms of transformers compute in fp32."""
    model = copy.deepcopy(original).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, llama._norm(module))
    return model


def rms_norm(norm: Norm, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight + norm.shift, norm.eps)


# A module that is a function's first argument would be taken for the caller that waits for states.
def check_gradients(batch: Batch, original: Any, model: Any) -> None:
    """Every gradient within the 2x rule: the oracle is the original in fp64, the peer in fp32.

    Whole gradients are compared: which of their many elements is worst is chance.
    """
    ours, peer = train(model, batch), train(original, batch)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    expected = train(exact(original), wide)
    assert ours.keys() == peer.keys() == expected.keys()
    for name, gradient in ours.items():
        error, allowed = ((each[name] - expected[name]).norm() for each in (ours, peer))
        band = torch.finfo(gradient.dtype).eps * expected[name].norm()
        assert error <= 2 * (allowed + band), f"{name}: error {error:.3e}, stock's {allowed:.3e}"


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient(name: str) -> None:
    original, model = pair(name)
    check_gradients(families.make_batch(name, LENGTHS), original, model)
    assert counts(model) == {"packed": 1}


def test_training_mode_without_dropout() -> None:
    original, model = pair("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    check_gradients(families.make_batch("bert", LENGTHS), original.train(), model.train())
    assert counts(model) == {"packed": 1}


FROZEN: list[Callable[[Any], Any]] = [
    lambda model: model.embeddings,
    lambda model: model.embeddings.word_embeddings,
    lambda model: model.encoder.layer[:2],
    lambda model: model.encoder.layer[1].attention.output.LayerNorm,
    lambda model: model.encoder.layer[2].intermediate,
    lambda model: model.encoder.layer[2].attention.self.key,
]


@pytest.mark.parametrize("part", FROZEN)
def test_frozen_parts_have_no_gradient(part: Callable[[Any], Any]) -> None:
    original, model = pair("bert")
    for each in (original, model):
        part(each).requires_grad_(False)
    check_gradients(families.make_batch("bert", LENGTHS), original, model)
    assert counts(model) == {"packed": 1}


def test_settings_changed_after_loading() -> None:
    original, model = pair("roberta")
    for each in (original, model):
        each.embeddings.padding_idx = 5
    check_gradients(families.make_batch("roberta", [5, 9, 20]), original, model)
    assert counts(model) == {"packed": 1}


def test_padding_tokens_in_a_text_have_no_gradient() -> None:
    original, model = pair("roberta")
    batch = families.make_batch("roberta", LENGTHS)
    batch["input_ids"][4, 9] = original.config.pad_token_id
    check_gradients(batch, original, model)
    table = model.embeddings.word_embeddings.weight
    assert not table.grad[original.config.pad_token_id].any()


def test_states_between_the_layers_have_gradients() -> None:
    original, model = pair("bert")
    batch, gradients = families.make_batch("bert", LENGTHS), []
    for each in (original, model):
        output = each(**batch, output_hidden_states=True)
        output.hidden_states[1].retain_grad()
        output.last_hidden_state[:, 0].square().sum().backward()
        gradients.append(output.hidden_states[1].grad)
    assert torch.equal(*gradients)
    reason = "gradients are recorded: not of states between the layers"
    assert counts(model) == {reason: 1}


def test_checkpointed_calls() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    gradients = []
    for each in (original, model):
        checkpoint(partial(loss, each, batch), use_reentrant=False).backward()
        gradients.append(each.embeddings.word_embeddings.weight.grad)
    assert_same_vectors(gradients[1].flatten()[None], gradients[0].flatten()[None])


def test_weights_that_are_not_finite_reach_no_other_token() -> None:
    """The row of a token that no text holds."""
    _, model = pair("bert")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0] = torch.nan
    model(input_ids=torch.randint(5, 40, (2, 9))).last_hidden_state.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert counts(model) == {"packed": 1}


@pytest.mark.parametrize("name", [n for n in ("bert", "gemma3_text") if n in families.VARIANTS])
def test_embeddings_that_are_given(name: str) -> None:
    """A model that scales its embeddings scales none that are given."""
    original, model = pair(name)
    batch = families.make_batch(name, LENGTHS)
    embeddings = original.get_input_embeddings()(batch.pop("input_ids")).detach()
    check_gradients(batch | {"inputs_embeds": embeddings}, original, model)
    assert counts(model) == {"packed": 1}


def test_accumulated_gradients_add_up() -> None:
    _, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    once = {name: g.clone() for name, g in train(model, batch).items()}
    loss(model, batch).backward()
    table = model.embeddings.word_embeddings.weight.grad
    assert torch.equal(table.flatten(), 2 * once["embeddings.word_embeddings.weight"])


def test_steps_of_an_optimizer_are_followed() -> None:
    original, model = pair("distilbert")
    batch = families.make_batch("distilbert", LENGTHS)
    for each in (original, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss(each, batch).backward()
            optimizer.step()
    keep = batch["attention_mask"].bool()
    ours, theirs = (run(each, batch).last_hidden_state[keep] for each in (model, original))
    assert_same_vectors(ours, theirs)
    assert counts(model) == {"packed": 4}


def _checkpointed(model: Any, **options: bool) -> None:
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train().gradient_checkpointing_enable(options)


def _checkpointed_without_records(model: Any) -> None:
    """No layer has gradients then."""
    _checkpointed(model, use_reentrant=True)
    model.disable_input_require_grads()
    model.embeddings.requires_grad_(False)


def _recording(model: Any) -> None:
    model.enable_input_require_grads()
    (hook,) = model.embeddings.word_embeddings._forward_hooks.values()
    model.embeddings.register_forward_hook(hook)


REFUSED: list[tuple[str, Callable[[Any], object], str]] = [
    (
        "bert",
        partial(_checkpointed, use_reentrant=False, preserve_rng_state=False),
        "gradient checkpointing is more than torch's",
    ),
    (
        "bert",
        _checkpointed_without_records,
        "reentrant checkpoints of embeddings that record none leave out the layers",
    ),
    (
        "bert",
        lambda m: m.encoder.layer[0].register_full_backward_hook(lambda *_: None),
        "BertLayer has backward hooks",
    ),
    ("bert", _recording, "a hook makes states record them"),
    ("deberta-v2", lambda m: None, "varlen_attention has no backward with position_keys yet"),
]


@pytest.mark.parametrize(
    ("name", "change", "reason"), [case for case in REFUSED if case[0] in families.VARIANTS]
)
def test_what_is_not_served_trains_in_the_original(
    name: str, change: Callable[[Any], object], reason: str
) -> None:
    original, model = pair(name)
    batch, results = families.make_batch(name, LENGTHS), []
    for each in (original, model):
        change(each)
        results.append(train(each, batch))
    for ours, theirs in zip(*map(dict.values, results), strict=True):
        assert torch.equal(ours, theirs)
    assert list(counts(model)) == [f"gradients are recorded: {reason}"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_embeddings_that_are_given_to_reentrant_checkpoints() -> None:
    """The original trains no layer where they record no gradients."""
    original, model = pair("bert")
    batch, results = families.make_batch("bert", LENGTHS), []
    embeddings = original.get_input_embeddings()(batch.pop("input_ids")).detach()
    for each in (original, model):
        _checkpointed(each, use_reentrant=True)
        results.append(train(each, batch | {"inputs_embeds": embeddings}))
    for ours, theirs in zip(*map(dict.values, results), strict=True):
        assert torch.equal(ours, theirs)
    reason = "reentrant checkpoints of embeddings that record none leave out the layers"
    assert counts(model) == {f"gradients are recorded: {reason}": 1}


def test_a_sentence_transformer_trains_packed() -> None:
    stock = families.make_sentence_transformer("bert")
    model = accelerate(copy.deepcopy(stock))
    gradients = []
    for each in (stock, model):
        vectors = each(each.preprocess(families.make_texts(8)))["sentence_embedding"]
        (vectors @ vectors.T).square().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    for name, theirs in gradients[0].items():
        ours = gradients[1][name]
        assert (ours is None) == (theirs is None), name
        if theirs is not None and ".key.bias" not in name:
            assert_same_vectors(ours.flatten()[None], theirs.flatten()[None])
    assert counts(model) == {"packed": 1}
    encoder = FastEncoder(model)
    encoder.encode(families.make_texts(3))
    assert not encoder.stats.fallbacks
