"""What people do to the weights of a model."""

from __future__ import annotations

import copy
import ctypes
import os

import torch
from torch import nn

from model_operations import operation
from walks import WIDTH, NotNow, Subject

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
def storage_written(s: Subject) -> None:
    storage = s.weight().untyped_storage()
    storage.copy_(s.module(nn.Linear).weight.detach().mul(1.3).untyped_storage())


@operation
def written_through_its_address(s: Subject) -> None:
    """As code in C does it."""
    weight = s.weight()
    other = (weight.detach() * -0.8).contiguous()
    if not weight.is_contiguous():
        raise NotNow
    ctypes.memmove(weight.data_ptr(), other.data_ptr(), other.nbytes)


@operation(weight=0.1)
def written_by_another_process(s: Subject) -> None:
    """Weights in shared memory, as for Hogwild training."""
    weight = s.weight()
    weight.share_memory_()
    child = os.fork()
    if child == 0:
        weight.data.mul_(1.4)
        os._exit(0)
    os.waitpid(child, 0)


@operation(changes=False)
def memory_shared(s: Subject) -> None:
    s.base.share_memory()


@operation
def initialised_by_a_function(s: Subject) -> None:
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.clamp_(-0.1, 0.1)

    s.base.apply(initialise)


@operation
def tensors_mapped(s: Subject) -> None:
    s.layer()._apply(lambda tensor: tensor * 1.2)


@operation
def weights_exchanged(s: Subject) -> None:
    a, b = s.layers[0], s.layers[-1]
    state = copy.deepcopy(a.state_dict())
    a.load_state_dict(b.state_dict())
    b.load_state_dict(state)


@operation
def set_to_another_storage(s: Subject) -> None:
    weight = s.weight()
    with torch.no_grad():
        weight.set_((weight * 1.4).detach())
