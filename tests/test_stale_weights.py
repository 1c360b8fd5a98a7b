"""Weights written in the ways people write them: the next call serves the model as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer
from transformers.optimization import Adafactor

from checks import MAX_DISTANCE, assert_same_vectors, bits, cosine_distances
from families import make_model, make_sentence_transformer, randomize
from sbert_fast import FastEncoder
from sbert_fast.errors import InvalidWeightsError
from surfaces import SURFACES, TEXTS

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


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("writer", OPTIMIZERS | ADAPTERS | WRITERS)
def test_written_weights_are_served(surface: str, writer: str) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    before = model.check()
    (OPTIMIZERS | ADAPTERS | WRITERS)[writer](st)
    after = model.check()
    assert cosine_distances(after, before).max() > MAX_DISTANCE
    assert model.fallbacks() == {} or surface == "accelerate"


# Weights that live elsewhere, written from there


def _flat(st: SentenceTransformer, tmp_path: Path) -> Callable[[], object]:
    """As flat master parameters (apex, ZeRO) have it: every parameter a view of one vector."""
    vector = nn.utils.parameters_to_vector(st.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, st.parameters())
    return lambda: vector.mul_(1.3)


def _mapped(st: SentenceTransformer, tmp_path: Path) -> Callable[[], object]:
    """As another process has it that trains on shared memory: pages change."""
    weight = value(st).weight
    weight.detach().numpy().tofile(tmp_path / "weight")
    here, there = (np.memmap(tmp_path / "weight", np.float32, "r+", shape=(64, 64)) for _ in "ab")
    weight.data = torch.from_numpy(here)
    return lambda: np.negative(there, out=there)


def _attribute(st: SentenceTransformer, tmp_path: Path) -> Callable[[], object]:
    """As meta-learning has it: a plain tensor in place of the parameter."""
    linear = value(st)
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.weight = weight
    return lambda: setattr(linear, "weight", -weight)


def _buffer(st: SentenceTransformer, tmp_path: Path) -> Callable[[], object]:
    """Frozen: a buffer in place of the parameter."""
    linear = value(st)
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.register_buffer("weight", weight)
    return lambda: linear.weight.neg_()


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("move", [_flat, _mapped, _attribute, _buffer])
def test_weights_that_live_elsewhere(
    surface: str, move: Callable[[Any, Path], Callable[[], object]], tmp_path: Path
) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    model.check()
    write = move(st, tmp_path)
    before = model.check()
    write()
    assert cosine_distances(model.check(), before).max() > MAX_DISTANCE


# One row of any matrix


def _negate(rows: Tensor) -> None:
    rows[5] = -rows[5]


def _exchange(rows: Tensor) -> None:
    rows[[2, 7]] = rows[[7, 2]]


def _shuffle(rows: Tensor) -> None:
    rows[9] = rows[9].roll(1)


def _nudge(rows: Tensor) -> None:
    rows[-1] *= 1.1


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("write", [_negate, _exchange, _shuffle, _nudge])
def test_one_row_of_any_matrix(surface: str, write: Callable[[Tensor], None]) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    before = model.check()
    base = st[0].auto_model
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("pooler"):
            write(module.weight.data)
            after = model.check()
            # What keys are multiplied with may be too weak to turn a vector by a bit of fp32.
            assert ".key" in name or (bits(after) != bits(before)).any(), name
            before = after


def test_one_row_of_a_dense_module() -> None:
    dense = randomize(Dense(64, 24))
    st = SentenceTransformer(modules=[*make_sentence_transformer(normalize=False), dense])
    model = SURFACES["encode"](st.cpu())
    before = model.check()
    dense.linear.weight.data[3] *= -1
    assert cosine_distances(model.check(), before).max() > MAX_DISTANCE


HALF_NAMES = ("word_embeddings.weight", "position_embeddings.weight", "0.output.LayerNorm.weight")


@pytest.mark.parametrize("name", HALF_NAMES)
def test_what_is_a_copy_in_another_dtype_only(name: str) -> None:
    st = make_sentence_transformer().half()
    encoder = FastEncoder(st)
    before = encoder.encode(TEXTS)
    (parameter,) = (p for found, p in st.named_parameters() if found.endswith(name))
    parameter.data.mul_(-1)
    after = encoder.encode(TEXTS)
    assert_same_vectors(after, FastEncoder(st).encode(TEXTS))
    assert cosine_distances(after, before).max() > MAX_DISTANCE


@pytest.mark.parametrize("surface", SURFACES)
def test_weights_written_to_nan_are_refused(surface: str) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    model.check()
    value(st).weight.data[3] = float("nan")
    with pytest.raises(InvalidWeightsError, match=r"value\.weight"):
        model.ours()
