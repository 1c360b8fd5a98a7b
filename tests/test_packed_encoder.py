"""PackedEncoder: changed weights, copies, and the models it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertModel, XLNetConfig, XLNetModel

import families
from packed import assert_same, packed_states, reference_states
from sbert_fast import models
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.fingerprint import tensors_in


def _update_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.encoder.layer[1].attention.self.query.bias.add_(0.5)


def _update_under_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model.embeddings.LayerNorm.weight.mul_(1.5)


def _replace_data(model: nn.Module) -> None:
    weight = model.encoder.layer[2].output.dense.weight
    weight.data = weight.data + 0.1


def _replace_parameter(model: nn.Module) -> None:
    norm = model.encoder.layer[0].output.LayerNorm
    norm.bias = nn.Parameter(norm.bias.detach() + 0.5)


def _replace_submodule(model: nn.Module) -> None:
    torch.manual_seed(7)
    model.encoder.layer[0].intermediate.dense = nn.Linear(64, 96)


def _replace_layer(model: nn.Module) -> None:
    model.encoder.layer[0] = families.make_model("bert", seed=9).encoder.layer[0]


def _remove_layer(model: nn.Module) -> None:
    del model.encoder.layer[2]
    model.config.num_hidden_layers = 2


def _load_state_dict(model: nn.Module) -> None:
    model.load_state_dict(families.make_model("bert", seed=9).state_dict())


def _assign_state_dict(model: nn.Module) -> None:
    model.load_state_dict(families.make_model("bert", seed=9).state_dict(), assign=True)


def _round_trip_through_half(model: nn.Module) -> None:
    model.half().float()


def _round_trip_through_bfloat16(model: nn.Module) -> None:
    model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        _update_in_place,
        _update_under_inference_mode,
        _replace_data,
        _replace_parameter,
        _replace_submodule,
        _replace_layer,
        _remove_layer,
        _load_state_dict,
        _assign_state_dict,
        _round_trip_through_half,
        _round_trip_through_bfloat16,
    ],
)
def test_changed_weights_are_followed(change: Callable[[nn.Module], None]) -> None:
    model = families.make_model("bert")
    batch = families.make_batch("bert", [7, 20])
    encoder = PackedEncoder(model)
    before = torch.cat(packed_states(encoder, batch))
    change(model)
    expected = reference_states(model, batch)
    after = packed_states(encoder, batch)
    assert not torch.equal(torch.cat(after), before)
    assert_same(after, expected)


def test_unchanged_weights_are_prepared_once() -> None:
    encoder = PackedEncoder(families.make_model("bert"))
    assert encoder.prepared() is encoder.prepared()


def test_dtype_follows_the_model() -> None:
    model = families.make_model("bert")
    encoder = PackedEncoder(model)
    assert encoder.prepared().target.dtype == torch.float32
    model.to(torch.bfloat16)
    assert encoder.prepared().target.dtype == torch.bfloat16
    # fp32 holds every fp16 value, and CPUs compute in it.
    model.half()
    assert encoder.prepared().target.dtype == torch.float32


def test_refresh_sees_writes_that_torch_does_not_count() -> None:
    model = families.make_model("bert")
    batch = families.make_batch("bert", [7, 20])
    encoder = PackedEncoder(model)
    packed_states(encoder, batch)
    model.encoder.layer[0].output.dense.weight.data[3] += 1
    encoder.refresh()
    assert_same(packed_states(encoder, batch), reference_states(model, batch))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_serve_their_own_weights(
    duplicate: Callable[[PackedEncoder], PackedEncoder],
) -> None:
    encoder = PackedEncoder(families.make_model("bert"))
    batch = families.make_batch("bert", [7, 20])
    before = packed_states(encoder, batch)
    twin = duplicate(encoder)
    assert twin.model is not encoder.model
    assert torch.equal(torch.cat(packed_states(twin, batch)), torch.cat(before))
    _update_in_place(twin.model)
    assert torch.equal(torch.cat(packed_states(encoder, batch)), torch.cat(before))
    assert_same(packed_states(twin, batch), reference_states(twin.model, batch))


def test_prepared_weights_stay_out_of_pickles() -> None:
    encoder = PackedEncoder(families.make_model("bert"))
    size = len(pickle.dumps(encoder))
    encoder.prepared()
    assert len(pickle.dumps(encoder)) == size


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = families.make_model("bert")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[5] = value
    with pytest.raises(UnsupportedModelError, match="encoder.layer.1.output.dense.bias"):
        PackedEncoder(model).prepared()


class _OwnForward(BertModel):
    def forward(self, *args: object, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


class _OwnLayer(nn.Identity):
    pass


class _OwnTensor(nn.Parameter):
    pass


def _with_adapter() -> nn.Module:
    model = families.make_model("bert")
    query = model.encoder.layer[0].attention.self.query
    query.register_parameter("lora_A", nn.Parameter(torch.zeros(4, 64)))
    return model


def _with_own_module() -> nn.Module:
    model = families.make_model("bert")
    model.encoder.layer[0].output.dropout = _OwnLayer()
    return model


def _with_quantised_linear() -> nn.Module:
    model = families.make_model("bert")
    weight = model.encoder.layer[0].output.dense.weight
    model.encoder.layer[0].output.dense.weight = _OwnTensor(weight.detach())
    return model


def _with_linear_subclass() -> nn.Module:
    model = families.make_model("bert")
    model.encoder.layer[0].output.dense = nn.modules.linear.NonDynamicallyQuantizableLinear(96, 64)
    return model


def _with_other_activation(family: str) -> nn.Module:
    model = families.make_model(family)
    if family == "distilbert":
        model.transformer.layer[1].ffn.activation = nn.ReLU()
    else:
        model.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
    return model


def _on_meta() -> nn.Module:
    return families.make_model("bert").to("meta")


def _with_relative_positions() -> nn.Module:
    model = families.make_model("bert")
    model.config.position_embedding_type = "relative_key"
    return model


def _xlnet() -> nn.Module:
    sizes = {"d_model": 64, "n_layer": 1, "n_head": 4, "d_inner": 96}
    return XLNetModel(XLNetConfig(vocab_size=99, **sizes))


_with = families.with_setting
REFUSED = {
    "decoder": (lambda: families.make_model("bert", is_decoder=True), "is_decoder"),
    "causal": (lambda: families.make_model("bert", is_causal=True), "is_causal"),
    "activation": (lambda: families.make_model("bert", hidden_act="relu"), "'relu'"),
    "distilbert activation": (
        lambda: families.make_model("distilbert", hidden_act="relu"),
        "'relu'",
    ),
    "other activation": (lambda: _with_other_activation("bert"), "GELU.*ReLU"),
    "distilbert other activation": (lambda: _with_other_activation("distilbert"), "GELU.*ReLU"),
    "small heads": (lambda: families.make_model("bert", num_attention_heads=16), "head dim.*got 4"),
    "no heads": (_with("config.num_attention_heads", 0), "0 heads"),
    "heads of another type": (
        _with("config.num_attention_heads", "four"),
        "TypeError",
    ),
    "no size": (_with("config.hidden_size", None), "TypeError"),
    "no layers": (lambda: families.make_model("bert", num_hidden_layers=0), "layers .* got 0"),
    "no token types": (lambda: families.make_model("bert", type_vocab_size=0), "types .* got 0"),
    "no positions": (
        _with("config.max_position_embeddings", -1, "modernbert"),
        "positions .* -1",
    ),
    "some positions": (
        _with("config.max_position_embeddings", 8.5, "modernbert"),
        "8.5",
    ),
    "a window of another type": (
        _with("config.local_attention", 8.5, "modernbert"),
        "window.*4.0",
    ),
    "no window": (_with("config.local_attention", None, "modernbert"), "TypeError"),
    "negative padding id": (
        _with("embeddings.padding_idx", -2, "roberta"),
        "first token .* -1",
    ),
    "negative eps": (
        _with("encoder.layer.1.output.LayerNorm.eps", -1.0),
        "eps .* got -1.0",
    ),
    "eps that is no number": (
        _with("embeddings.LayerNorm.eps", float("nan")),
        "eps .* got nan",
    ),
    "relative positions": (_with_relative_positions, "'relative_key'"),
    "adapter": (_with_adapter, "query.lora_A"),
    "own forward": (lambda: _OwnForward(families.make_config("bert")), "_OwnForward"),
    "own module": (_with_own_module, "encoder.layer.0.output.dropout.*_OwnLayer"),
    "own tensor": (_with_quantised_linear, "encoder.layer.0.output.dense.weight.*_OwnTensor"),
    "own linear": (_with_linear_subclass, "NonDynamicallyQuantizableLinear"),
    "meta device": (_on_meta, "meta device"),
    "other family": (_xlnet, "XLNetModel.*BertModel"),
    "no transformer": (lambda: nn.Linear(4, 4), "Linear.*BertModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_run_differently_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    with pytest.raises(UnsupportedModelError, match=message):
        PackedEncoder(model)
    assert models.refusal(model) is not None


def test_what_becomes_unsupported_is_refused_at_the_next_batch() -> None:
    model = families.make_model("bert")
    encoder = PackedEncoder(model)
    encoder.prepared()
    model.encoder.layer[0].attention.self.query.register_parameter(
        "lora_A", nn.Parameter(torch.zeros(4, 64))
    )
    with pytest.raises(UnsupportedModelError, match="lora_A"):
        encoder.prepared()


def test_implementations_are_checked_at_once() -> None:
    model = families.make_model("bert")
    with pytest.raises(ValueError, match="impl must be one of .*'tpu'"):
        PackedEncoder(model, impl="tpu")


@pytest.mark.parametrize(
    "name", ["bert", "distilbert-gelu-new", "electra-projection", "modernbert"]
)
def test_live_weights_are_never_copied(name: str) -> None:
    model, batch = families.make_model(name), families.make_batch(name, [3, 17, 40])
    encoder = PackedEncoder(model, live=True)
    assert_same(packed_states(encoder, batch), reference_states(model, batch))
    prepared = replace(encoder.prepared().stack, rotary=())
    matrices = {tensor.data_ptr() for tensor in tensors_in(prepared) if tensor.dim() == 2}
    assert matrices and matrices <= {parameter.data_ptr() for parameter in model.parameters()}
    # Less than a row, through `.data`: what a copy would not have seen.
    model.get_input_embeddings().weight.data[:, 0] += 1
    weight = next(m for m in model.modules() if isinstance(m, torch.nn.Linear)).weight
    weight.data[0, 0] += 1
    assert_same(packed_states(encoder, batch), reference_states(model, batch))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("cast", "dtype", "message"),
    [
        (nn.Module.float, torch.bfloat16, "must be torch.float32, .*, got torch.bfloat16$"),
        (nn.Module.bfloat16, torch.float32, "must be torch.bfloat16, .*, got torch.float32$"),
        (nn.Module.half, torch.float32, "must be torch.float16, .*, got torch.float32$"),
        (nn.Module.half, None, "got torch.float32, the default for torch.float16 on a CPU$"),
    ],
    ids=["other", "cast", "half", "default"],
)
def test_live_weights_have_the_dtype_of_the_model(
    cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype | None, message: str, later: bool
) -> None:
    model = families.make_model("bert")
    if not later:
        with pytest.raises(ValueError, match=message):
            PackedEncoder(cast(model), dtype=dtype, live=True)
        return
    before = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    encoder = PackedEncoder(model.to(before), dtype=dtype, live=True)
    encoder.prepared()
    cast(model)
    with pytest.raises(ValueError, match=message):
        encoder.prepared()


def test_live_weights_may_compute_in_float16_on_a_cpu() -> None:
    engine = PackedEncoder(families.make_model("bert").half(), dtype=torch.float16, live=True)
    assert engine.prepared().target.dtype == torch.float16
