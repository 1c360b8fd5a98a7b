"""State that is not a parameter: buffers, the layout of tensors, and modules that read padding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Module, Pooling
from torch import Tensor, nn
from torch.func import functional_call

import families
import sbert_fast
from checks import MAX_DISTANCE, assert_same_vectors, cosine_distances
from families import make_sentence_transformer, randomize
from patched import LENGTHS, pair, run
from surfaces import SURFACES, TEXTS

# Positions that repeat, as when a position table is stretched over longer texts.
STRETCHED = torch.arange(families.MAX_TOKENS)[None] // 2

CNN = sentence_transformers.sentence_transformer.modules.CNN

# Layers


@pytest.mark.parametrize("surface", SURFACES)
def test_layers_in_another_order(surface: str) -> None:
    st = make_sentence_transformer()
    layers = st[0].auto_model.encoder.layer
    layers._modules = OrderedDict(layers._modules)
    model = SURFACES[surface](st)
    before = model.check()
    layers._modules.move_to_end("0")
    assert cosine_distances(model.check(), before).max() > MAX_DISTANCE


# Buffers


def _shifted(embeddings: Any) -> None:
    embeddings.position_ids = (embeddings.position_ids + 7) % families.MAX_TOKENS


def _reversed_in_place(embeddings: Any) -> None:
    # What is registered is an expanded view; its rows are written all the same.
    embeddings.position_ids.copy_(embeddings.position_ids.flip(-1))


def _grouped(embeddings: Any) -> None:
    embeddings.register_buffer("position_ids", STRETCHED.clone(), persistent=False)


def _through_data(embeddings: Any) -> None:
    embeddings.position_ids.data[:, :8] = 3


def _longer(embeddings: Any) -> None:
    """As Longformer's conversion does it: a longer table, and positions that start elsewhere."""
    table = embeddings.position_embeddings.weight.data
    embeddings.position_embeddings = nn.Embedding.from_pretrained(torch.cat([table, table.flip(0)]))
    embeddings.position_ids = torch.arange(2 * families.MAX_TOKENS)[None] + 40
    embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)


def _ones(embeddings: Any) -> None:
    embeddings.token_type_ids = torch.ones_like(embeddings.token_type_ids)


def _ones_in_place(embeddings: Any) -> None:
    embeddings.token_type_ids.fill_(1)


def _second_half(embeddings: Any) -> None:
    embeddings.token_type_ids[:, 4:] = 1


POSITIONS = (_shifted, _reversed_in_place, _grouped, _through_data, _longer)
TYPES = (_ones, _ones_in_place, _second_half)
BUFFERS = [
    *(("bert", write) for write in (*POSITIONS, *TYPES)),
    ("distilbert", _shifted),
    ("electra", _second_half),
    ("roberta", _ones),
]


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(("name", "write"), BUFFERS)
def test_buffers_are_honoured(surface: str, name: str, write: Callable[[Any], None]) -> None:
    st = make_sentence_transformer(name)
    st.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = SURFACES[surface](st)
    untouched = model.check()
    write(st[0].auto_model.embeddings)
    assert cosine_distances(model.check(), untouched).max() > MAX_DISTANCE
    if surface == "encode":
        SURFACES[surface](st).check()


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    "write", [_through_data, lambda e: setattr(e.position_ids, "data", STRETCHED)]
)
def test_a_buffer_in_the_place_of_an_equal_one(surface: str, write: Callable[[Any], None]) -> None:
    """What was prepared still serves; what was compared is another tensor."""
    st = make_sentence_transformer()
    model, embeddings = SURFACES[surface](st), st[0].auto_model.embeddings
    untouched = model.check()
    embeddings.position_ids = embeddings.position_ids.clone()
    assert np.array_equal(model.check(), untouched)
    write(embeddings)
    assert cosine_distances(model.check(), untouched).max() > MAX_DISTANCE


def test_a_buffer_given_to_functional_call() -> None:
    original, model = pair("bert")
    ids = families.make_batch("bert", [9, 9])["input_ids"]
    run(model, {"input_ids": ids})
    buffers = {"embeddings.position_ids": torch.arange(families.MAX_TOKENS).flip(0)[None]}
    with torch.inference_mode():
        ours, theirs = (functional_call(m, buffers, (ids,))[0] for m in (model, original))
    assert_same_vectors(ours, theirs)


@pytest.mark.parametrize("surface", SURFACES)
def test_a_table_that_is_renormalised_when_read(surface: str) -> None:
    """The lookup writes to the table: stock's vectors, whoever looks up first."""
    st, other = make_sentence_transformer(), make_sentence_transformer()
    model = SURFACES[surface](st)
    before = model.check()
    for each in (st, other):
        each[0].auto_model.embeddings.word_embeddings.max_norm = 3.0
    after = model.ours()
    # Such a model cannot be accelerated any more.
    theirs = model if surface == "accelerate" else SURFACES[surface](other)
    assert_same_vectors(after, theirs.stock())
    assert cosine_distances(after, before).max() > MAX_DISTANCE


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("module", [nn.Tanh, lambda: nn.LayerNorm(64, elementwise_affine=False)])
def test_a_module_in_the_place_of_dropout(surface: str, module: Callable[[], nn.Module]) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    before = model.check()
    st[0].auto_model.embeddings.dropout = module()
    assert cosine_distances(model.check(), before).max() > MAX_DISTANCE


