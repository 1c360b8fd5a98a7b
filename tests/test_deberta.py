"""DeBERTa-v2: what its configs may say, its buckets, its live weights, and what runs in stock."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deberta_v2 import modeling_deberta_v2 as stock

import families
from checks import MAX_DISTANCE, cosine_distances
from packed import assert_packed_as_stock, assert_same, packed_states, reference_states
from patched import assert_identical, assert_same_states, pair, run
from sbert_fast import models
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.patching import counts

NAME = "deberta-v2"
LENGTHS = [3, 20, 41, 64]
pytestmark = pytest.mark.skipif(
    NAME not in families.FAMILIES, reason="this transformers compiles DeBERTa by TorchScript"
)
APART = {"share_att_key": False}
CONFIGS: list[dict[str, Any]] = [
    {"pos_att_type": ["c2p"]},
    {"pos_att_type": ["p2c"]},
    {"pos_att_type": "c2p|p2c"},
    {"pos_att_type": ["p2c", "p2p"], "share_att_key": True},
    {"position_buckets": -1},
    {"position_buckets": 0, "max_relative_positions": 10},
    {"position_buckets": 6, "max_relative_positions": 20},
    {"position_buckets": 9, "max_relative_positions": 20},
    {"position_buckets": 256, "max_relative_positions": 512},
    APART,
    APART | {"pos_att_type": ["c2p"]},
    APART | {"pos_att_type": ["p2c"], "position_buckets": -1},
    {"norm_rel_ebd": "none"},
    {"norm_rel_ebd": "LAYER_NORM | other"},
    {"position_biased_input": True},
    {"type_vocab_size": 2},
    {"embedding_size": 40, "position_biased_input": True},
    {"relative_attention": False, "norm_rel_ebd": "none"},
    {"relative_attention": False, "norm_rel_ebd": "none", "pos_att_type": None},
    {"attention_head_size": 16, "legacy": False, "hidden_act": "gelu_new"},
    {"layer_norm_eps": 1e-3},
]


@pytest.mark.parametrize("overrides", CONFIGS, ids=str)
def test_configs(overrides: dict[str, Any]) -> None:
    assert_packed_as_stock(families.make_model(NAME, **overrides), NAME, LENGTHS)


REFUSED: dict[str, dict[str, Any]] = {
    r"config\.conv_kernel_size must be 0, got 3": {"conv_kernel_size": 3},
    r"config\.pos_att_type must name c2p or p2c with relative_attention, got \[\]": {
        "pos_att_type": []
    },
    "config.position_buckets and max_relative_positions must lead .*, got 2 and 64": {
        "position_buckets": 2
    },
    "config.position_buckets and max_relative_positions must lead .*, got 16 and 9": {
        "max_relative_positions": 9
    },
    "a setting that this version cannot read: ZeroDivisionError": {"position_buckets": 1},
    r"attention\.self\.query_proj|output\.dense\.weight must be of shape \[64, 32\]": {
        "attention_head_size": 8
    },
    "activation must be one of": {"hidden_act": "relu"},
}


@pytest.mark.parametrize("match", REFUSED)
def test_configs_that_are_refused(match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        PackedEncoder(families.make_model(NAME, **REFUSED[match]))


def test_more_steps_of_the_last_layer_are_refused() -> None:
    made = families.make_model(NAME)
    made.z_steps = 2
    with pytest.raises(UnsupportedModelError, match="z_steps must be 0 or 1, got 2"):
        PackedEncoder(made)


@pytest.mark.parametrize("rows", [31, 32, 50])
def test_rows_of_the_table(rows: int) -> None:
    """Distances lead to 32."""
    made = families.make_model(NAME)
    made.encoder.rel_embeddings = families.randomize(nn.Embedding(rows, 64))
    if rows < 32:
        with pytest.raises(
            UnsupportedModelError, match=r"rel_embeddings.* \[32, 64\], got \[31, 64"
        ):
            PackedEncoder(made)
    else:
        assert_packed_as_stock(made, NAME, LENGTHS)


@pytest.mark.parametrize(
    ("buckets", "most"), [(256, 512), (32, -1), (33, 80), (8, 6), (-1, -1), (0, 40)]
)
def test_buckets(buckets: int, most: int) -> None:
    """Of tokens further apart than any text is long, too."""
    length = 700
    sizes = {"position_buckets": buckets, "max_relative_positions": most}
    made = families.make_model(NAME, num_hidden_layers=1, max_position_embeddings=512, **sizes)
    (layer,) = models.read(made)[1].layers
    part = layer.attention.disentangled
    x, encoder = torch.zeros(1, length, 1), made.encoder
    rows = stock.build_relative_position(
        x, x, bucket_size=encoder.position_buckets, max_position=encoder.max_relative_positions
    )
    span = made.encoder.layer[0].attention.self.pos_ebd_size
    ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
    reach = len(part.buckets) // 2
    ours = torch.tensor(part.buckets)[ahead.clamp(-reach, reach) + reach]
    assert torch.equal(ours, (rows[0] + span).clamp(0, 2 * span - 1))
    assert torch.equal(ours, (-rows[0].T + span).clamp(0, 2 * span - 1))
    assert len(part.buckets) <= 2 * (span + encoder.max_relative_positions) + 1


SOURCES = {
    "shared": (
        "encoder.rel_embeddings.weight",
        "encoder.LayerNorm.weight",
        "encoder.LayerNorm.bias",
        "encoder.layer.0.attention.self.key_proj.weight",
        "encoder.layer.1.attention.self.query_proj.bias",
    ),
    "apart": (
        "encoder.rel_embeddings.weight",
        "encoder.layer.2.attention.self.pos_key_proj.weight",
        "encoder.layer.1.attention.self.pos_query_proj.weight",
        "encoder.layer.0.attention.self.pos_query_proj.bias",
    ),
}


@pytest.mark.parametrize("live", [False, True], ids=["copied", "live"])
@pytest.mark.parametrize(
    ("name", "shared"), [(name, kind == "shared") for kind in SOURCES for name in SOURCES[kind]]
)
def test_tables_follow_their_sources(name: str, shared: bool, live: bool) -> None:
    made = families.make_model(NAME, share_att_key=shared)
    encoder, batch = PackedEncoder(made, live=live), families.make_batch(NAME, LENGTHS)
    before = packed_states(encoder, batch)
    # No count of writes is raised.
    weight: Tensor = made.get_parameter(name).data
    weight.copy_(weight.flip(0) * 2)
    after = packed_states(encoder, batch)
    assert_same(after, reference_states(made, batch))
    assert cosine_distances(torch.cat(after), torch.cat(before)).max() > MAX_DISTANCE


@pytest.mark.parametrize("kind", ["left", "bool", "float", "positions", "embeddings"])
def test_calls_that_run_packed(kind: str) -> None:
    original, ours = pair(NAME)
    batch: dict[str, Any] = families.make_batch(NAME, LENGTHS)
    if kind == "left":
        batch = {key: tensor.flip(1) for key, tensor in batch.items()}
    elif kind == "positions":
        batch = families.make_batch(NAME, [100, 3])
        batch["position_ids"] = torch.zeros(1, 100, dtype=torch.long)
    elif kind == "embeddings":
        batch["inputs_embeds"] = torch.randn(4, 64, 64)
        del batch["input_ids"]
    else:
        batch["attention_mask"] = batch["attention_mask"].to(getattr(torch, kind))
    assert_same_states(run(ours, batch), run(original, batch), batch["attention_mask"])
    assert counts(ours) == {"packed": 1}


IN_STOCK = {
    "attention_mask has gaps, and the model measures distances": lambda mask: mask[:, 5:9].zero_(),
    "attention_mask has other numbers than 0 and 1, which are factors": lambda mask: mask.mul_(2),
}


@pytest.mark.parametrize("reason", IN_STOCK)
def test_masks_that_run_in_stock(reason: str) -> None:
    original, ours = pair(NAME)
    batch = families.make_batch(NAME, LENGTHS)
    IN_STOCK[reason](batch["attention_mask"])
    assert_identical(run(ours, batch), run(original, batch))
    assert counts(ours) == {reason: 1}


@pytest.mark.parametrize("name", [NAME, "mpnet"])
@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states", "return_dict"])
@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("given", [None, False, True])
def test_flags(name: str, flag: str, in_config: bool, given: bool | None) -> None:
    """None leaves it to the config."""
    original, ours = pair(name, attn_implementation="eager", **{flag: in_config})
    batch = families.make_batch(name, [64, 64]) | {flag: given}
    output, expected = run(ours, batch), run(original, batch)
    assert type(output) is type(expected)
    assert len(output) == len(expected)
    attends = flag == "output_attentions" and (in_config if given is None else given)
    reason = "output_attentions was asked for" if attends else "packed"
    assert counts(ours) == {reason: 1}


def test_older_versions_compile_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings(action="ignore"):
        compiled = torch.jit.script(stock.scaled_size_sqrt)
    monkeypatch.setattr(stock, "scaled_size_sqrt", compiled)
    reason = models.refusal(families.make_model(NAME))
    assert reason is not None and reason.endswith(".scaled_size_sqrt is compiled by TorchScript")
