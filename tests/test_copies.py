"""Copies and changes: every encoder serves its own weights, as they are now."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling

from checks import MAX_DISTANCE, assert_same_vectors, bits, cosine_distances
from families import make_sentence_transformer, make_texts, randomize
from sbert_fast import FastEncoder

TEXTS = make_texts(30)
Copy = Callable[[FastEncoder], FastEncoder]


@pytest.fixture
def st() -> SentenceTransformer:
    modules = [*make_sentence_transformer(normalize=False), randomize(Dense(64, 24))]
    return SentenceTransformer(modules=modules, prompts={"query": "find: "}, device="cpu").eval()


@pytest.fixture
def encoder(st: SentenceTransformer) -> FastEncoder:
    encoder = FastEncoder(st)
    encoder.encode(TEXTS)
    return encoder


def _saved(encoder: FastEncoder) -> FastEncoder:
    stream = io.BytesIO()
    torch.save(encoder, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES: dict[str, Copy] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda encoder: pickle.loads(pickle.dumps(encoder)),
    "torch.save": _saved,
    "copy of a copy": lambda encoder: copy.deepcopy(copy.deepcopy(encoder)),
    "encoder of a copied model": lambda encoder: FastEncoder(copy.deepcopy(encoder)),
}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def change(model: SentenceTransformer, *, dense: bool = False) -> None:
    """Write to a weight in a way that torch counts."""
    with torch.no_grad():
        layer = model[0].auto_model.encoder.layer[1]
        weight = model[2].linear.weight if dense else layer.intermediate.dense.weight
        weight.mul_(1.5)


# Copies


def shares_a_session(encoder: FastEncoder) -> FastEncoder:
    other = object.__new__(FastEncoder)
    vars(other).update(vars(encoder))
    return other


@pytest.mark.parametrize("make_copy", [copy.copy, shares_a_session])
def test_a_shallow_copy_has_attributes_of_its_own(encoder: FastEncoder, make_copy: Copy) -> None:
    before, copied = encoder.encode(TEXTS), make_copy(encoder)
    preprocess = copied.preprocess
    copied.preprocess = lambda texts, *args, **how: preprocess(texts[::-1], *args, **how)
    for _ in range(2):
        assert_same_vectors(encoder.encode(TEXTS), before)
        ours, theirs = copied.encode(TEXTS), SentenceTransformer.encode(copied, TEXTS)
        assert np.abs(ours - before).max() > 1e-3
        assert_same_vectors(ours, theirs)
    assert sum(copied.stats.fallbacks.values()) >= 2


@pytest.mark.parametrize("dense", [False, True], ids=["encoder layer", "dense layer"])
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_serves_its_own_weights(
    encoder: FastEncoder, st: SentenceTransformer, make_copy: Copy, dense: bool
) -> None:
    before = bits(encoder.encode(TEXTS))
    other = make_copy(encoder)
    assert type(other) is FastEncoder
    assert (bits(other.encode(TEXTS)) == before).all()

    change(other, dense=dense)
    after = bits(other.encode(TEXTS))
    assert (after != before).any(axis=1).all()
    assert (bits(encoder.encode(TEXTS)) == before).all()
    plain = SentenceTransformer(modules=list(other), prompts=other.prompts, device="cpu")
    assert_same_vectors(other.encode(TEXTS), plain.encode(TEXTS))

    change(encoder, dense=dense)
    assert (bits(encoder.encode(TEXTS)) == after).all()
    assert (bits(other.encode(TEXTS)) == after).all()
    assert_same_vectors(encoder.encode(TEXTS), st.encode(TEXTS))


@pytest.mark.parametrize("make_copy", [COPIES["deepcopy"], COPIES["pickle"]])
def test_a_copy_keeps_the_settings_and_counts_from_zero(
    st: SentenceTransformer, make_copy: Copy
) -> None:
    encoder = FastEncoder(st, dtype="bfloat16", impl="reference", batch_tokens=77, truncate_dim=9)
    encoder.max_seq_length = 20
    expected = bits(encoder.encode(TEXTS, prompt_name="query"))
    other = make_copy(encoder)
    assert other.stats.texts == 0
    assert other.batch_tokens == 77
    assert other.compute_dtype == torch.bfloat16
    assert other.packed_engine is not None
    assert other.packed_engine is not encoder.packed_engine
    assert other.packed_engine.implementation == "reference"
    assert (bits(other.encode(TEXTS, prompt_name="query")) == expected).all()
    assert encoder.stats.texts == other.stats.texts == len(TEXTS)
    other.max_seq_length = 5
    assert encoder.max_seq_length == 20


def _encode_elsewhere(encoder: FastEncoder, connection: object) -> None:
    before = encoder.encode(TEXTS)
    change(encoder)
    connection.send((before, encoder.encode(TEXTS)))


@pytest.mark.slow
def test_a_spawned_process_has_a_copy_of_its_own(encoder: FastEncoder) -> None:
    # Plain pickling to a child process, not through the shared memory of a pool.
    expected = encoder.encode(TEXTS)
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_encode_elsewhere, args=(copy.deepcopy(encoder), sender))
    child.start()
    before, after = receiver.recv()
    child.join()
    assert child.exitcode == 0
    assert_same_vectors(before, expected)
    assert (cosine_distances(after, expected) > MAX_DISTANCE).all()
    assert (bits(encoder.encode(TEXTS)) == bits(expected)).all()


# encode leaves the model as it was


def test_encode_changes_nothing_of_the_model(st: SentenceTransformer) -> None:
    fresh = FastEncoder(copy.deepcopy(st))
    names, tensors = list(st.state_dict()), weights(st)
    identities = [(id(parameter), parameter.data_ptr()) for parameter in st.parameters()]
    size = len(pickle.dumps(fresh))
    encoder = FastEncoder(st)
    for arguments in ({}, {"device": "cpu:0"}, {"output_value": None}, {"prompt_name": "query"}):
        encoder.encode(TEXTS, **arguments)
    assert list(encoder.state_dict()) == list(st.state_dict()) == names
    assert [(id(p), p.data_ptr()) for p in encoder.parameters()] == identities
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(parameter.is_inference() for parameter in encoder.parameters())
    # Prepared weights would double it.
    assert len(pickle.dumps(encoder)) < 1.1 * size


def test_the_model_still_trains_after_encode(st: SentenceTransformer) -> None:
    encoder = FastEncoder(st)
    before = encoder.encode(TEXTS)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    encoder.train()
    embeddings = encoder(encoder.preprocess(TEXTS[:8]))["sentence_embedding"]
    embeddings.square().sum().backward()
    optimizer.step()
    after = encoder.encode(TEXTS)
    assert not encoder.training
    assert_same_vectors(after, st.encode(TEXTS))
    assert (cosine_distances(after, before) > MAX_DISTANCE).any()


# Changes of the weights


def test_weights_written_in_place(st: SentenceTransformer, encoder: FastEncoder) -> None:
    """Every parameter the vectors depend on, one at a time."""
    before = encoder.encode(TEXTS)
    for name, parameter in st.named_parameters():
        if ".pooler." in name:
            continue
        with torch.no_grad():
            parameter.mul_(1.05)
        after = encoder.encode(TEXTS)
        assert_same_vectors(after, st.encode(TEXTS))
        if ".key.bias" not in name:
            # A bias of all keys shifts every logit of a query alike.
            assert (bits(after) != bits(before)).any(axis=1).all(), name
        before = after


def test_load_state_dict(encoder: FastEncoder, st: SentenceTransformer) -> None:
    original, before = weights(st), encoder.encode(TEXTS)
    state = {name: tensor * 1.1 for name, tensor in original.items()}
    for assign in (False, True):
        encoder.load_state_dict(state, assign=assign)
        assert_same_vectors(encoder.encode(TEXTS), st.encode(TEXTS))
        assert (cosine_distances(encoder.encode(TEXTS), before) > MAX_DISTANCE).any()
        encoder.load_state_dict({name: t.clone() for name, t in original.items()}, assign=assign)
        assert (bits(encoder.encode(TEXTS)) == bits(before)).all()


def test_replaced_parameters_and_modules(encoder: FastEncoder, st: SentenceTransformer) -> None:
    model = st[0].auto_model
    attention = model.encoder.layer[0].attention

    def new_parameter() -> None:
        attention.self.value.weight = torch.nn.Parameter(torch.randn(64, 64) / 8)

    def new_linear() -> None:
        attention.output.dense = torch.nn.Linear(64, 64)

    def no_bias() -> None:
        attention.self.query.bias = None

    def fewer_layers() -> None:
        model.encoder.layer = model.encoder.layer[:2]

    def other_order() -> None:
        model.encoder.layer = torch.nn.ModuleList(reversed(model.encoder.layer))

    def other_pooling() -> None:
        st[1].pooling_mode = "max"

    def new_pooling() -> None:
        encoder[1] = st[1] = Pooling(64, "cls")

    def other_model() -> None:
        encoder[0] = st[0] = make_sentence_transformer(seed=9)[0]

    changes = (new_parameter, new_linear, no_bias, fewer_layers, other_order, other_pooling)
    before = encoder.encode(TEXTS)
    for make_change in (*changes, new_pooling, other_model):
        make_change()
        after = encoder.encode(TEXTS)
        assert_same_vectors(after, st.encode(TEXTS))
        assert (cosine_distances(after, before) > MAX_DISTANCE).any(), make_change.__name__
        before = after
    assert encoder.stats.fallbacks == {}


def test_refresh_after_writes_that_torch_does_not_count(
    encoder: FastEncoder, st: SentenceTransformer
) -> None:
    before = encoder.encode(TEXTS)
    st[0].auto_model.encoder.layer[0].output.dense.weight.data.mul_(3)
    encoder.refresh()
    assert_same_vectors(encoder.encode(TEXTS), st.encode(TEXTS))
    assert (cosine_distances(encoder.encode(TEXTS), before) > MAX_DISTANCE).any()


# Changes of the dtype


def _upcast(st: SentenceTransformer, dtype: torch.dtype) -> SentenceTransformer:
    """The model with its weights rounded to `dtype`, computing in fp32."""
    return copy.deepcopy(st).to(dtype).float()


def test_half_computes_in_fp32_with_the_rounded_weights(
    encoder: FastEncoder, st: SentenceTransformer
) -> None:
    before, expected = encoder.encode(TEXTS), _upcast(st, torch.float16).encode(TEXTS)
    encoder.half()
    assert encoder.compute_dtype == torch.float32
    assert {p.dtype for p in encoder.parameters()} == {torch.float16}
    assert_same_vectors(encoder.encode(TEXTS), expected)
    assert (cosine_distances(expected, before) > 0).any()
    encoder.float()
    assert_same_vectors(encoder.encode(TEXTS), expected)


def test_bfloat16_and_back(encoder: FastEncoder, st: SentenceTransformer) -> None:
    exact = _upcast(st, torch.bfloat16).encode(TEXTS)
    encoder.to(torch.bfloat16)
    assert encoder.compute_dtype == torch.bfloat16
    theirs = st.encode(TEXTS)
    ours = encoder.encode(TEXTS)
    assert ours.dtype == np.float32
    allowed = 2 * cosine_distances(theirs, exact).max() + MAX_DISTANCE
    assert cosine_distances(ours, exact).max() <= allowed
    encoder.float()
    assert encoder.compute_dtype == torch.float32
    assert_same_vectors(encoder.encode(TEXTS), exact)


def test_an_explicit_dtype_outlives_changes_of_the_model(st: SentenceTransformer) -> None:
    encoder = FastEncoder(st, dtype="bfloat16")
    expected = bits(encoder.encode(TEXTS))
    encoder.to(torch.bfloat16)
    encoder.float()
    assert encoder.compute_dtype == torch.bfloat16
    assert encoder.encode(TEXTS).shape == expected.shape


# Saving


def test_saved_after_encode(encoder: FastEncoder, st: SentenceTransformer, tmp_path: Path) -> None:
    expected = encoder.encode(TEXTS)
    encoder.save_pretrained(str(tmp_path / "ours"))
    st.save_pretrained(str(tmp_path / "theirs"))
    names = [
        sorted(str(path.relative_to(tmp_path / side)) for path in (tmp_path / side).rglob("*"))
        for side in ("ours", "theirs")
    ]
    assert names[0] == names[1]
    loaded = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert_same_vectors(loaded.encode(TEXTS), expected)
    again = FastEncoder(str(tmp_path / "ours"), device="cpu")
    assert (bits(again.encode(TEXTS)) == bits(expected)).all()


def test_inference_tensors_are_followed() -> None:
    """They count no writes: `load_state_dict` into them is seen all the same."""
    st = make_sentence_transformer("bert")
    with torch.inference_mode():
        st.half().float()
    encoder = FastEncoder(st)
    encoder.encode(["a b c"])
    other = make_sentence_transformer("bert", seed=5)
    with torch.inference_mode():
        st.load_state_dict(other.state_dict())
    assert np.array_equal(encoder.encode(["a b c"]), FastEncoder(other).encode(["a b c"]))


def test_the_eps_of_a_norm_is_followed(encoder: FastEncoder, st: SentenceTransformer) -> None:
    before = encoder.encode(TEXTS)
    st[0].auto_model.encoder.layer[1].output.LayerNorm.eps = 0.5
    assert_same_vectors(encoder.encode(TEXTS), st.encode(TEXTS))
    assert (cosine_distances(encoder.encode(TEXTS), before) > MAX_DISTANCE).any()
