"""PackedEncoder against the unpatched Hugging Face model, for every family and variant."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import families
from checks import cosine_distances
from packed import assert_packed_as_stock, assert_same, packed_states, reference_states, texts_of
from sbert_fast import linears, ops
from sbert_fast.attention import attention_options
from sbert_fast.engine import PackedEncoder
from sbert_fast.preparation import required_ops

CPU = torch.device("cpu")
RUNNABLE = [i for i in ops.IMPLEMENTATIONS if ops.refusal(i, CPU, torch.float32) is None]
MAX_HALF_DISTANCE = 5e-4
LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 47, 63, families.MAX_TOKENS]
OFFSET_FAMILIES = [n for n, v in families.VARIANTS.items() if v.family in families.ROBERTA_LIKE]
TYPED = [n for n in families.VARIANTS if families.make_config(n).to_dict().get("type_vocab_size")]


def _implementations(name: str) -> list[str]:
    """Those that have every op of a variant; and, where one lacks some, `auto`, a mixture."""
    required = PackedEncoder(families.make_model(name)).required_ops()

    def lacks(implementation: str, op: str, how: dict[str, Any]) -> bool:
        needs = (*how.get("needs", ()), *(n for n, v in how.get("options", {}).items() if v))
        place = CPU, torch.float32, how.get("head_dim")
        return ops.refusal(implementation, *place, op, needs) is not None

    whole = [i for i in RUNNABLE if not any(lacks(i, op, how) for op, how in required)]
    return whole if whole == RUNNABLE else [*whole, "auto"]


every_case = pytest.mark.parametrize(
    ("name", "impl"),
    [(name, impl) for name in families.VARIANTS for impl in _implementations(name)],
)


@every_case
def test_fp32_gives_the_vectors_of_the_original(name: str, impl: str) -> None:
    model = families.make_model(name)
    # Triton's interpreter takes a minute for all of them, and its kernels have tests of their own.
    batch = families.make_batch(name, [1, 17, 40] if impl == "triton" else LENGTHS)
    expected = reference_states(model, batch)
    assert_same(packed_states(PackedEncoder(model, impl=impl), batch), expected)


@pytest.mark.parametrize("name", families.VARIANTS)
def test_the_ops_that_run_are_those_required(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other linear layers norm and activate their output themselves.
    monkeypatch.setattr(linears, "KINDS", (linears.TorchLinear,))
    engine = PackedEncoder(families.make_model(name))
    packed_states(engine, families.make_batch(name, LENGTHS))
    pooling = {"norm_pool_out", "segment_pool_out"}
    launched = {op for op, _ in ops.launches()}
    assert launched == {op for op, _ in engine.required_ops()} - pooling


def test_ops_are_required_of_every_layer() -> None:
    weights = PackedEncoder(families.make_model("modernbert")).admitted.weights
    first, second, third = weights.layers
    second = replace(
        second,
        attention=replace(second.attention, causal=True),
        feed_forward=replace(second.feed_forward, gated=False),
        feed_forward_norm=replace(second.feed_forward_norm, rms=True),
    )
    third = replace(third, attention_norm=replace(third.attention_norm, rms=True))
    found = list(required_ops(replace(weights, layers=(first, second, third))))
    causal = attention_options(second.attention)
    plain, rms = ({"width": 64, "options": {"rms": rms}} for rms in (False, True))
    expected = [
        ("varlen_attention", attention_options(first.attention)),
        ("varlen_attention", causal),
        *(("add_norm_sum", norm) for norm in (plain, rms)),
        ("gated_activation", {"width": 96}),
        ("bias_gelu", {"width": 96}),
        ("add_norm", plain),
    ]
    assert all(each in found for each in expected)
    assert all(each in expected for each in found)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_length(name: str) -> None:
    lengths = range(1, families.MAX_TOKENS + 1)
    assert_packed_as_stock(families.make_model(name), name, lengths)


@pytest.mark.parametrize("name", OFFSET_FAMILIES)
def test_literal_pad_tokens_inside_a_text_do_not_advance_positions(name: str) -> None:
    model = families.make_model(name)
    batch = families.make_batch(name, [10, 30, 30])
    padding = model.config.pad_token_id
    batch["input_ids"][0, 4] = padding
    batch["input_ids"][1, [3, 4, 20, 29]] = padding
    expected = reference_states(model, batch)
    assert_same(packed_states(PackedEncoder(model), batch), expected)


@pytest.mark.parametrize("name", TYPED)
def test_token_types(name: str) -> None:
    model = families.make_model(name)
    batch = families.make_batch(name, LENGTHS)
    generator = torch.Generator().manual_seed(1)
    types = torch.randint(
        0, model.config.type_vocab_size, batch["input_ids"].shape, generator=generator
    )
    batch["token_type_ids"] = types
    expected = reference_states(model, batch)
    assert_same(packed_states(PackedEncoder(model), batch), expected)


def assert_no_worse_than_the_original(name: str, impl: str, dtype: torch.dtype) -> None:
    """At most twice the distance the original loses in `dtype`, for the worst text; where that is
    more than `MAX_HALF_DISTANCE`, no more than the original."""
    model = families.make_model(name)
    batch = families.make_batch(name, LENGTHS)
    expected = texts_of(reference_states(model, batch))
    peer = texts_of(reference_states(copy.deepcopy(model).to(dtype), batch))
    ours = texts_of(packed_states(PackedEncoder(model, dtype=dtype, impl=impl), batch))
    lost = cosine_distances(peer, expected).max()
    bound = max(lost, min(2 * lost, MAX_HALF_DISTANCE))
    assert cosine_distances(ours, expected).max() <= bound


@every_case
def test_bfloat16_loses_no_more_than_twice_what_the_original_loses(name: str, impl: str) -> None:
    reason = None if impl == "auto" else ops.refusal(impl, CPU, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    assert_no_worse_than_the_original(name, impl, torch.bfloat16)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_float16_loses_no_more_than_twice_what_the_original_loses(name: str) -> None:
    assert_no_worse_than_the_original(name, "reference", torch.float16)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_architecture(name: str) -> None:
    engine = PackedEncoder(families.make_model(name))
    architecture, family = engine.architecture, families.FAMILIES[name]
    assert architecture.family == name
    assert engine.admitted.weights.measures_distances == family.measures_distances
    assert architecture.max_tokens == families.MAX_TOKENS
    assert (architecture.hidden_size, architecture.num_heads, architecture.head_dim) == (64, 4, 16)
    assert (architecture.num_layers, architecture.intermediate_size) == (3, 96)
    assert architecture.position_offset == (2 if family.is_like_roberta else 0)
    assert architecture.uncounted_id == (1 if family.is_like_roberta else None)


def test_layers_that_share_parameters_are_prepared_once() -> None:
    engine = PackedEncoder(families.make_model("albert"))
    first, second, third = engine.prepared().stack.layers
    assert first is second is not third
