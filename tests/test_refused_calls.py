"""A call that is refused has moved, changed and loaded nothing."""

from __future__ import annotations

from typing import Any

import pytest
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer

from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder, assembly
from sbert_fast.stats import EncoderStats

TEXTS = make_texts(4)

REFUSED: dict[str, dict[str, Any]] = {
    "unknown keyword": {"unknown": 1},
    "batch_size": {"batch_size": 0},
    "batch_size that sentence-transformers takes": {"batch_size": 1.5},
    "precision": {"precision": "int4"},
    "output_value": {"output_value": "tokens"},
    "truncate_dim": {"truncate_dim": 0},
    "device": {"device": ["meta", "gpu"]},
    "chunk_size": {"device": ["cpu", "cpu"], "chunk_size": 0},
    "prompt_name": {"prompt_name": "nowhere"},
    "prompt": {"prompt": 3},
    "surrogate in the prompt": {"prompt": "\ud800"},
    "no inputs": {"inputs": None},
    "inputs and sentences": {"sentences": TEXTS},
    "an input that is not a text": {"inputs": [*TEXTS, 3]},
    "surrogate in a text": {"inputs": [*TEXTS, "\ud800"]},
    "tensor": {"inputs": torch.zeros(3)},
}
# Older ones end training before they find fault with it.
if tuple(map(int, sentence_transformers.__version__.split(".")[:2])) < (6, 2):
    del REFUSED["batch_size that sentence-transformers takes"]


@pytest.fixture(params=["packed", "in sentence-transformers"])
def encoder(request: pytest.FixtureRequest) -> FastEncoder:
    """In training, on a CPU, with nothing derived of it."""
    st = make_sentence_transformer(prompts={"query": "find: "})
    if request.param != "packed":
        st[0].auto_model.register_forward_hook(lambda *_: None)
    encoder = FastEncoder(st).train()
    encoder.refresh()
    return encoder


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_a_refused_call_touches_nothing(
    encoder: FastEncoder, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in (
        (assembly, "build_pipeline"),
        (SentenceTransformer, "start_multi_process_pool"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    with pytest.raises((ValueError, TypeError)):
        encoder.encode(**{"inputs": TEXTS, "device": "meta", **arguments})
    assert {parameter.device.type for parameter in encoder.parameters()} == {"cpu"}
    assert all(module.training for module in encoder.modules())
    assert encoder.stats == EncoderStats()


def test_a_call_that_workers_run_moves_nothing(
    encoder: FastEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_workers(_: SentenceTransformer, inputs: list[str], **__: Any) -> torch.Tensor:
        return torch.ones(len(inputs), 64)

    monkeypatch.setattr(SentenceTransformer, "_multi_process", in_workers)
    assert encoder.encode(TEXTS, pool={"processes": []}, device="meta").shape == (4, 64)
    assert encoder.device.type == "cpu"
