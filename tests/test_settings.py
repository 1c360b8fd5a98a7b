"""Settings that are changed after loading: the next call gives what stock gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from changed import TEXTS, WAYS, assert_as_stock, tiny
from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder

EXPANSION = {"strategy": "fixed", "attend": True, "length": 32}


def base(model: Any) -> Any:
    return model[0].auto_model


def attention(model: Any, layer: int = 0) -> Any:
    return base(model).encoder.layer[layer].attention.self


def set_all(model: Any, name: str, value: object) -> None:
    for module in base(model).modules():
        if hasattr(module, name):
            setattr(module, name, value)


def replace_config(model: Any) -> None:
    base(model).config = copy.deepcopy(base(model).config)
    base(model).config.is_decoder = True


def another_attention_in_one_layer(model: Any) -> None:
    def halved(*args: Any, **how: Any) -> Any:
        output, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **how)
        return output * 0.5, weights

    ALL_ATTENTION_FUNCTIONS["halved"] = halved
    attention(model, 1).config = copy.deepcopy(base(model).config)
    attention(model, 1).config._attn_implementation = "halved"


@pytest.fixture(autouse=True)
def same_attention_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ALL_ATTENTION_FUNCTIONS, "_local_mapping", dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    )


# Of the base model: what its forward reads besides weights.
OF_THE_BASE: dict[str, Callable[[Any], Any]] = {
    "is_decoder": lambda m: setattr(base(m).config, "is_decoder", True),
    "another config": replace_config,
    "another config in one layer": another_attention_in_one_layer,
    "scaling of one layer": lambda m: setattr(attention(m), "scaling", 0.7),
    "scaling, an integer": lambda m: set_all(m, "scaling", 1),
    "heads": lambda m: setattr(attention(m, 2), "attention_head_size", 32),
    "activation inside its module": lambda m: setattr(
        base(m).encoder.layer[0].intermediate.intermediate_act_fn, "act", torch.relu
    ),
    "eps": lambda m: setattr(base(m).encoder.layer[1].output.LayerNorm, "eps", 0.5),
    "largest norm of an embedding": lambda m: setattr(
        base(m).embeddings.word_embeddings, "max_norm", 1.0
    ),
    "order of layers": lambda m: base(m).encoder.layer.__setitem__(0, base(m).encoder.layer[2]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", OF_THE_BASE)
def test_settings_of_the_base_model(setting: str, way: str) -> None:
    assert_as_stock(OF_THE_BASE[setting], way)


@pytest.mark.parametrize("way", WAYS)
def test_causal_attention_without_a_mask(way: str) -> None:
    texts = [TEXTS[0]] * 3
    assert_as_stock(lambda m: set_all(m, "is_causal", True), way, texts=texts)


@pytest.mark.parametrize("way", WAYS)
def test_first_position_of_roberta(way: str) -> None:
    def change(model: Any) -> None:
        base(model).embeddings.padding_idx = 7

    assert_as_stock(change, way, make=lambda: tiny("roberta"))


def with_tail() -> SentenceTransformer:
    model = make_sentence_transformer(pooling=("mean", "max"))
    model[1].pooling_mode = list(model[1].pooling_mode)
    torch.manual_seed(0)
    model.append(Dense(128, 128, activation_function=nn.Tanh(), use_residual=False))
    return model.eval()


def edit_in_place(holder: Any, key: Any, value: object) -> None:
    holder[key] = value


def _flipped(graph: Any, _: Any) -> Callable[..., Any]:
    """A backend that computes something else."""
    return lambda *inputs: tuple(x.flip(-1) if x.is_floating_point() else x for x in graph(*inputs))


# Of the modules of sentence-transformers; the method that the setting is for.
OF_THE_MODULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "query_length": (lambda m: setattr(m[0], "query_length", 5), "encode_query"),
    "document_length": (lambda m: setattr(m[0], "document_length", 5), "encode_document"),
    "query_expansion": (lambda m: setattr(m[0], "query_expansion", EXPANSION), "encode_query"),
    "max_length of texts": (
        lambda m: setattr(m[0], "processing_kwargs", {"text": {"max_length": 5}}),
        "encode",
    ),
    "max_length of texts, in place": (
        lambda m: edit_in_place(m[0].processing_kwargs, "text", {"max_length": 4}),
        "encode",
    ),
    "no special tokens": (
        lambda m: edit_in_place(m[0].processing_kwargs, "text", {"add_special_tokens": False}),
        "encode",
    ),
    "padding on the left": (
        lambda m: edit_in_place(m[0].processing_kwargs, "common", {"padding_side": "left"}),
        "encode",
    ),
    "max_seq_length": (lambda m: setattr(m, "max_seq_length", 5), "encode"),
    "no mask for the model": (
        lambda m: setattr(m[0], "model_forward_params", {"input_ids"}),
        "encode",
    ),
    "Normalize.module_input_name": (lambda m: setattr(m[2], "module_input_name", "none"), "encode"),
    "Normalize.module_output_name": (lambda m: setattr(m[2], "module_output_name", "n"), "encode"),
    "Dense.module_output_name": (lambda m: setattr(m[3], "module_output_name", "d"), "encode"),
    "Dense.use_residual": (lambda m: setattr(m[3], "use_residual", True), "encode"),
    "Dense.activation_function": (
        lambda m: setattr(m[3], "activation_function", nn.Sigmoid()),
        "encode",
    ),
    "an activation over the rows": (
        lambda m: setattr(m[3], "activation_function", nn.Softmax(dim=0)),
        "encode",
    ),
    "an activation that drops": (
        lambda m: setattr(m[3], "activation_function", nn.Sequential(nn.Sigmoid(), nn.Dropout())),
        "encode",
    ),
    "a compiled module": (lambda m: m[1].compile(backend=_flipped), "encode"),
    "pooling_mode, in place": (lambda m: edit_in_place(m[1].pooling_mode, 0, "cls"), "encode"),
    "prompts, in place": (lambda m: edit_in_place(m.prompts, "query", "the sea: "), "encode_query"),
    "default_prompt_name": (
        lambda m: (
            edit_in_place(m.prompts, "short", "the sea: "),
            setattr(m, "default_prompt_name", "short"),
        ),
        "encode",
    ),
}


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("setting", OF_THE_MODULES)
def test_settings_of_the_modules(setting: str, way: str) -> None:
    change, call = OF_THE_MODULES[setting]
    assert_as_stock(change, way, make=with_tail, call=call)


def test_truncate_dim_after_loading() -> None:
    assert FastEncoder(tiny()).encode("a").shape == (64,)
    stock, encoder = tiny(), FastEncoder(tiny())
    for model in (stock, encoder):
        model.encode("a")
        model.truncate_dim = 5
    assert encoder.encode(TEXTS).shape == stock.encode(TEXTS).shape == (3, 5)


# Read by nothing that computes vectors.
INERT: dict[str, Callable[[Any], Any]] = {
    "do_lower_case": lambda m: setattr(m[0], "do_lower_case", True),
    "unpad_inputs": lambda m: setattr(m[0], "unpad_inputs", False),
    "embedding_dimension": lambda m: setattr(m[1], "embedding_dimension", 7),
    "chunk_size_feed_forward": lambda m: setattr(base(m).config, "chunk_size_feed_forward", 2),
    "id2label": lambda m: edit_in_place(base(m).config.id2label, 0, "sea"),
    "probability of dropout": lambda m: setattr(attention(m).dropout, "p", 0.9),
    "an attribute of the user's": lambda m: setattr(base(m), "notes", ["mine"]),
    "trainable": lambda m: base(m).requires_grad_(False),
    "train and back": lambda m: m.train().eval(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", INERT)
def test_settings_that_change_nothing(setting: str, way: str) -> None:
    assert_as_stock(INERT[setting], way, matters=False)


def test_a_setting_that_is_put_back_runs_packed_again() -> None:
    encoder = FastEncoder(tiny())
    expected = encoder.encode(TEXTS)
    for holder, name, value in (
        (attention(encoder), "scaling", 0.7),
        (base(encoder).config, "is_decoder", True),
        (encoder[0], "processing_kwargs", {"text": {"max_length": 5}}),
        (encoder[2], "module_input_name", "none"),
    ):
        before = getattr(holder, name)
        setattr(holder, name, value)
        encoder.encode(TEXTS)
        setattr(holder, name, before)
        batches = encoder.stats.batches
        assert (encoder.encode(TEXTS) == expected).all(), name
        assert encoder.stats.batches == batches + 1, f"{name} was put back, but nothing ran packed"


def test_settings_of_the_real_model(minilm_path: str) -> None:
    texts = [" ".join(make_texts(1, max_words=40)), "one two three four five six seven eight"]

    def make() -> SentenceTransformer:
        return SentenceTransformer(minilm_path, device="cpu")

    for name, value in (
        ("query_length", 5),
        ("query_expansion", EXPANSION),
        ("processing_kwargs", {"text": {"max_length": 5}}),
    ):
        assert_as_stock(
            lambda m, name=name, value=value: setattr(m[0], name, value),
            "used before",
            make=make,
            texts=texts,
            call="encode_query",
        )


def _with_dense() -> SentenceTransformer:
    torch.manual_seed(0)
    return SentenceTransformer(modules=[*tiny(), Dense(64, 32)], device="cpu").eval()


@pytest.mark.parametrize("output", ["sentence_embedding", "token_embeddings"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (tiny, {}),
        (tiny, {"impl": "reference"}),
        (tiny, {"dtype": "float16"}),
        (lambda: tiny("modernbert"), {"dtype": "bfloat16", "impl": "reference"}),
        (_with_dense, {"impl": "reference"}),
        (lambda: make_sentence_transformer(overrides={"hidden_size": 1024}), {}),
    ],
    ids=["auto", "reference", "float16", "modernbert", "dense", "head dim 256"],
)
def test_autocast_leaves_the_dtype_of_encode_alone(
    make: Callable[[], SentenceTransformer],
    arguments: dict[str, str],
    dtype: torch.dtype,
    output: Any,
) -> None:
    expected = FastEncoder(make(), **arguments).encode(TEXTS, output_value=output)
    with torch.autocast("cpu", dtype):
        encoder = FastEncoder(make(), **arguments)
        ours = encoder.encode(TEXTS, output_value=output)
        assert torch.is_autocast_enabled("cpu")
    assert not encoder.stats.fallbacks
    for row, other in zip(ours, expected, strict=True):
        assert (row == other).all()
