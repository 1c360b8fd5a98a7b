"""Adapted linear layers train packed, as the model's own modules; what else is changed does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import families
from patched import LENGTHS, run
from sbert_fast import accelerate, restore
from sbert_fast.patching import counts
from sbert_fast.testing import assert_close_to_oracle
from test_training import check_gradients, train

TARGETS = ["query", "key", "value", "q_lin", "k_lin", "v_lin", "dense", "out_lin"]
Change = Callable[[Any], Any]


def lora(**options: Any) -> Change:
    settings = {"target_modules": TARGETS, "init_lora_weights": False, "lora_alpha": 1} | options
    return lambda model: peft.get_peft_model(model, peft.LoraConfig(**settings))


def adapter(config: str, **options: Any) -> Change:
    made = getattr(peft, config)(target_modules=TARGETS, **options)
    return lambda model: peft.get_peft_model(model, made)


def of_linears(change: Callable[[nn.Linear], object]) -> Change:
    def act(model: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "pooler" not in name:
                change(module)
        return model

    return act


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


ADAPTED: dict[str, Change] = {
    "LoRA": lora(),
    "LoRA and biases": lora(bias="all"),
    "DoRA": lora(use_dora=True),
    "merged LoRA": lambda m: (a := lora(bias="all")(m), a.merge_adapter())[0],
    "IA3": adapter("IA3Config", feedforward_modules=["dense"], init_ia3_weights=False),
    "LoHa": adapter("LoHaConfig", init_weights=False),
    "LoKr": adapter("LoKrConfig", init_weights=False),
    "weight_norm": of_linears(parametrizations.weight_norm),
    "old weight_norm": of_linears(nn.utils.weight_norm),
    "spectral_norm": of_linears(parametrizations.spectral_norm),
    "pruned": of_linears(lambda m: prune.random_unstructured(m, "weight", 0.3)),
    "own": of_linears(lambda m: parametrize.register_parametrization(m, "bias", Doubled())),
}
CASES = [("bert", kind) for kind in ADAPTED] + [
    (name, "LoRA") for name in ("distilbert", "mpnet", "albert", "electra-projection")
]


def make(name: str, change: Change, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return change(families.make_model(name, **arguments))


def without_dropout(model: Any) -> Any:
    """In training mode; dropout of adapters is left."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora" not in name:
            module.p = 0.0
    return model.train()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_gradient(name: str, kind: str) -> None:
    batch = families.make_batch(name, LENGTHS)
    original, model, oracle = (make(name, ADAPTED[kind]) for _ in range(3))
    ours, peer = train(accelerate(model), batch), train(original, batch)
    expected = train(oracle.double(), batch)
    assert ours.keys() == peer.keys() == expected.keys()
    for key, gradient in ours.items():
        assert_close_to_oracle(gradient, expected[key], peer[key], torch.float32)
    assert counts(model) == {"packed": 1}
    with torch.inference_mode():
        same = model(**batch)[0], original(**batch)[0]
    assert torch.equal(*same)
    assert counts(model)["packed"] == 1


def test_dropout_of_adapters() -> None:
    """Of one text: the rows that draw are those of the original."""
    batch, gradients = families.make_batch("bert", [23]), []
    for wrap in (accelerate, lambda model: model, nn.Module.double):
        model = wrap(without_dropout(make("bert", lora(lora_dropout=0.5))))
        torch.manual_seed(1)
        gradients.append(train(model, batch))
    for ours, peer, expected in zip(*map(dict.values, gradients), strict=True):
        assert_close_to_oracle(ours, expected, peer, torch.float32)


def test_adapters_come_and_go() -> None:
    batch, model = families.make_batch("bert", LENGTHS), accelerate(make("bert", lambda m: m))
    plain, adapted = run(model, batch)[0], lora()(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps: list[Any] = [
        adapted.train,
        model.eval,
        partial(adapted.add_adapter, "other", peft.LoraConfig(target_modules=["key"])),
        partial(adapted.set_adapter, "other"),
        partial(adapted.set_adapter, "default"),
    ]
    without_dropout(model)
    for step in steps:
        step()
        check_gradients(batch, restore(copy.deepcopy(model)), model)
        optimizer.step()
    assert counts(model) == {"packed": 1 + len(steps)}
    adapted.unload()
    assert torch.equal(run(model, batch)[0], plain)
    assert counts(model) == {"packed": 2 + len(steps)}


class Spread(nn.Linear):
    """A layer of a caller's, which looks at other rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[:, :1].mean()


def hooked(part: str, register: str, hook: Callable[..., Any]) -> Change:
    def act(model: Any) -> Any:
        getattr(model.get_submodule(part), register)(hook)
        return model

    return act


def _spread(model: Any) -> Any:
    own = Spread(64, 64)
    own.load_state_dict(model.encoder.layer[0].attention.self.query.state_dict())
    model.encoder.layer[0].attention.self.query = own
    return model


QUERY, NORM = "encoder.layer.0.attention.self.query", "encoder.layer.0.output.LayerNorm"
EMBEDDINGS = ["word_embeddings", "query"]
STOCK: dict[str, tuple[Change, str]] = {
    "column edited": (
        hooked(QUERY, "register_forward_hook", lambda m, x, y: (y[:, 0].add_(1), y)[1]),
        "Linear has forward hooks",
    ),
    "output replaced": (
        hooked(NORM, "register_forward_hook", lambda m, x, y: 2 * y),
        "LayerNorm has forward hooks",
    ),
    "gradient changed": (
        hooked(QUERY, "register_full_backward_hook", lambda m, dx, dy: (2 * dx[0],)),
        "gradients are recorded: Linear has backward hooks",
    ),
    "hook in an adapter": (
        lambda m: hooked(f"{QUERY}.lora_A.default", "register_forward_hook", lambda m, x, y: 2 * y)(
            lora()(m).base_model.model
        ),
        "the model is no longer supported: expected torch.nn.Linear, got "
        "peft.tuners.lora.layer.Linear",
    ),
    "layer of a caller's": (
        _spread,
        "the model is no longer supported: expected torch.nn.Linear, got "
        "test_adapted_training.Spread",
    ),
    "adapted table": (
        lora(target_modules=EMBEDDINGS),
        "the model is no longer supported: module 'embeddings.word_embeddings' is a "
        "peft.tuners.lora.layer.Embedding, not one of transformers",
    ),
}


@pytest.mark.parametrize("kind", STOCK)
def test_what_sees_more_than_rows_trains_in_the_original(kind: str) -> None:
    change, reason = STOCK[kind]
    batch, results = families.make_batch("bert", LENGTHS), []
    for wrap in (accelerate, copy.copy):
        model = wrap(make("bert", lambda m: m))
        results.append(train(change(model), batch))
    model = accelerate(make("bert", lambda m: m))
    train(change(model), batch)
    assert counts(model) == {reason: 1}
    for ours, theirs in zip(*map(dict.values, results), strict=True):
        assert torch.equal(ours, theirs)
