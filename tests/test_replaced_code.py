"""Code that is replaced, on an instance, a class or a module, is what runs."""

from __future__ import annotations

import functools
import inspect
import types
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.masking_utils as masks
import transformers.models.bert.modeling_bert as mb
import transformers.models.roberta.modeling_roberta as mr
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import InputFormatter
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.activations import GELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTION
from transformers.utils import ModelOutput

from changed import WAYS, Patch, assert_as_stock, assert_patched_as_stock, packed_runs, tiny
from families import randomize


def moved(result: Any) -> Any:
    """`result`, its tensors changed in a way that no normalisation takes back."""
    if isinstance(result, torch.Tensor):
        return result + (result > 0) * 0.5 if result.is_floating_point() else result
    if isinstance(result, tuple):
        return (moved(result[0]), *result[1:])
    if isinstance(result, list):
        return [moved(result[0]), *result[1:]]
    if isinstance(result, str):
        return f"the sea, {result}"
    for key in ("sentence_embedding", "token_embeddings", "last_hidden_state"):
        if key in result:
            result[key] = moved(result[key])
            return result
    result["input_ids"] = torch.where(result["input_ids"] > 20, 20, result["input_ids"])
    return result


def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    """As most packages wrap: the name, the module and the signature are those of the original."""

    @functools.wraps(original)
    def wrapper(*args: Any, **how: Any) -> Any:
        return moved(original(*args, **how))

    return wrapper


def on(holder: Any, name: str, wrap: Callable[[Any], Any] = wrapped) -> Patch:
    return lambda patch: patch.setattr(holder, name, wrap(getattr(holder, name)))


def mocked(original: Callable[..., Any]) -> Any:
    return unittest.mock.MagicMock(side_effect=wrapped(original))


def cached(original: Callable[..., Any]) -> Any:
    call = wrapped(original)
    return functools.lru_cache(lambda *args, **how: call(*args, **how))


