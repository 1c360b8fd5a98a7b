"""Models whose placement was left to a device map, or to the hooks of Hugging Face accelerate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

import families
from checks import assert_same_vectors
from patched import LENGTHS, assert_identical, assert_same_states, run
from sbert_fast import FastEncoder, accelerate, counts

TEXTS = families.make_texts(8)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    model = families.make_sentence_transformer("bert")
    model.append(Dense(64, 32))
    model.save(str(tmp_path))
    return str(tmp_path)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_one_real_device_runs_packed(saved: str, device_map: Any) -> None:
    how: dict[str, Any] = {"model_kwargs": {"device_map": device_map}}
    expected = SentenceTransformer(saved, **how).encode(TEXTS)
    encoder = FastEncoder(saved, **how)
    assert encoder.unsupported_reason is None
    assert_same_vectors(encoder.encode(TEXTS), expected)
    assert encoder.stats.fallbacks == {}


def _offload(base: Any) -> None:
    cpu_offload(base, execution_device=torch.device("cpu"))


def _dispatch(base: Any) -> None:
    dispatch_model(base, {"": "cpu"}, main_device="cpu", force_hooks=True)


def _offload_a_layer(base: Any) -> None:
    cpu_offload(base.encoder.layer[1], execution_device=torch.device("cpu"))


HOOKS = (_offload, _dispatch, _offload_a_layer)


@pytest.mark.skipif(
    not hasattr(SentenceTransformer, "clear_placement_cache"),
    reason="sentence-transformers 6.0 cannot run offloaded models itself",
)
@pytest.mark.parametrize("place", HOOKS)
def test_hooks_that_place_are_run(saved: str, place: Callable[[Any], None]) -> None:
    expected = SentenceTransformer(saved, device="cpu").encode(TEXTS)
    encoder = FastEncoder(saved, device="cpu")
    assert_same_vectors(encoder.encode(TEXTS), expected)
    place(encoder[0].auto_model)
    encoder.clear_placement_cache()
    assert_same_vectors(encoder.encode(TEXTS), expected)
    assert sum(encoder.stats.fallbacks.values()) == 1


@pytest.mark.parametrize("place", HOOKS)
def test_removed_hooks_leave_nothing_behind_in_an_encoder(
    saved: str, place: Callable[[Any], None]
) -> None:
    encoder = FastEncoder(saved, device="cpu")
    expected = encoder.encode(TEXTS)
    place(encoder[0].auto_model)
    remove_hook_from_module(encoder[0].auto_model, recurse=True)
    # sentence-transformers 6.0 has no such cache.
    getattr(encoder, "clear_placement_cache", lambda: None)()
    assert_same_vectors(encoder.encode(TEXTS), expected)
    assert encoder.stats.fallbacks == {}


@pytest.mark.parametrize("place", HOOKS)
@pytest.mark.parametrize("accelerated", ["before", "after"])
def test_removed_hooks_leave_nothing_behind(place: Callable[[Any], None], accelerated: str) -> None:
    original = families.make_model("bert")
    model = copy.deepcopy(original)
    batch = families.make_batch("bert", LENGTHS)
    if accelerated == "before":
        accelerate(model)
    place(model)
    assert_identical(run(model, batch), run(original, batch))
    remove_hook_from_module(model, recurse=True)
    if accelerated == "after":
        accelerate(model)
    assert_same_states(run(model, batch), run(original, batch), batch["attention_mask"])
    assert counts(model)["packed"] == 1
