"""low_memory: copied weights lie in files, out of memory, and writes to them are seen."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

import families
from sbert_fast import FastCrossEncoder, FastEncoder, mapping
from sbert_fast.errors import ImplementationError
from sbert_fast.fingerprint import tensors_in

TEXTS = families.make_texts(5)
# Its linear layers are large enough to be worth it.
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
WEIGHT = "encoder.layer.0.intermediate.dense.weight"
PAGE = os.sysconf("SC_PAGE_SIZE")

pytestmark = pytest.mark.skipif(
    (reason := mapping.refusal(torch.device("cpu"))) is not None, reason=str(reason)
)


@pytest.fixture(params=["a file", "memory"])
def stock(request: pytest.FixtureRequest, tmp_path: Path) -> SentenceTransformer:
    """A model whose weights are where transformers maps them, or where somebody has made them."""
    made = families.make_sentence_transformer("bert", overrides=SIZES)
    if request.param == "memory":
        return copy.deepcopy(made)
    made.save_pretrained(str(tmp_path))
    return SentenceTransformer(str(tmp_path), device="cpu")


def copied(encoder: FastEncoder) -> list[Tensor]:
    """The large weights of which the engine has a form of its own."""
    (assembly,) = encoder._session.assemblies.values()
    (engine,) = assembly._engines()
    shared = {t.data_ptr() for t in tensors_in(engine.prepared()) if t.layout == torch.strided}
    layers = [m for m in engine.model.encoder.modules() if isinstance(m, nn.Linear)]
    return [m.weight for m in layers if m.weight.data_ptr() not in shared]


def resident(tensors: list[Tensor]) -> float:
    """The share of the pages of tensors that is in memory.

    Linux brings in the pages around one that is read, so that those beside a bias come with it.
    """
    pages: list[np.ndarray] = []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        for tensor in tensors:
            first, end = -(-tensor.data_ptr() // PAGE), (tensor.data_ptr() + tensor.nbytes) // PAGE
            file.seek(first * 8)
            pages.append(np.frombuffer(file.read((end - first) * 8), dtype=np.uint64))
    return float((np.concatenate(pages) >> np.uint64(63)).mean())


def test_copied_weights_are_out_of_memory(stock: SentenceTransformer) -> None:
    expected = FastEncoder(copy.deepcopy(stock)).encode(TEXTS)
    encoder = FastEncoder(stock, low_memory=True)
    for _ in range(2):
        assert np.array_equal(encoder.encode(TEXTS), expected)
        weights = copied(encoder)
        assert len(weights) >= 4 and resident(weights) < 0.3
    assert not encoder.stats.fallbacks
    # Whoever reads them finds them.
    assert np.allclose(stock.encode(TEXTS), expected, atol=1e-6)
    assert resident(weights) > 0.9


def _of_data(weight: nn.Parameter) -> None:
    weight.data[3, 5] += 1


def _of_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[3, 5] += 1


def _of_an_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    weight.grad = None


def _of_another_tensor(weight: nn.Parameter) -> None:
    weight.data = weight.data.flip(0)


@pytest.mark.parametrize("write", [_of_data, _of_numpy, _of_an_optimizer, _of_another_tensor])
def test_writes_are_seen(write: Callable[[nn.Parameter], None], stock: SentenceTransformer) -> None:
    encoder = FastEncoder(stock, low_memory=True)
    encoder.encode(TEXTS)
    for _ in range(2):  # what was written to is in a file again
        weight = copied(encoder)[0]
        before = encoder.encode(TEXTS)
        write(weight)
        after = encoder.encode(TEXTS)
        assert np.abs(after - before).max() > 1e-4
        assert resident(copied(encoder)) < 0.3
        assert np.array_equal(after, FastEncoder(copy.deepcopy(stock)).encode(TEXTS))


def test_a_file_that_is_written_to_is_seen(tmp_path: Path) -> None:
    families.make_sentence_transformer("bert", overrides=SIZES).save_pretrained(str(tmp_path))
    encoder = FastEncoder(str(tmp_path), low_memory=True)
    before = encoder.encode(TEXTS)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        start, _ = json.loads(file.read(size))[WEIGHT]["data_offsets"]
        file.seek(8 + size + start)
        file.write(struct.pack("<f", 1.0))
    after = encoder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-4
    assert np.array_equal(after, FastEncoder(str(tmp_path)).encode(TEXTS))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_save_memory_too(
    duplicate: Callable[[FastEncoder], FastEncoder], stock: SentenceTransformer
) -> None:
    encoder = FastEncoder(stock, low_memory=True)
    expected = encoder.encode(TEXTS)
    twin = duplicate(encoder)
    assert np.array_equal(twin.encode(TEXTS), expected)
    assert resident(copied(twin)) < 0.3


@pytest.mark.parametrize("kind", [FastEncoder, FastCrossEncoder])
def test_what_is_refused(kind: type) -> None:
    with pytest.raises(TypeError, match="low_memory must be a bool, got str 'yes'"):
        kind("no such model", low_memory="yes")
    assert mapping.refusal(torch.device("cuda")) == "it is for a CPU, not for cuda"


def test_a_system_that_does_not_tell_pages_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mapping, "_PAGEMAP", tmp_path / "none")
    model = families.make_sentence_transformer("bert")
    with pytest.raises(ImplementationError, match="low_memory=True cannot run: .*none"):
        FastEncoder(model, low_memory=True)