# Layouts


def _fortran(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def _every_second_column(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, 9)], -1).flatten(-2)[..., ::2]


def _columns_of_a_wider_one(tensor: Tensor) -> Tensor:
    wide = torch.cat([tensor, tensor * 3], -1)
    return wide[..., : tensor.shape[-1]]


def _off_alignment(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)


def _one_row(tensor: Tensor) -> Tensor:
    """Every row the same, of one row in memory."""
    return tensor[:1].expand_as(tensor)


WORD = "embeddings.word_embeddings.weight"
MATRICES = (
    WORD,
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    "encoder.layer.1.attention.self.key.weight",
    "encoder.layer.1.output.dense.weight",
)
VECTORS = ("embeddings.LayerNorm.weight", "encoder.layer.2.output.LayerNorm.bias")
ROW_LAYOUTS = (_every_second_column, _off_alignment)
LAYOUTS = [
    *((name, layout) for name in MATRICES for layout in (_fortran, _every_second_column)),
    *((WORD, layout) for layout in (_columns_of_a_wider_one, _off_alignment)),
    ("embeddings.token_type_embeddings.weight", _one_row),
    ("encoder.layer.0.intermediate.dense.bias", _one_row),
    *(
        (name, layout)
        for name in (*VECTORS, "encoder.layer.0.output.dense.bias")
        for layout in (*ROW_LAYOUTS, _one_row)
    ),
]


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_any_layout_of_parameters(
    surface: str, name: str, layout: Callable[[Tensor], Tensor]
) -> None:
    st = make_sentence_transformer()
    model = SURFACES[surface](st)
    model.check()
    parameter = st[0].auto_model.get_parameter(name)
    parameter.data = layout(parameter.data)
    for each in (model, SURFACES[surface](st)):
        each.check()
        assert each.fallbacks() == {}


@pytest.mark.parametrize("layout", [_fortran, _every_second_column])
def test_any_layout_of_a_dense_module(layout: Callable[[Tensor], Tensor]) -> None:
    dense = randomize(Dense(64, 24))
    for parameter in dense.parameters():
        parameter.data = layout(parameter.data) if parameter.dim() == 2 else parameter.data
    st = SentenceTransformer(modules=[*make_sentence_transformer(normalize=False), dense])
    SURFACES["encode"](st.cpu()).check()


@pytest.mark.parametrize("layout", [_fortran, _every_second_column, _off_alignment, _one_row])
def test_any_layout_of_inputs(layout: Callable[[Tensor], Tensor]) -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    batch = {name: layout(value) for name, value in batch.items()}
    ours, theirs = run(model, batch)[0], run(original, batch)[0]
    keep = batch["attention_mask"].bool()
    assert_same_vectors(ours[keep], theirs[keep])
    assert sbert_fast.patching.counts(model) == {"packed": 1}


def test_double_precision() -> None:
    st = make_sentence_transformer().double()
    for surface in SURFACES.values():
        surface(st).check()


# Modules behind the base model


class _PlainMean(Module):
    """A mean over all columns, padding included."""

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        return features | {"sentence_embedding": features["token_embeddings"].mean(1)}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


class _Smoothed(Module):
    """Every state averaged with its neighbours."""

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        states = features["token_embeddings"].mT
        return features | {"token_embeddings": nn.functional.avg_pool1d(states, 3, 1, 1).mT}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


READERS: dict[str, Callable[[], list[nn.Module]]] = {
    "CNN": lambda: [CNN(64, 8), Pooling(24)],
    "strided CNN": lambda: [CNN(64, 8, [3], [1]), Pooling(8, "max")],
    "own mean": lambda: [_PlainMean()],
    "own smoothing": lambda: [_Smoothed(), Pooling(64, "mean")],
}


@pytest.mark.parametrize("reader", READERS)
def test_a_module_that_reads_padding(reader: str) -> None:
    torch.manual_seed(0)
    behind = READERS[reader]()
    transformer = make_sentence_transformer()[0]
    st = SentenceTransformer(modules=[transformer, *behind], device="cpu").eval()
    expected = st.encode(TEXTS)
    sbert_fast.accelerate(st)
    assert_same_vectors(st.encode(TEXTS), expected)
    counted = sbert_fast.counts(st)
    assert counted.pop("packed", 0) == 0
    assert sum(counted.values()) == 1


def test_counts_is_exported() -> None:
    assert "counts" in sbert_fast.__all__
    assert sbert_fast.counts is sbert_fast.patching.counts
