"""Tensors of other shapes than the config tells, as pruning leaves them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import families
from families import make_sentence_transformer
from patched import LENGTHS, assert_same_states, pair, run
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.patching import counts
from surfaces import SURFACES


def _resized(linear: nn.Linear, outputs: list[int], inputs: list[int]) -> nn.Linear:
    """A layer with some rows and columns of the weight of another."""
    new = nn.Linear(len(inputs), len(outputs), bias=linear.bias is not None)
    new.weight = nn.Parameter(linear.weight.detach()[outputs][:, inputs])
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach()[outputs])
    return new


def _without_a_head(model: Any) -> None:
    """Of 4 heads of 16; as `prune_heads` of older versions of transformers leaves a layer."""
    kept, width = list(range(48)), list(range(64))
    kind = model.config.model_type
    if kind == "modernbert":
        attention = model.layers[1].attn
        rows = [64 * part + row for part in range(3) for row in kept]
        attention.Wqkv = _resized(attention.Wqkv, rows, width)
        attention.Wo = _resized(attention.Wo, width, kept)
        return
    if kind == "distilbert":
        heads = output = model.transformer.layer[1].attention
        names = "q_lin", "k_lin", "v_lin", "out_lin"
    else:
        heads, output = (getattr(model.encoder.layer[1].attention, n) for n in ("self", "output"))
        names = "query", "key", "value", "dense"
    for name in names[:3]:
        setattr(heads, name, _resized(getattr(heads, name), kept, width))
    setattr(output, names[3], _resized(getattr(output, names[3]), width, kept))


def _with_a_head_more(model: Any) -> None:
    attention = model.layers[1].attn
    attention.Wqkv.weight = nn.Parameter(torch.randn(240, 64) / 8)
    attention.Wo.weight = nn.Parameter(torch.randn(64, 80) / 8)


HEADS = {
    "bert": "encoder.layer.1.attention.self.query.weight must be of shape [64, 64], got [48, 64]",
    "roberta": "attention.self.query.weight must be of shape [64, 64], got [48, 64]",
    "distilbert": "layer.1.attention.q_lin.weight must be of shape [64, 64], got [48, 64]",
    "modernbert": "layers.1.attn.Wqkv.weight must be of shape [192, 64], got [144, 64]",
}
SHAPES = {
    **{f"pruned {name}": (name, _without_a_head, reason) for name, reason in HEADS.items()},
    "a head more": (
        "modernbert",
        _with_a_head_more,
        "layers.1.attn.Wqkv.weight must be of shape [192, 64], got [240, 64]",
    ),
}


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("case", SHAPES)
def test_a_shape_that_the_model_runs_and_the_engine_does_not(case: str, surface: str) -> None:
    name, change, reason = SHAPES[case]
    st = make_sentence_transformer(name)
    model = SURFACES[surface](st)
    model.check()
    packed = model.packed()
    change(st[0].auto_model)
    model.check()
    assert model.packed() == packed
    assert [reason in each for each in model.fallbacks()] == [True]


@pytest.mark.parametrize("surface", SURFACES)
def test_layers_of_several_inner_sizes_run_packed(surface: str) -> None:
    st = make_sentence_transformer()
    layer = st[0].auto_model.encoder.layer[1]
    layer.intermediate.dense = _resized(layer.intermediate.dense, list(range(50)), list(range(64)))
    layer.output.dense = _resized(layer.output.dense, list(range(64)), list(range(50)))
    model = SURFACES[surface](st)
    model.check()
    assert model.packed() and not model.fallbacks()


def test_the_rows_of_a_table_are_counted_in_its_weight() -> None:
    original, model = pair("bert")
    for each in (original, model):
        table = each.embeddings.word_embeddings
        table.weight = nn.Parameter(torch.cat([table.weight.detach(), torch.ones(8, 64)]))
    batch = families.make_batch("bert", LENGTHS)
    batch["input_ids"][0, 1] = table.num_embeddings + 3
    assert_same_states(run(model, batch), run(original, batch), batch["attention_mask"])
    assert counts(model) == {"packed": 1}
    table.weight = nn.Parameter(table.weight.detach()[:-8])
    for row in (table.num_embeddings + 3, table.num_embeddings):
        batch["input_ids"][0, 1] = row
        with pytest.raises(IndexError):
            run(model, batch)
    table.weight = nn.Parameter(table.weight.detach()[:-8])
    batch["input_ids"][0, 1] = table.num_embeddings - 3
    with pytest.raises(IndexError):
        run(model, batch)
    assert counts(model)["packed"] == 1


@pytest.mark.parametrize("shape", [(), (7,), (1, 8), (64, 8)], ids=str)
def test_rotary_frequencies_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = families.make_model("modernbert")
    model.rotary_emb.full_attention_inv_freq = nn.Buffer(torch.rand(shape), persistent=False)
    reason = re.escape(f"full_attention_inv_freq must be of shape [8], got {list(shape)}")
    with pytest.raises(UnsupportedModelError, match=reason):
        PackedEncoder(model)
