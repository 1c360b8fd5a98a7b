"""What people do to the weights of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import swa_utils

from model_operations import Act, operation
from walks import TEXTS, WIDTH, NotNow, Subject

# Optimizers


def _train_step(s: Subject, optimizer: torch.optim.Optimizer) -> None:
    with torch.enable_grad():
        s.model.train()
        embeddings = s.model(s.model.preprocess(TEXTS))["sentence_embedding"]
        embeddings[:, 0].float().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _optimize(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Act:
    def act(s: Subject) -> None:
        parameters = [p for p in s.model.parameters() if p.requires_grad]
        if not parameters:
            raise NotNow
        _train_step(s, make(parameters, **options))

    return act


for _class, _rate in (("SGD", 0.3), ("Adam", 0.02), ("AdamW", 0.02), ("Adagrad", 0.02)):
    for _mode in ("plain", "foreach", "fused"):
        _options = {"foreach": _mode == "foreach", "fused": _mode == "fused"}
        operation(
            _optimize(getattr(torch.optim, _class), lr=_rate, **_options),
            name=f"{_class} {_mode}",
            weight=0.5,
        )
for _class in ("RMSprop", "NAdam", "RAdam", "Adafactor", "Adamax"):
    operation(_optimize(getattr(torch.optim, _class), lr=0.02), name=_class, weight=0.3)


@operation
def one_layer_trained_fused(s: Subject) -> None:
    _train_step(s, torch.optim.AdamW(s.layer().parameters(), lr=0.05, fused=True))


# Writes to weights


@operation
def written_under_no_grad(s: Subject) -> None:
    with torch.no_grad():
        s.weight().mul_(s.rng.choice([0.6, 1.5]))


@operation
def written_through_data(s: Subject) -> None:
    s.weight().data.mul_(s.rng.choice([0.6, 1.5]))


@operation
def data_copied(s: Subject) -> None:
    weight = s.weight()
    weight.data.copy_(weight.data.roll(1, dims=0))


@operation
def data_assigned(s: Subject) -> None:
    weight = s.weight()
    weight.data = weight.data * s.rng.choice([0.6, 1.5])


@operation
def one_row_through_data(s: Subject) -> None:
    weight = s.weight()
    weight.data[s.rng.randrange(len(weight))] *= -3


@operation
def one_row_of_the_vocabulary(s: Subject) -> None:
    ids = s.tokenizer("river")["input_ids"]
    table = s.base.get_input_embeddings().weight
    table.data[ids[len(ids) // 2]] *= -1.5


@operation
def position_table_through_data(s: Subject) -> None:
    s.base.embeddings.position_embeddings.weight.data.mul_(1.5)


@operation
def bias_through_data(s: Subject) -> None:
    s.layer().output_layer_norm.bias.data.add_(0.2) if hasattr(
        s.layer(), "output_layer_norm"
    ) else s.layer().output.LayerNorm.bias.data.add_(torch.linspace(-1, 1, WIDTH))


@operation
def norm_through_data(s: Subject) -> None:
    weight = s.module(nn.LayerNorm).weight
    weight.data.mul_(torch.linspace(0.3, 2, len(weight)))


@operation
def written_through_numpy(s: Subject) -> None:
    weight = s.weight()
    if weight.dtype == torch.bfloat16:
        raise NotNow
    view = weight.detach().numpy()
    view *= s.rng.choice([0.6, 1.5])


@operation
def rows_indexed(s: Subject) -> None:
    weight = s.weight()
    with torch.no_grad():
        weight[:4] = weight[4:8].clone()


@operation
def initialised_anew(s: Subject) -> None:
    torch.nn.init.xavier_uniform_(s.weight(), generator=torch.Generator().manual_seed(3))


@operation
def reset_parameters(s: Subject) -> None:
    torch.manual_seed(s.rng.randrange(1000))
    s.module(nn.Linear).reset_parameters()


@operation
def state_dict_loaded(s: Subject) -> None:
    s.model.load_state_dict({name: t * 1.2 for name, t in _floats(s.model).items()}, strict=False)


@operation
def state_dict_assigned(s: Subject) -> None:
    state = {name: t * 1.2 for name, t in _floats(s.model).items()}
    s.model.load_state_dict(state, strict=False, assign=True)


def _floats(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if t.is_floating_point() and t.dim() == 2}


@operation
def state_dict_tensors_written(s: Subject) -> None:
    for tensor in _floats(s.layer()).values():
        tensor.mul_(1.3)


@operation
def parameters_from_vector(s: Subject) -> None:
    layer = s.layer()
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 1.2, layer.parameters())


def _averaged(make: Callable[[nn.Module], swa_utils.AveragedModel]) -> Act:
    def act(s: Subject) -> None:
        averaged = make(s.base)
        averaged.update_parameters(s.base)
        with torch.no_grad():
            s.weight().mul_(2)
        averaged.update_parameters(s.base)
        pairs = zip(s.base.parameters(), averaged.module.parameters(), strict=True)
        for parameter, mean in pairs:
            parameter.data.copy_(mean.data)

    return act


operation(_averaged(swa_utils.AveragedModel), name="stochastic weight averaging")
operation(
    _averaged(
        lambda base: swa_utils.AveragedModel(base, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    ),
    name="exponential moving average",
)


@operation
def model_soup(s: Subject) -> None:
    other = {n: t.flip(0) for n, t in _floats(s.base).items()}
    for name, parameter in s.base.named_parameters():
        if name in other:
            parameter.data = (parameter.data + 0.3 * other[name]) / 1.3


@operation
def weights_interpolated(s: Subject) -> None:
    weights = [p.data for p in s.layer().parameters()]
    torch._foreach_lerp_(weights, [w.flip(0) for w in weights], 0.3)


@operation
def swapped_in_place(s: Subject) -> None:
    weight = s.weight()
    other = nn.Parameter(weight.detach() * 1.4)
    torch.utils.swap_tensors(weight, other)


@operation
def storage_shared(s: Subject) -> None:
    a, b = s.attention(), s.rng.choice(["query", "key"])
    if hasattr(a, "q_lin"):
        raise NotNow
    a.value.weight.data = getattr(a, b).weight.data


@operation
def set_to_another_storage(s: Subject) -> None:
    weight = s.weight()
    with torch.no_grad():
        weight.set_((weight * 1.4).detach())


# Layouts


@operation
def parameter_replaced(s: Subject) -> None:
    linear = s.module(nn.Linear)
    linear.weight = nn.Parameter(linear.weight.detach() * s.rng.choice([0.6, 1.5]))


def _laid_out(change: Callable[[torch.Tensor], torch.Tensor], *types: type[nn.Module]) -> Act:
    def act(s: Subject) -> None:
        weight = s.module(*types).weight
        weight.data = change(weight.data)

    return act


for _name, _layout in {
    "transposed": lambda w: w.t().contiguous().t(),
    "strided": lambda w: w.repeat_interleave(2, dim=-1)[..., ::2],
    "off the grid": lambda w: torch.cat([w.flatten()[:1], w.flatten()])[1:].view(w.shape),
}.items():
    operation(_laid_out(_layout, nn.Linear), name=f"linear {_name}", changes=False)
    operation(_laid_out(_layout, nn.Embedding), name=f"table {_name}", changes=False)
operation(
    _laid_out(lambda w: w.repeat_interleave(2)[::2], nn.LayerNorm),
    name="norm strided",
    changes=False,
)


@operation(changes=False)
def from_fortran_array(s: Subject) -> None:
    weight = s.base.get_input_embeddings().weight
    if weight.dtype == torch.bfloat16:
        raise NotNow
    weight.data = torch.from_numpy(np.asfortranarray(weight.detach().numpy()))


@operation
def expanded_bias(s: Subject) -> None:
    linear = s.layer().intermediate.dense if hasattr(s.layer(), "intermediate") else None
    if linear is None or linear.bias is None:
        raise NotNow
    linear.bias.data = linear.bias.data[:1].expand(len(linear.bias))
