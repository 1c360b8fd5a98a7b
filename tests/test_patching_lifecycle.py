"""accelerate and restore: instances, copies, changed weights, refusals."""

from __future__ import annotations

import copy
import inspect
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import BertModel, XLNetConfig, XLNetModel

import families
from checks import assert_same_vectors
from patched import LENGTHS, assert_identical, assert_same_states, pair, run
from sbert_fast import FastEncoder, accelerate, explain, restore
from sbert_fast.errors import ImplementationError, UnsupportedModelError
from sbert_fast.patching import counts, forward_of


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
def test_restore_gives_the_original_back(name: str) -> None:
    model = families.make_model(name)
    batch = families.make_batch(name, LENGTHS)
    expected, before = run(model, batch), dict(model.__dict__)
    accelerate(model)
    assert not torch.equal(run(model, batch)[0], expected[0])
    assert restore(model) is model
    assert model.__dict__ == before
    assert_identical(run(model, batch), expected)
    assert restore(model) is model
    assert model.__dict__ == before


def test_restore_gives_an_instance_attribute_back() -> None:
    model = families.make_model("bert")
    model.forward = model.forward
    before = dict(model.__dict__)
    assert restore(accelerate(model)).__dict__ == before
    twin = copy.deepcopy(accelerate(model))
    assert restore(twin).__dict__["forward"].__self__ is twin


def test_other_instances_and_the_class_stay_what_they_are() -> None:
    class_forward = BertModel.forward
    model, other = (families.make_model("bert", seed=seed) for seed in (0, 1))
    accelerate(model)
    assert BertModel.forward is class_forward
    assert "forward" not in other.__dict__
    assert counts(other) == {}


def test_accelerating_twice_updates() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    forward = model.forward
    run(model, batch)
    accelerate(model, dtype=torch.bfloat16, impl="reference")
    assert model.forward is forward
    run(model, batch)
    assert forward.engine.prepared().target.dtype == torch.bfloat16
    assert counts(model) == {"packed": 2}
    assert "forward" not in restore(model).__dict__
    assert_identical(run(model, batch), run(original, batch))


def test_accelerating_again_reads_writes_that_torch_does_not_count() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    before = run(model, batch)[0]
    for m in (original, model):
        weight = m.encoder.layer[1].output.dense.weight
        weight.data.copy_(3 * weight)
    accelerate(model)
    after = run(model, batch)
    assert not torch.equal(after[0], before)
    assert_same_states(after, run(original, batch), batch["attention_mask"])
    assert counts(model) == {"packed": 2}


def test_every_supported_model_inside_a_module() -> None:
    sizes = {"d_model": 64, "n_layer": 1, "n_head": 4, "d_inner": 96}
    xlnet = XLNetModel(XLNetConfig(vocab_size=99, **sizes))
    towers = nn.ModuleDict(
        {
            "query": families.make_model("bert"),
            "document": families.make_model("roberta"),
            "other": xlnet,
        }
    )
    accelerate(towers)
    assert [forward_of(tower) is not None for tower in towers.values()] == [True, True, False]
    run(towers["query"], families.make_batch("bert", LENGTHS))
    run(towers["document"], families.make_batch("roberta", LENGTHS))
    assert counts(towers) == {"packed": 2}
    text = explain(towers)
    assert "query: BertModel" in text
    assert "other: XLNetModel" in text
    assert "XLNetModel is not supported" in text


def test_unsupported_models_are_refused_with_the_reason() -> None:
    decoder = families.make_model("bert", head="AutoModelForCausalLM", is_decoder=True)
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel .*config.is_decoder is set"):
        accelerate(decoder)
    with pytest.raises(UnsupportedModelError, match="Linear .*contains no transformers model"):
        accelerate(nn.Linear(3, 3))
    assert "config.is_decoder is set" in explain(decoder)
    assert "contains no transformers model" in explain(nn.Linear(3, 3))


def test_a_forward_that_someone_else_replaced_is_left_alone() -> None:
    model = families.make_model("bert")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UnsupportedModelError, match="forward was replaced on this instance"):
        accelerate(model)
    assert "forward was replaced" in explain(model)


