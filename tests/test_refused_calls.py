"""A call that is refused has moved, changed and loaded nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer

from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder, assembly, session
from sbert_fast.errors import ImplementationError, InvalidWeightsError
from sbert_fast.inference import Pipeline
from sbert_fast.ops import extension
from sbert_fast.session import Session
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
    assert_untouched(encoder)


def assert_untouched(encoder: FastEncoder) -> None:
    """As the encoder was made: on a CPU, in training, and nothing has run."""
    tensors = [*encoder.parameters(), *encoder.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert all(module.training for module in encoder.modules())
    assert encoder.stats == EncoderStats()


def _shorten(encoder: FastEncoder) -> None:
    encoder.max_seq_length = 1


def _lengthen(encoder: FastEncoder) -> None:
    encoder.max_seq_length = 1000


def _spoil(encoder: FastEncoder) -> None:
    with torch.no_grad():
        next(encoder.parameters())[0, 0] = torch.nan


def _leave(encoder: FastEncoder) -> None:
    pass


needs_cpu_ops = pytest.mark.skipif(not extension.CPU.available, reason=str(extension.CPU.reason))
# How the encoder is asked to run, what is done to it, the device of the call, and the refusal.
REFUSED_MODELS = {
    "max_seq_length below the special tokens": ("auto", _shorten, "meta", ValueError),
    "max_seq_length beyond the positions": ("auto", _lengthen, "meta", ValueError),
    "impl": pytest.param("cpu", _leave, "meta", ImplementationError, marks=needs_cpu_ops),
    "weights": ("auto", _spoil, "cpu", InvalidWeightsError),
}


@pytest.mark.parametrize(
    ("impl", "change", "device", "error"), REFUSED_MODELS.values(), ids=REFUSED_MODELS
)
def test_a_call_that_its_model_refuses_touches_nothing(
    impl: str,
    change: Callable[[FastEncoder], None],
    device: str,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assembly, "DEVICES", (*assembly.DEVICES, "meta"))
    encoder = FastEncoder(make_sentence_transformer(), impl=impl).train()
    change(encoder)
    with pytest.raises(error):
        encoder.encode(TEXTS, device=device)
    assert_untouched(encoder)


# How torch moves the parameters of a module.
WAYS_TO_MOVE: dict[str, Callable[[bool], None]] = {
    "in place": lambda _: None,
    "new ones": torch.__future__.set_overwrite_module_params_on_conversion,
    "swapped": torch.__future__.set_swap_module_params_on_conversion,
}


@pytest.mark.parametrize("way", WAYS_TO_MOVE)
@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_only_preparing_can_tell_leaves_the_model_as_it_was(
    device: str, records: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Session.pipeline

    def prepare(own: Session, model: Any, route: Any) -> Pipeline | assembly.Unsupported:
        if model.device.type == "cpu" and model.training:
            return pipeline(own, model, route)
        raise InvalidWeightsError("NaN")

    monkeypatch.setattr(assembly, "DEVICES", (*assembly.DEVICES, "meta"))
    encoder = FastEncoder(make_sentence_transformer(), impl="reference")
    expected = encoder.encode(TEXTS)
    encoder.train()
    if records:
        sum(parameter.sum() for parameter in encoder.parameters()).backward()
    held = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in encoder.parameters()]
    WAYS_TO_MOVE[way](True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Session, "pipeline", prepare)
            with pytest.raises(InvalidWeightsError) as refused:
                encoder.encode(TEXTS, device=device)
    finally:
        WAYS_TO_MOVE[way](False)
    assert not hasattr(refused.value, "__notes__")
    assert all(module.training for module in encoder.modules())
    for parameter, (same, grad, values) in zip(encoder.parameters(), held, strict=True):
        assert parameter is same
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, values)
    assert (encoder.encode(TEXTS) == expected).all()


def test_the_refusal_is_told_even_if_the_model_cannot_be_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the tensor cannot be swapped")

    monkeypatch.setattr(session, "_give_back", fail)
    with pytest.raises(ValueError, match="refused") as error:
        with session._undone_if_refused(torch.nn.Linear(2, 2)):
            raise ValueError("refused")
    (note,) = error.value.__notes__
    assert note.endswith("tensors of before: the tensor cannot be swapped")


def test_a_call_that_workers_run_moves_nothing(
    encoder: FastEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_workers(_: SentenceTransformer, inputs: list[str], **__: Any) -> torch.Tensor:
        return torch.ones(len(inputs), 64)

    monkeypatch.setattr(SentenceTransformer, "_multi_process", in_workers)
    assert encoder.encode(TEXTS, pool={"processes": []}, device="meta").shape == (4, 64)
    assert encoder.device.type == "cpu"