class Holder:
    """A method of it is what takes the place of a function."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original

    def call(self, *args: Any, **how: Any) -> Any:
        return moved(self._original(*args, **how))


def registered(patch: pytest.MonkeyPatch) -> None:
    known = type(ATTENTION)._global_mapping
    patch.setitem(known, "sdpa", wrapped(known["sdpa"]))


def local_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ATTENTION._local_mapping, "sdpa", wrapped(ATTENTION["sdpa"]))


def another_registry(patch: pytest.MonkeyPatch) -> None:
    registry = type(ATTENTION)()
    registry["sdpa"] = wrapped(ATTENTION["sdpa"])
    patch.setattr(mb, "ALL_ATTENTION_FUNCTIONS", registry)


def all_attend(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mb, "create_bidirectional_mask", lambda **_: None)


def registered_mask(patch: pytest.MonkeyPatch) -> None:
    known = type(masks.ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping
    patch.setitem(known, "sdpa", lambda **_: None)


def new_code(function: Any) -> Patch:
    """Give a function other code in place: the object stays what it was."""

    def forward(self: Any, *args: Any, **how: Any) -> Any:
        return self.moved_forward(*args, **how)

    def apply(patch: pytest.MonkeyPatch, holder: Any = function) -> None:
        original = types.FunctionType(
            holder.__code__, holder.__globals__, "original", holder.__defaults__
        )
        original.__kwdefaults__ = holder.__kwdefaults__
        patch.setattr(nn.Module, "moved_forward", wrapped(original), raising=False)
        patch.setattr(holder, "__code__", forward.__code__)

    return apply


def new_default(patch: pytest.MonkeyPatch) -> None:
    """No special tokens, where the caller does not say."""
    function: Any = PreTrainedTokenizerBase.__call__
    names = [
        p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty
    ]
    values = list(function.__defaults__)
    values[names.index("add_special_tokens")] = False
    patch.setattr(function, "__defaults__", tuple(values))


def no_masks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mb.BertModel, "_create_attention_masks", lambda *_, **__: (None, None))


def layers_backwards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.ModuleList, "__iter__", lambda self: iter([*self._modules.values()][::-1]))


def first_tokens(patch: pytest.MonkeyPatch) -> None:
    get = BatchEncoding.__getitem__

    def first(self: Any, key: Any) -> Any:
        value = get(self, key)
        return torch.where(value > 20, 20, value) if torch.is_tensor(value) else value

    patch.setattr(BatchEncoding, "__getitem__", first)


def closure(patch: pytest.MonkeyPatch) -> None:
    (cell,) = mb.BertModel.forward.__closure__
    patch.setattr(cell, "cell_contents", wrapped(cell.cell_contents))


PATCHES: dict[str, Patch] = {
    "BertSelfAttention.forward": on(mb.BertSelfAttention, "forward"),
    "BertSelfOutput.forward": on(mb.BertSelfOutput, "forward"),
    "BertLayer.forward": on(mb.BertLayer, "forward"),
    "BertLayer.feed_forward_chunk": on(mb.BertLayer, "feed_forward_chunk"),
    "BertEncoder.forward": on(mb.BertEncoder, "forward"),
    "BertEmbeddings.forward": on(mb.BertEmbeddings, "forward"),
    "BertModel.forward": on(mb.BertModel, "forward"),
    "BertModel._create_attention_masks": no_masks,
    "GELUActivation.forward": on(GELUActivation, "forward"),
    "GradientCheckpointingLayer.__call__": on(GradientCheckpointingLayer, "__call__"),
    "Linear.forward": on(nn.Linear, "forward"),
    "LayerNorm.forward": on(nn.LayerNorm, "forward"),
    "Embedding.forward": on(nn.Embedding, "forward"),
    "Dropout.forward": on(nn.Dropout, "forward"),
    "Module.__call__": on(nn.Module, "__call__"),
    "Module._call_impl": on(nn.Module, "_call_impl"),
    "functional.linear": on(F, "linear"),
    "functional.layer_norm": on(F, "layer_norm"),
    "functional.embedding": on(F, "embedding"),
    "functional.scaled_dot_product_attention": on(F, "scaled_dot_product_attention"),
    "functional.linear by a mock": on(F, "linear", mocked),
    "functional.layer_norm by a partial": on(
        F, "layer_norm", lambda old: functools.partial(wrapped(old))
    ),
    "functional.embedding by a cache": on(F, "embedding", cached),
    "apply_chunking_to_forward by a method": on(
        mb, "apply_chunking_to_forward", lambda old: Holder(old).call
    ),
    "create_bidirectional_mask by a mock": on(
        mb, "create_bidirectional_mask", lambda _: unittest.mock.Mock(return_value=None)
    ),
    "BertSelfOutput.forward by a partial": on(
        mb.BertSelfOutput, "forward", lambda old: functools.partialmethod(wrapped(old))
    ),
    "ModelOutput.__getitem__": on(ModelOutput, "__getitem__"),
    "ModuleList.__iter__": layers_backwards,
    "closure of BertModel.forward": closure,
    "attention registered": registered,
    "attention of this registry": local_attention,
    "another registry of attention": another_registry,
    "create_bidirectional_mask": all_attend,
    "mask registered": registered_mask,
    "apply_chunking_to_forward": on(mb, "apply_chunking_to_forward"),
    "code of BertOutput.forward": new_code(mb.BertOutput.forward),
    "code of LayerNorm.forward": new_code(nn.LayerNorm.forward),
}
PATCHES_OF_MODULES: dict[str, Patch] = {
    "functional.normalize": on(F, "normalize"),
    "Pooling.forward": on(Pooling, "forward"),
    "Pooling._forward_padded": on(Pooling, "_forward_padded"),
    "Normalize.forward": on(Normalize, "forward"),
    "Transformer.forward": on(Transformer, "forward"),
    "Transformer.preprocess": on(Transformer, "preprocess"),
    "Transformer._call_processor": on(Transformer, "_call_processor"),
    "SentenceTransformer.forward": on(SentenceTransformer, "forward"),
    "SentenceTransformer.preprocess": on(SentenceTransformer, "preprocess"),
    "PreTrainedTokenizerBase.__call__": on(PreTrainedTokenizerBase, "__call__"),
    "PreTrainedTokenizerFast._encode_plus": on(PreTrainedTokenizerFast, "_encode_plus"),
    "defaults of a tokenizer": new_default,
    "BatchEncoding.__getitem__": first_tokens,
    "InputFormatter.prepend_prompt_to_texts": on(InputFormatter, "prepend_prompt_to_texts"),
    "code of Pooling.forward": new_code(Pooling.forward),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_replaced_for_every_model(patch: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_patched_as_stock(PATCHES[patch], way, monkeypatch)


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("patch", PATCHES_OF_MODULES)
@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_replaced_in_modules(patch: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_patched_as_stock(PATCHES_OF_MODULES[patch], way, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_positions_of_roberta(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def positions(ids: Any, padding: int, _: int = 0) -> Any:
        return torch.arange(ids.shape[1]).expand_as(ids) + padding + 5

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        name = "create_position_ids_from_input_ids"
        monkeypatch.setattr(mr.RobertaEmbeddings, name, staticmethod(positions))

    assert_patched_as_stock(patch, way, monkeypatch, lambda: tiny("roberta"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_eager_attention(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def eager() -> SentenceTransformer:
        model = tiny()
        model[0].auto_model.set_attn_implementation("eager")
        return model

    assert_patched_as_stock(on(mb, "eager_attention_forward"), way, monkeypatch, eager)


def layer(model: Any, index: int = 1) -> Any:
    return model[0].auto_model.encoder.layer[index]


def of_class(module: Any, **members: Any) -> None:
    """Make a module one of a subclass that looks like the class itself."""
    cls = type(module)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    module.__class__ = type(cls.__name__, (cls,), names | members)


def replaced(find: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    return lambda model: setattr(find(model), name, wrapped(getattr(find(model), name)))


def reversed_output(model: Any) -> None:
    original = model[0].auto_model.forward

    def forward(*args: Any, **how: Any) -> Any:
        result = original(*args, **how)
        result.last_hidden_state = result.last_hidden_state.flip(-1)
        return result

    model[0].auto_model.forward = forward


INSIDE: dict[str, Callable[[Any], Any]] = {
    "feed_forward_chunk": replaced(layer, "feed_forward_chunk"),
    "forward of an embedding": replaced(
        lambda m: m[0].auto_model.embeddings.word_embeddings, "forward"
    ),
    "forward of another layer": lambda m: setattr(layer(m), "forward", layer(m, 2).forward),
    "masks": lambda m: setattr(
        m[0].auto_model, "_create_attention_masks", lambda *_, **__: (None, None)
    ),
    "class of a layer": lambda m: of_class(layer(m), forward=wrapped(mb.BertLayer.forward)),
    "class of a norm": lambda m: of_class(
        layer(m).output.LayerNorm, forward=wrapped(nn.LayerNorm.forward)
    ),
    "call of a class": lambda m: of_class(
        layer(m).attention.self, __call__=wrapped(nn.Module.__call__)
    ),
    "property of a class": lambda m: of_class(
        layer(m).attention.self, scaling=property(lambda _: 0.7, lambda *_: None)
    ),
}
AROUND: dict[str, Callable[[Any], Any]] = {
    "forward of the base model": reversed_output,
    "forward of another base model": lambda m: setattr(
        m[0].auto_model, "forward", randomize(tiny()[0].auto_model, seed=1).forward
    ),
    "class of the base model": lambda m: of_class(
        m[0].auto_model, forward=wrapped(mb.BertModel.forward)
    ),
    "_call_processor": replaced(lambda m: m[0], "_call_processor"),
    "parse_inputs": lambda m: setattr(
        m[0].input_formatter,
        "parse_inputs",
        lambda inputs: type(m[0].input_formatter).parse_inputs(
            m[0].input_formatter, [f"the sea, {text}" for text in inputs]
        ),
    ),
    "_forward_padded": replaced(lambda m: m[1], "_forward_padded"),
    "class of Pooling": lambda m: of_class(m[1], forward=wrapped(Pooling.forward)),
    "class of Normalize": lambda m: of_class(m[2], forward=wrapped(Normalize.forward)),
    "_encode_plus of the tokenizer": replaced(lambda m: m.tokenizer, "_encode_plus"),
    "class of the tokenizer": lambda m: of_class(
        m.tokenizer, __call__=wrapped(PreTrainedTokenizerBase.__call__)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", INSIDE)
@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_replaced_inside_a_model(change: str, way: str) -> None:
    model = assert_as_stock(INSIDE[change], way)
    assert packed_runs(model)[1] > 0


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("change", AROUND)
@pytest.mark.filterwarnings("ignore:FastEncoder runs this model in sentence-transformers")
def test_replaced_around_a_model(change: str, way: str) -> None:
    model = assert_as_stock(AROUND[change], way)
    assert packed_runs(model)[1] > 0