def test_invalid_arguments() -> None:
    model = families.make_model("bert")
    for function in (accelerate, restore, counts, explain):
        with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
            function("bert")
    for dtype in ("float8", torch.float64, 16, "Auto"):
        with pytest.raises(ValueError, match="^dtype must be one of 'auto', 'float32', ") as error:
            accelerate(model, dtype=dtype)
        with pytest.raises(ValueError, match="^dtype must be one of") as peer:
            FastEncoder("anything", dtype=dtype)
        assert str(error.value) == str(peer.value)
    with pytest.raises(ValueError, match="impl must be one of .*'tpu'"):
        accelerate(model, impl="tpu")
    with pytest.raises(ImplementationError, match="impl=.cpu. was asked for"):
        accelerate(model, dtype=torch.float16, impl="cpu")
    assert "forward" not in model.__dict__


def _through_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("head", [None, "AutoModelForSequenceClassification"])
def test_copies_serve_their_own_weights(duplicate: Callable[[Any], Any], head: str | None) -> None:
    original, model = pair("bert", head=head)
    batch = families.make_batch("bert", LENGTHS)
    before = run(model, batch)[0]
    twin = duplicate(model)
    with torch.no_grad():
        for m in (twin, original):
            m.base_model.embeddings.LayerNorm.weight.mul_(1.5)
    assert counts(twin) == {}
    ours, theirs = run(twin, batch)[0], run(original, batch)[0]
    keep = batch["attention_mask"].bool() if head is None else ...
    assert_same_vectors(ours[keep], theirs[keep])
    assert counts(twin) == {"packed": 1}
    assert torch.equal(run(model, batch)[0], before)
    assert_identical(run(restore(twin), batch)[0], theirs)
    assert counts(model) == {"packed": 2}


def _states_in_child(model: Any, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    return run(model, tensors).last_hidden_state.numpy(), counts(model)


@pytest.mark.slow
def test_spawned_processes_run_packed() -> None:
    _, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    expected = run(model, batch).last_hidden_state.numpy()
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        states, counted = pool.apply(_states_in_child, (model, arrays))
    assert np.array_equal(states, expected)
    assert counted == {"packed": 1}


def test_loaded_weights_are_followed() -> None:
    original, model = pair("bert")
    batch = families.make_batch("bert", LENGTHS)
    run(model, batch)
    other = families.make_model("bert", seed=5)
    for m in (original, model):
        m.load_state_dict(other.state_dict())
    assert_same_states(run(model, batch), run(original, batch), batch["attention_mask"])
    for m in (original, model):
        m.half().float()
        m.encoder.layer[0] = copy.deepcopy(other.encoder.layer[2])
        m.resize_token_embeddings(150, mean_resizing=False)
    batch["input_ids"] %= 150
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(original.embeddings.word_embeddings.weight)
    assert_same_states(run(model, batch), run(original, batch), batch["attention_mask"])
    assert counts(model) == {"packed": 3}


def test_parameters_and_files_stay_what_they_are(tmp_path: Path) -> None:
    original, model = pair("bert", head="AutoModelForSequenceClassification")
    run(model, families.make_batch("bert", LENGTHS))
    assert list(model.state_dict()) == list(original.state_dict())
    names = [name for name, _ in original.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_modules()] == [n for n, _ in original.named_modules()]
    for folder, m in (("ours", model), ("theirs", original)):
        m.save_pretrained(tmp_path / folder)
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()


def test_signature_and_name_are_those_of_the_original() -> None:
    original, model = pair("bert")
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    assert model.forward.__name__ == "forward"
    assert model.forward.__doc__ == original.forward.__doc__
    assert inspect.unwrap(model.forward) == inspect.unwrap(BertModel.forward)


def test_accelerated_sentence_transformer_still_is_one() -> None:
    model = accelerate(families.make_sentence_transformer("bert"))
    assert isinstance(model, SentenceTransformer)
    texts = families.make_texts(5)
    twin = pickle.loads(pickle.dumps(model))
    assert np.array_equal(twin.encode(texts), model.encode(texts))
    assert counts(twin) == {"packed": 1}
