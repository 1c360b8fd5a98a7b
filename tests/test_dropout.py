"""Dropout: which attention weights stay, gradients with them, and models in training mode."""

from __future__ import annotations

import copy
import math
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
from sbert_fast.testing import assert_close_to_oracle, pack_lengths
from test_training import LIKE_BERT, loss, train

CPU = torch.device("cpu")
SEED = torch.tensor([0x123456789ABCDEF])
RATE = 0.3
every_impl = pytest.mark.parametrize("impl", ["reference", "cpu"])


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], seed: int, expected: tuple[int, ...]) -> None:
    """Those of Random123."""
    words = dropout.philox(tuple(torch.tensor([word]) for word in counter), torch.tensor([seed]))
    assert tuple(int(word) for word in words) == expected


def weights_of(
    impl: str, lengths: list[int], heads: int = 4, dim: int = 64, **options: Any
) -> list[Tensor]:
    """The weights `[H, L, L]` of every sequence, of queries that are zero: values are unit vectors,
    so that token i attends to weight j in its dim j."""
    tokens = sum(lengths)
    qkv = torch.zeros(tokens, 3, heads, dim)
    positions = torch.cat([torch.arange(length) for length in lengths])
    qkv[torch.arange(tokens), 2, :, positions] = 1
    out = ops.varlen_attention(qkv, pack_lengths(lengths), max(lengths), impl=impl, **options)
    parts = out.split(lengths)
    return [part.transpose(0, 1)[:, :, :n] for part, n in zip(parts, lengths, strict=True)]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"causal": True}], ids=str)
def test_the_mask_is_that_of_the_reference(options: dict[str, Any]) -> None:
    lengths, first = [1, 37, 64, 6], 0
    dropped = weights_of("cpu", lengths, dropout=RATE, seed=SEED, **options)
    whole = weights_of("reference", lengths, **options)
    for length, ours, plain in zip(lengths, dropped, whole, strict=True):
        rows = torch.arange(first, first + length)[None]
        stay = dropout.kept(RATE, SEED, rows, 4, length)[0]
        torch.testing.assert_close(ours, plain * stay / (1 - RATE))
        first += length


def test_the_mask_has_no_pattern() -> None:
    """Shares and correlations within four standard deviations, of a fixed seed."""
    stay = dropout.kept(RATE, SEED, torch.arange(256)[None], 8, 256)[0].double()
    spread = math.sqrt(RATE * (1 - RATE))
    for dims in [(0, 1, 2), (1, 2), (0, 2), (0, 1)]:
        mean = stay.mean(dims)
        count = stay.numel() / mean.numel()
        # Of several shares, the largest deviation: a little more than of one.
        most = 4 + math.log10(mean.numel())
        assert ((mean - (1 - RATE)).abs() <= most * spread / math.sqrt(count)).all()
    centred = (stay - (1 - RATE)) / spread
    others = [centred.roll(1, dim) for dim in range(3)] + [centred.transpose(1, 2)]
    other_seed = dropout.kept(RATE, SEED + 1, torch.arange(256)[None], 8, 256)[0].double()
    for other in (*others, (other_seed - (1 - RATE)) / spread):
        assert (centred * other).mean().abs() <= 4 / math.sqrt(stay.numel())


@every_impl
def test_the_seed_is_that_of_torch(impl: str) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(weights_of(impl, [64], dropout=RATE)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@every_impl
def test_no_dropout_changes_no_bit(impl: str) -> None:
    torch.manual_seed(0)
    cu = pack_lengths([50, 7])
    qkv = torch.randn(57, 3, 2, 32, requires_grad=True)
    before, results = torch.get_rng_state(), []
    for options in ({}, {"dropout": 0.0, "seed": SEED}, {"dropout": 0}):
        out = ops.varlen_attention(qkv, cu, 50, impl=impl, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))
    assert torch.equal(torch.get_rng_state(), before)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dropout": 1.0}, ValueError, "dropout must be less than 1, got 1"),
    ({"dropout": -0.1}, ValueError, "dropout must be a finite number of at least 0, got -0.1"),
    ({"dropout": True}, TypeError, "dropout must be a number"),
    ({"dropout": 0.1, "seed": 7}, TypeError, "seed must be a torch.Tensor, got int"),
    ({"dropout": 0.1, "seed": torch.zeros(1)}, TypeError, "seed must be int64"),
    ({"dropout": 0.1, "seed": torch.zeros(2).long()}, ValueError, r"seed must have shape \[1\]"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=str)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weights_of("reference", [3], **options)


@pytest.mark.parametrize(
    ("rate", "seed", "message"),
    [
        (1.0, SEED, r"dropout must be in \[0, 1\), got 1"),
        (0.1, None, "seed must be given with dropout, got None"),
        (0.1, SEED.int(), "seed must be contiguous int64"),
    ],
)
def test_the_kernels_check_again(rate: float, seed: Tensor | None, message: str) -> None:
    qkv, cu = torch.zeros(8, 3, 2, 16), pack_lengths([8])
    forward = torch.ops.sbert_fast.varlen_attention.cpu
    backward = torch.ops.sbert_fast.varlen_attention_backward.cpu
    how: Any = {"dropout": rate, "seed": seed}
    with pytest.raises(RuntimeError, match=f"^varlen_attention: {message}"):
        forward(qkv, cu, 8, 1.0, None, -1, None, None, None, **how)
    with pytest.raises(RuntimeError, match=f"^varlen_attention_backward: {message}"):
        backward(qkv[:, 0].contiguous(), qkv, cu, 8, 1.0, None, -1, **how)


# Models


def set_rates(model: Any, hidden: float, weights: float) -> None:
    """The rates of all modules of dropout; those of attention weights lie beside projections."""
    for module in model.modules():
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
    weights = torch.softmax(query @ key.mT * scaling, dim=-1)
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
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "masked", eager_mask)

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


MASKS = 4
CASES = [(name, same_rates) for name in LIKE_BERT] + [("bert", other_rates)]


@pytest.mark.parametrize(("name", "change"), CASES)
def test_every_gradient(
    name: str, change: Callable[[Any], None], materialised: Callable[[Any], Any]
) -> None:
    original, model = pair(name)
    for each in (original, model):
        change(each.train())
    peer = materialised(original)
    oracle = copy.deepcopy(original).double()
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
    call(model, families.make_batch("bert", LENGTHS)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def checkpointed(model: Any, batch: Any, reentrant: bool = False) -> Tensor:
    def run(_: Tensor) -> Tensor:
        return loss(model, batch)

    return checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=reentrant)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_checkpoint_replays_the_masks() -> None:
    _, model = pair("bert")
    plain = trained(model.train())
    assert equal(trained(model, checkpointed), plain)
    assert not equal(plain, trained(model.eval()))
    assert counts(model) == {"packed": 4}


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
    "modernbert": ({"attention_dropout": 0.3}, "training mode with dropout"),
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
    batch = families.make_batch("bert", lengths := [9, 5, 12, 3])
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


def test_steps_of_training_lead_where_the_originals_lead() -> None:
    original = families.make_model("bert", num_hidden_layers=2).train()
    stock = [last_loss(copy.deepcopy(original), seed) for seed in range(5)]
    models = [accelerate(copy.deepcopy(original)) for _ in range(3)]
    ours = [last_loss(model, seed) for seed, model in enumerate(models)]
    assert min(stock) <= sum(ours) / len(ours) <= max(stock)
    assert all(counts(model) == {"packed": 30} for model in models)
