"""Dropout of models in training mode: what they drop, their gradients, and where they lead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import families
from patched import LENGTHS, pair
from sbert_fast import accelerate, ops
from sbert_fast.ops import dropout
from sbert_fast.patching import counts
from sbert_fast.testing import assert_close_to_oracle
from test_training import NAMES, exact, loss, train

CPU = torch.device("cpu")
RATE = 0.3


def set_rates(model: Any, hidden: float, weights: float) -> None:
    """The rates of all modules of dropout; those of attention weights lie beside projections, or
    are attributes."""
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = weights
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                of_weights = name == "attention_dropout" or (
                    name == "dropout" and {"query", "q", "q_lin"} & set(module._modules)
                )
                child.p = weights if of_weights else hidden


def weight_mask(weights: Tensor, rate: float) -> Tensor:
    """That of the packed pass, of weights `[1, H, S, S]`."""
    rows = torch.arange(weights.shape[2])[None]
    stay = dropout.kept(rate, ops.draw_seed(CPU), rows, weights.shape[1], weights.shape[3])
    return weights * stay / (1 - rate)


def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    scores = query @ key.mT * scaling
    weights = torch.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
    weights = weight_mask(weights, dropout) if dropout else weights
    return (weights @ value).transpose(1, 2).contiguous(), weights


def masked(module: nn.Dropout, x: Tensor) -> Tensor:
    if not module.training or module.p == 0:
        return x
    if x.dim() == 4:  # weights of MPNet
        return weight_mask(x, module.p)
    return x * F.dropout(torch.ones(x.shape), module.p)  # drawn in fp32, as the packed pass does


@pytest.fixture
def materialised(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Makes a model drop what the packed pass of one text drops, whatever its dtype."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "masked", masked_attention)
    # There transformers looks whether an attention takes masks.
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "masked", eager_mask)

    def change(model: Any) -> Any:
        model.config._attn_implementation = "masked"
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.forward = partial(masked, module)
        return model

    return change


def same_rates(model: Any) -> None:
    set_rates(model, 0.1, RATE)


def other_rates(model: Any) -> None:
    """Of some modules, and other modes: attention drops in its own."""
    set_rates(model, 0.1, RATE)
    first, second, third = model.encoder.layer
    model.embeddings.dropout.eval()
    first.output.dropout.p = 0.5
    second.attention.output.dropout.p = 0
    second.attention.self.dropout.eval()
    third.attention.self.training = False


def other_attributes(model: Any) -> None:
    """As `other_rates`, where the rates of attention are attributes."""
    set_rates(model, 0.1, RATE)
    first, second, third = model.layers
    model.embeddings.dropout.eval()
    first.post_mlp_dropout.p = 0.5
    second.self_attn.attention_dropout = 0.0
    third.self_attn.training = False


MASKS = 4
# Where the config has none; ModernBERT has a module less then.
RATES = {"modernbert": {"attention_dropout": RATE}, "qwen3": {"attention_dropout": RATE}}
CASES = [(name, same_rates) for name in NAMES]
CASES += [("bert", other_rates), ("nomic_bert", other_attributes)]


@pytest.mark.parametrize(
    ("name", "change"), [case for case in CASES if case[0] in families.VARIANTS]
)
def test_every_gradient(
    name: str, change: Callable[[Any], None], materialised: Callable[[Any], Any]
) -> None:
    original, model = pair(name, **RATES.get(name, {}))
    for each in (original, model):
        change(each.train())
    peer = materialised(original)
    oracle = exact(original)
    for module in oracle.modules():
        if isinstance(module, nn.Dropout):
            module.forward = partial(masked, module)
    batch, results = families.make_batch(name, [40]), []
    for each in (model, oracle, peer):
        torch.manual_seed(5)
        results.append([train(each, batch) for _ in range(MASKS)])
    # What rounding does depends on the masks: the bound is that of several.
    for key in results[0][0]:
        some = (torch.cat([gradients[key] for gradients in result]) for result in results)
        assert_close_to_oracle(*some, torch.float32)
    assert counts(model) == {"packed": MASKS}


def trained(model: Any, call: Callable[[Any, Any], Tensor] = loss) -> list[Tensor]:
    """The gradients of a batch, of a seed."""
    model.zero_grad()
    torch.manual_seed(3)
    call(model, families.make_batch(model.config.model_type, LENGTHS)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def checkpointed(model: Any, batch: Any, reentrant: bool = False) -> Tensor:
    def run(_: Tensor) -> Tensor:
        return loss(model, batch)

    return checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=reentrant)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["bert", *RATES])
def test_a_checkpoint_replays_the_masks(name: str) -> None:
    _, model = pair(name, **RATES.get(name, {}))
    plain = trained(model.train())
    assert equal(trained(model, checkpointed), plain)
    assert not equal(plain, trained(model.eval()))
    assert counts(model) == {"packed": 4}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [n for n in NAMES if "albert" not in n and n != "mpnet"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_replays_the_masks(name: str, use_reentrant: bool) -> None:
    _, model = pair(name, **RATES.get(name, {}))
    plain = trained(model.train())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert equal(trained(model), plain)
    assert counts(model) == {"packed": 2}


def test_what_ran_without_gradients_is_computed_again_by_the_original() -> None:
    """A reentrant checkpoint: its first run records nothing, and drops as the original does."""
    results = []
    for model in (models := pair("bert")):
        results.append(trained(model.train(), partial(checkpointed, reentrant=True)))
    assert equal(*results)
    again = "gradients are recorded: a backward pass computes anew what dropout has changed"
    assert counts(models[1]) == {"training mode with dropout": 1, again: 1}


REFUSED: dict[str, tuple[dict[str, float], str]] = {
    "bert": (
        {"attention_probs_dropout_prob": 1.0},
        "gradients are recorded: dropout leaves no attention weights",
    ),
    "deberta-v2": ({"attention_probs_dropout_prob": 0.3}, "training mode with dropout"),
}


@pytest.mark.parametrize("name", [name for name in REFUSED if name in families.VARIANTS])
def test_other_dropout_runs_the_original(name: str) -> None:
    overrides, reason = REFUSED[name]
    original, model = pair(name, **overrides)
    batch, results = families.make_batch(name, LENGTHS), []
    for each in (original, model):
        torch.manual_seed(0)
        results.append(list(train(each.train(), batch).values()))
    assert equal(*results)
    assert counts(model) == {reason: 1}


def last_loss(model: Any, seed: int, steps: int = 30) -> float:
    """The loss of the last of some steps that teach a model to tell texts apart."""
    batch = families.make_batch(model.config.model_type, lengths := [9, 5, 12, 3])
    targets = torch.arange(len(lengths)) % 2
    torch.manual_seed(seed)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-4), []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(**batch).last_hidden_state[:, 0, :2]
        losses.append(F.cross_entropy(logits, targets))
        losses[-1].backward()
        optimizer.step()
    return float(torch.stack(losses[-10:]).detach().mean())


@pytest.mark.parametrize("name", ["bert", *RATES])
def test_steps_of_training_lead_where_the_originals_lead(name: str) -> None:
    original = families.make_model(name, num_hidden_layers=2, **RATES.get(name, {})).train()
    stock = [last_loss(copy.deepcopy(original), seed) for seed in range(5)]
    models = [accelerate(copy.deepcopy(original)) for _ in range(3)]
    ours = [last_loss(model, seed) for seed, model in enumerate(models)]
    assert min(stock) <= sum(ours) / len(ours) <= max(stock)
    assert all(counts(model) == {"packed": 30} for model in models)
