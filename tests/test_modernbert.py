"""What is special to ModernBERT: windows, live rotary frequencies, norms that come first."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import families
from checks import assert_same_vectors
from packed import assert_same, packed_states, reference_states
from patched import assert_identical, assert_same_states, pair, run
from sbert_fast import FastEncoder, accelerate, explain, ops
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.patching import counts
from surfaces import SURFACES

LENGTHS = [3, 20, 41, 64]


def model(**overrides: Any) -> Any:
    return families.make_model("modernbert", **overrides)


def assert_packed_as_stock(made: Any) -> None:
    batch = families.make_batch("modernbert", LENGTHS)
    assert_same(packed_states(PackedEncoder(made), batch), reference_states(made, batch))


@pytest.mark.parametrize(
    "overrides",
    [
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
        {"hidden_activation": "silu"},
        {"hidden_activation": "gelu_pytorch_tanh"},
        {"local_attention": 2},
        {"layer_types": ["sliding_attention"] * 3},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"num_hidden_layers": 1},
    ],
    ids=str,
)
def test_configs(overrides: dict[str, Any]) -> None:
    assert_packed_as_stock(model(**overrides))


def _set_window(made: Any, size: int) -> None:
    made.config.local_attention = size
    for layer in made.layers:
        if layer.attn.sliding_window is not None:
            layer.attn.sliding_window = made.config.sliding_window + 1


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("size", [-1, -2, -3])
def test_a_window_that_keeps_nothing_runs_in_the_original(surface: str, size: int) -> None:
    """-1 is no window to the ops; in the model no two tokens are that near."""
    st = families.make_sentence_transformer("modernbert")
    calls = SURFACES[surface](st)
    whole = calls.check()
    _set_window(st[0].auto_model, size)
    before = calls.packed()
    assert not np.allclose(calls.check(), whole, atol=1e-2)
    assert calls.packed() == before
    (reason,) = calls.fallbacks()
    assert f"the window of attention must be at least 0, got {size // 2}" in reason
    with pytest.raises(UnsupportedModelError, match="the window of attention"):
        PackedEncoder(model(local_attention=size))


def test_each_kind_of_layer_has_its_own_rotary_base() -> None:
    found = [layer.attention.rotary for layer in PackedEncoder(model()).admitted.weights.layers]
    full, sliding = found[0].frequencies, found[1].frequencies
    assert not torch.equal(full, sliding)
    assert found[1].frequencies is found[2].frequencies


@pytest.mark.parametrize("gaps", [False, True])
def test_a_mask_with_gaps_runs_in_the_original(gaps: bool) -> None:
    """There the window is counted in columns of the padded row."""
    original, ours = pair("modernbert")
    batch = families.make_batch("modernbert", LENGTHS)
    if gaps:
        batch["attention_mask"][3, 20:32] = 0
    same = assert_identical if gaps else partial(assert_same_states, keep=batch["attention_mask"])
    same(run(ours, batch), run(original, batch))
    assert ("packed" in counts(ours)) != gaps


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side: str) -> None:
    original, ours = pair("modernbert")
    batch = families.make_batch("modernbert", LENGTHS)
    if side == "left":
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    assert_same_states(run(ours, batch), run(original, batch), batch["attention_mask"])


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_kernels_run_all_of_it(impl: str) -> None:
    if (reason := ops.refusal(impl, torch.device("cpu"), torch.float32)) is not None:
        pytest.skip(reason)
    st = families.make_sentence_transformer("modernbert")
    assert "reference" not in explain(FastEncoder(st, impl=impl))


def test_a_sentence_transformer() -> None:
    st = families.make_sentence_transformer("modernbert")
    texts = families.make_texts(30, max_words=60)
    expected = st.encode(texts)
    encoder = FastEncoder(st)
    assert_same_vectors(encoder.encode(texts), expected)
    assert not encoder.stats.fallbacks
    assert_same_vectors(accelerate(st).encode(texts), expected)


def test_texts_longer_than_there_are_positions_run_in_sentence_transformers() -> None:
    st = families.make_sentence_transformer("modernbert")
    st.max_seq_length = families.MAX_TOKENS + 40
    texts = [" ".join(families.make_texts(8)), "short"]
    encoder = FastEncoder(st)
    assert np.array_equal(encoder.encode(texts), st.encode(texts))
    assert "is beyond the 64 positions" in str(encoder.unsupported_reason)


def test_vectors_do_not_depend_on_the_batch() -> None:
    encoder = FastEncoder(families.make_sentence_transformer("modernbert"))
    texts = families.make_texts(40)
    together = encoder.encode(texts)
    assert all(
        (encoder.encode(text) == row).all() for text, row in zip(texts, together, strict=True)
    )
