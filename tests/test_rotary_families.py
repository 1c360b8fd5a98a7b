"""Families with rotary positions and no table of them: what their configs may say, and Qwen3's
causal attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import families
from checks import assert_same_result, assert_same_vectors
from packed import assert_packed_as_stock, assert_same, packed_states, reference_states
from patched import assert_identical, assert_same_states, pair, run
from sbert_fast import FastEncoder
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.patching import counts
from sbert_fast.testing import assert_close_to_oracle

LENGTHS = [3, 20, 41, 64]
# One kind of rotary positions a model, or two.
ONE = ("nomic_bert", "gte", "jina_embeddings_v3", "eurobert", "qwen3")
TWO = ("modernbert", "gemma3_text")
FAMILIES = [name for name in (*ONE, *TWO) if name in families.FAMILIES]
every_family = pytest.mark.parametrize("name", FAMILIES)
every_with_one = pytest.mark.parametrize("name", [name for name in FAMILIES if name in ONE])
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
CONFIGS = [
    ("nomic_bert", {"hidden_act": "gelu"}),
    ("nomic_bert", {"type_vocab_size": 1}),
    ("nomic_bert", {"head_dim": 24}),
    ("gte", {"type_vocab_size": 1}),
    ("gte", {"hidden_act": "silu"}),
    ("jina_embeddings_v3", {"hidden_act": "gelu_new"}),
    ("eurobert", {"attention_bias": True, "mlp_bias": True}),
    ("eurobert", {"num_key_value_heads": 4}),
    ("gemma3_text", {"use_bidirectional_attention": False}),
    ("gemma3_text", {"use_bidirectional_attention": False, "layer_types": ["full_attention"] * 3}),
    ("gemma3_text", {"num_key_value_heads": 4, "attention_bias": True}),
    ("gemma3_text", {"hidden_act": "gelu"}),
    ("qwen3", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
]


@pytest.mark.parametrize(
    ("name", "overrides"), [each for each in CONFIGS if each[0] in FAMILIES], ids=str
)
def test_configs(name: str, overrides: dict[str, Any]) -> None:
    assert_packed_as_stock(families.make_model(name, **overrides), name, LENGTHS)


@every_with_one
@pytest.mark.parametrize("parameters", [{"rope_type": "default", "rope_theta": 50.0}, LINEAR])
def test_frequencies(name: str, parameters: dict[str, Any]) -> None:
    assert_packed_as_stock(families.make_model(name, rope_parameters=parameters), name, LENGTHS)


@every_family
def test_frequencies_are_read_live(name: str) -> None:
    made, batch = families.make_model(name), families.make_batch(name, LENGTHS)
    engine = PackedEncoder(made)
    before = torch.cat(packed_states(engine, batch))
    (frequencies, *_) = (b for n, b in made.named_buffers() if n.endswith("inv_freq"))
    frequencies.data.mul_(0.5)
    after = packed_states(engine, batch)
    assert not torch.equal(before, torch.cat(after))
    assert_same(after, reference_states(made, batch))


@every_family
def test_another_kind_of_rotary_positions_is_refused(name: str) -> None:
    made, kind, prefix = families.make_model(name), "dynamic", ""
    if name in TWO:
        made.rotary_emb.rope_type["full_attention"], prefix = kind, "full_attention_"
    else:
        made.rotary_emb.rope_type = kind
    with pytest.raises(UnsupportedModelError, match="type default, linear, llama3, got 'dynamic'"):
        PackedEncoder(made)
    made = families.make_model(name)
    setattr(made.rotary_emb, f"{prefix}attention_scaling", 0.5)
    with pytest.raises(UnsupportedModelError, match="attention_scaling must be 1, got 0.5"):
        PackedEncoder(made)


@every_family
@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "cls", "weightedmean"])
def test_padding_on_the_left(name: str, pooling: str) -> None:
    st = families.make_sentence_transformer(name, pooling=pooling)
    # Of no account to texts, which no template turns into messages.
    st.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    texts, encoder = families.make_texts(9), FastEncoder(st)
    st.tokenizer.padding_side = "left"
    assert_same_vectors(encoder.encode(texts), st.encode(texts))
    packed = pooling in ("lasttoken", "mean")
    assert encoder.stats.fallbacks == ({} if packed else {"the tokenizer pads on the left": 1})
    for ours, theirs in zip(
        *(m.encode(texts, output_value="token_embeddings") for m in (encoder, st)), strict=True
    ):
        assert_same_result(ours, theirs)
    assert sum(encoder.stats.fallbacks.values()) == 2 - packed


@every_with_one
@pytest.mark.parametrize("part", ["left", "gaps", "positions"])
def test_masks_and_positions(name: str, part: str) -> None:
    original, ours = pair(name)
    batch: dict[str, Any] = families.make_batch(name, LENGTHS)
    if part == "left":
        # A pooler reads the first column.
        lengths = [64, 64] if getattr(original, "pooler", None) is not None else LENGTHS
        batch = {k: t.flip(1) for k, t in families.make_batch(name, lengths).items()}
    elif part == "gaps":
        batch["attention_mask"][3, 20:32] = 0
    else:
        batch["position_ids"] = torch.arange(64).flip(0).expand(4, -1)
    assert_same_states(run(ours, batch), run(original, batch), batch["attention_mask"])
    assert counts(ours) == {"packed": 1}


CAUSAL = {
    "use_cache was asked for": {"use_cache": True},
    "position_ids were given without attention_mask": {
        "attention_mask": None,
        "position_ids": torch.arange(32).repeat(2)[None],
    },
}


@pytest.mark.parametrize("reason", CAUSAL)
def test_calls_of_causal_models_that_run_in_the_original(reason: str) -> None:
    original, ours = pair("qwen3")
    batch: Any = families.make_batch("qwen3", [64]) | CAUSAL[reason]
    output, expected = run(ours, batch), run(original, batch)
    assert type(output) is type(expected)
    assert (output.past_key_values is None) == (expected.past_key_values is None)
    assert_identical(output[:1], expected[:1])
    assert counts(ours) == {reason: 1}


def test_embeddings_as_input_are_not_scaled() -> None:
    original, ours = pair("gemma3_text")
    batch: Any = families.make_batch("gemma3_text", LENGTHS)
    torch.manual_seed(0)
    batch["inputs_embeds"], keep = torch.randn(4, 64, 64), batch["attention_mask"].bool()
    del batch["input_ids"]
    found, peer = (run(m, batch)[0][keep] for m in (ours, original))
    batch["inputs_embeds"] = batch["inputs_embeds"].double()
    oracle = run(original.double(), batch)[0][keep]
    assert_close_to_oracle(found, oracle, peer, torch.float32)
    assert counts(ours) == {"packed": 1}


def test_a_causal_model_that_was_made_bidirectional_is_refused() -> None:
    made = families.make_model("qwen3")
    made.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match=r"config\.is_causal is False"):
        PackedEncoder(made)


def test_outputs_of_a_causal_model() -> None:
    original, ours = pair("qwen3")
    batch = families.make_batch("qwen3", LENGTHS)
    output, expected = run(ours, batch), run(original, batch)
    assert type(output) is type(expected) and output.keys() == expected.keys()
    assert counts(ours) == {"packed": 1}


_with = families.with_setting
REFUSED = {
    "heads of keys that divide no heads": (
        _with("config.num_key_value_heads", 3, "qwen3"),
        "divide that of heads, 4, got 3",
    ),
    "heads that divide no states": (
        _with("config.num_attention_heads", 5),
        "hidden size 64 is not a multiple of 5 heads",
    ),
    "an activation that nobody knows": (
        _with("config.hidden_act", "nope", "qwen3"),
        "activation must be one of .*, got 'nope'",
    ),
    "no base of rotary positions": (
        _with("config.rope_parameters", {"rope_type": "default"}, "qwen3"),
        "Qwen3Model cannot be made of its config: KeyError: 'rope_theta'",
    ),
    "no heads of keys": (
        _with("config.num_key_value_heads", 0, "qwen3"),
        "keys must be 1 to 4",
    ),
    "another kind of layers": (
        _with("config.layer_types", ["sliding_attention"] * 3, "qwen3"),
        "has_sliding_layers is not what Qwen3Model makes of the config",
    ),
    "a causal mask": (
        _with("config.use_bidirectional_attention", False, "gemma3_text"),
        "is not what Gemma3Attention makes of the config",
    ),
    "eps of the norms of heads": (
        _with("layers.1.self_attn.q_norm.variance_epsilon", 0.5, "qwen3"),
        "eps of the norms of heads differ: 0.5",
    ),
    "softcapping": (
        _with("layers.1.self_attn.attn_logit_softcapping", 30.0, "gemma3_text"),
        "attn_logit_softcapping is 30.0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        PackedEncoder(make())
