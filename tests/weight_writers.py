"""The ways people write to the weights of a model, each as a function of a SentenceTransformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer
from transformers.optimization import Adafactor

from families import make_model
from surfaces import TEXTS

Writer = Callable[[SentenceTransformer], None]


def top_layer(st: SentenceTransformer) -> Any:
    return st[0].auto_model.encoder.layer[-1]


def value(st: SentenceTransformer) -> Any:
    return top_layer(st).attention.self.value


def other_weights(st: SentenceTransformer) -> list[tuple[nn.Parameter, Tensor]]:
    """Every parameter of the base model, and another value for it."""
    other = dict(make_model("bert", seed=7).named_parameters())
    base = st[0].auto_model
    return [(parameter, other[name].detach()) for name, parameter in base.named_parameters()]


# Optimizers


def _train(make: Callable[..., Optimizer], **options: Any) -> Writer:
    def step(st: SentenceTransformer) -> None:
        optimizer = make(st[0].auto_model.parameters(), lr=0.05, **options)

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = st(st.preprocess(TEXTS[:2]))["sentence_embedding"][0, :9].sum()
            found.backward()
            return found

        loss()
        optimizer.step(loss if make is LBFGS else None)

    return step


OPTIMIZERS: dict[str, Writer] = {
    "AdamW fused": _train(AdamW, fused=True),
    "Adam fused": _train(Adam, fused=True),
    "SGD fused": _train(SGD, fused=True, momentum=0.9),
    "Adagrad fused": _train(Adagrad, fused=True),
    "AdamW foreach": _train(AdamW, foreach=True),
    "LBFGS": _train(LBFGS),
    "Adafactor": _train(Adafactor, relative_step=False, scale_parameter=False),
}


# Adapters


def _merge(config: str, then: Callable[[Any], None] | None = None, **options: Any) -> Writer:
    """An adapter attached, and merged, before the next call."""

    def write(st: SentenceTransformer) -> None:
        import peft

        torch.manual_seed(0)
        options.setdefault("target_modules", ["query", "value"])
        adapted = peft.get_peft_model(st[0].auto_model, getattr(peft, config)(**options))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, 1.0 if "ia3" in name else 0.0, 0.5)
        (then or (lambda model: model.merge_and_unload()))(adapted)

    return write


def _merge_then_unload(model: Any) -> None:
    model.merge_adapter()
    model.unload()


def _merge_the_sum_of_two(model: Any) -> None:
    import peft

    second = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    model.add_adapter("second", second)
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "both", "linear")
    model.merge_and_unload(adapter_names=["both"])


ADAPTERS: dict[str, Writer] = {
    "LoRA": _merge("LoraConfig", lora_alpha=8),
    "DoRA": _merge("LoraConfig", use_dora=True),
    "LoHa": _merge("LoHaConfig"),
    "IA3": _merge("IA3Config", feedforward_modules=[]),
    "merged, then unloaded": _merge("LoraConfig", _merge_then_unload),
    "a sum of adapters": _merge("LoraConfig", _merge_the_sum_of_two),
}


# Averages, new initial values, shared memory


def _average(st: SentenceTransformer) -> None:
    for parameter, other in other_weights(st):
        parameter.data.lerp_(other, 0.5)


def _ema(st: SentenceTransformer) -> None:
    for parameter, shadow in other_weights(st):
        parameter.data.copy_(shadow)


def _foreach_copy(st: SentenceTransformer) -> None:
    parameters, others = zip(*other_weights(st), strict=True)
    torch._foreach_copy_([parameter.data for parameter in parameters], others)


def _reinitialise(st: SentenceTransformer) -> None:
    for module in top_layer(st).modules():
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.2)
            module.bias.data.zero_()


def _init(st: SentenceTransformer) -> None:
    nn.init.xavier_uniform_(value(st).weight)


def _init_detached(st: SentenceTransformer) -> None:
    nn.init.orthogonal_(value(st).weight.data)


def _quantise(st: SentenceTransformer) -> None:
    weight = value(st).weight.data
    weight.copy_(torch.fake_quantize_per_tensor_affine(weight, 0.25, 0, -2, 1))


def _through_numpy(st: SentenceTransformer) -> None:
    value(st).weight.detach().numpy()[:] *= -1


def _bias_through_numpy(st: SentenceTransformer) -> None:
    value(st).bias.detach().numpy()[:] += 2


def _without_counting(st: SentenceTransformer) -> None:
    weight = value(st).weight
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight.mul_(-1)


def _swap_tensors(st: SentenceTransformer) -> None:
    torch.utils.swap_tensors(value(st).weight, nn.Parameter(torch.randn(64, 64) / 8))


def _transpose(st: SentenceTransformer) -> None:
    """The same memory, read the other way."""
    value(st).weight.data = value(st).weight.data.T


def _tie(st: SentenceTransformer) -> None:
    """As tied neurons have it: one element for all."""
    bias = value(st).bias
    bias.data = bias.data[:1].expand_as(bias)


def _prune(st: SentenceTransformer) -> None:
    prune.l1_unstructured(value(st), "weight", amount=0.6)
    prune.remove(value(st), "weight")


class _Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def _parametrize(st: SentenceTransformer) -> None:
    parametrize.register_parametrization(value(st), "weight", _Symmetric())
    parametrize.remove_parametrizations(value(st), "weight")


WRITERS: dict[str, Writer] = {
    "average of models": _average,
    "EMA": _ema,
    "foreach copy of data": _foreach_copy,
    "top layer initialised anew": _reinitialise,
    "nn.init": _init,
    "nn.init of data": _init_detached,
    "fake quantisation": _quantise,
    "numpy": _through_numpy,
    "bias through numpy": _bias_through_numpy,
    "version preserved": _without_counting,
    "swapped tensors": _swap_tensors,
    "transposed": _transpose,
    "one value for all": _tie,
    "pruned": _prune,
    "parametrized": _parametrize,
}
