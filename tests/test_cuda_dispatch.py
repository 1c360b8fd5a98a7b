"""When the CUDA ops run, and what is said where they do not: no GPU is needed to know."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import families
from planted_gpu import LOADED, TARGETS, plant
from sbert_fast import _build_info, ops
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import ImplementationError
from sbert_fast.linears import TorchLinear
from sbert_fast.ops import choices, dispatch, extension, schemas

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBERT_FAST_IMPL", raising=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper GPU beside a library that loads; `monkeypatch`, to change what it is."""
    plant(monkeypatch)
    return monkeypatch


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of a CPU in the place of the CUDA ops."""
    monkeypatch.setattr(extension, "CUDA", replace(LOADED, emulated=True))


def test_every_op_of_a_gpu_has_the_overload() -> None:
    for op in schemas.SCHEMAS:
        has = hasattr(getattr(torch.ops.sbert_fast, op), "cuda")
        others = schemas.CPU_ONLY | schemas.WITHOUT_CUDA_KERNEL
        assert has == (op not in others) == ("cuda" in schemas.implementations(op))


class TestLoading:
    """Why a library that is there is not used."""

    @pytest.fixture
    def library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A file where the CUDA library would be, and a torch that has CUDA."""
        path = tmp_path / "_C_cuda.abi3.so"
        path.write_bytes(b"no library")
        monkeypatch.setattr(extension, "_PACKAGE", tmp_path)
        monkeypatch.setattr(torch.version, "cuda", "13.1")
        monkeypatch.setattr(_build_info, "CUDA", "13.0", raising=False)
        monkeypatch.setattr(_build_info, "CUDA_TARGETS", TARGETS, raising=False)
        return path

    def test_not_built(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library.unlink()
        for why, told in (({"_C_cuda": "there is no nvcc"}, ": there is no nvcc"), ({}, "")):
            monkeypatch.setattr(_build_info, "SKIPPED", why)
            assert extension._load_cuda().reason == f"sbert_fast/_C_cuda was not built{told}"

    def test_torch_without_cuda(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert str(extension._load_cuda().reason).endswith("is built without CUDA")

    def test_another_major_version(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        reason = str(extension._load_cuda().reason)
        assert "was built with CUDA 13.0" in reason and "with CUDA 12.8" in reason

    def test_no_record_of_the_build(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_build_info, "CUDA", "")
        assert "there is no record of the build" in str(extension._load_cuda().reason)

    def test_what_is_no_library(self, library: Path) -> None:
        found = extension._load_cuda()
        assert "_C_cuda.abi3.so does not load beside this torch: " in str(found.reason)
        assert (found.path, found.cuda, found.targets) == (library, "13.0", TARGETS)

    def test_stale(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        lacking = "sbert_fast::bias_gelu.cuda"
        monkeypatch.setattr(
            torch._C,
            "_dispatch_has_kernel_for_dispatch_key",
            lambda name, key: name != lacking if key == "CUDA" else has(name, key),
        )
        reason = extension._load_cuda().reason
        assert reason == "_C_cuda.abi3.so has no kernel for bias_gelu: build it again"

    @pytest.mark.parametrize(
        ("built", "fits"),
        [
            ("13.0 8.0 8.6 9.0a 10.0 12.0+PTX", True),
            ("13.0 8.0", False),
            ("12.8 8.0 8.6 9.0a 10.0 12.0+PTX", False),
            (None, False),
        ],
    )
    def test_a_library_of_another_build(
        self, library: Path, monkeypatch: pytest.MonkeyPatch, built: str | None, fits: bool
    ) -> None:
        monkeypatch.setattr(extension, "_load", lambda *_: None)
        monkeypatch.delattr(torch.ops.sbert_fast, "cuda_build", raising=False)
        if built is not None:
            monkeypatch.setattr(torch.ops.sbert_fast, "cuda_build", lambda: built, raising=False)
        found = extension._load_cuda()
        assert found.available == fits
        assert fits or f"is of another build, {built or 'an older one'}, than" in found.reason

    def test_loading_asks_no_device(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def ask(*_: object) -> None:
            raise AssertionError("CUDA was started")

        for name in ("is_available", "device_count", "get_device_capability", "_lazy_init"):
            monkeypatch.setattr(torch.cuda, name, ask)
        monkeypatch.setattr(torch.ops, "load_library", lambda path: ctypes.CDLL(None))
        extension._load_cuda()


class TestRejection:
    """Why the CUDA ops do not run on a device."""

    def test_runs(self, gpu: pytest.MonkeyPatch) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            assert ops.refusal("cuda", GPU, dtype) is None
            assert ops.refusal("cuda", torch.device("cuda"), dtype) is None
            assert ops.resolve(GPU, dtype, "cuda") == "cuda"

    def test_dtype(self, gpu: pytest.MonkeyPatch) -> None:
        expected = "take float16 and bfloat16, not torch.float32"
        assert expected in str(ops.refusal("cuda", GPU, torch.float32))

    def test_device_without_a_gpu_is_said_first(self) -> None:
        expected = "the CUDA ops run on cuda, not on cpu"
        assert ops.refusal("cuda", CPU, torch.float32) == expected

    def test_driver(self, gpu: pytest.MonkeyPatch) -> None:
        gpu.setattr(torch.cuda, "is_available", lambda: False)
        assert "driver is missing" in str(ops.refusal("cuda", GPU, torch.float16))

    @pytest.mark.parametrize(
        ("capability", "message"),
        [
            ((7, 5), "need compute capability 8.0 or later, GPU has 7.5"),
            ((8, 9), None),
            ((9, 0), None),
            ((10, 3), None),
            ((11, 0), "8.0, 8.6, 9.0a, 10.0, 12.0+PTX, GPU has 11.0: build them again with TORCH_"),
            ((12, 1), None),
            ((13, 0), None),
        ],
    )
    def test_capability(
        self, gpu: pytest.MonkeyPatch, capability: tuple[int, int], message: str | None
    ) -> None:
        gpu.setattr(extension, "capability_of", lambda index: capability)
        reason = ops.refusal("cuda", GPU, torch.float16)
        assert reason is None if message is None else message in str(reason)

    @pytest.mark.parametrize(
        ("target", "runs", "does_not_run"),
        [
            ("8.0", [(8, 0), (8, 9)], [(9, 0)]),
            ("8.6", [(8, 6)], [(8, 0)]),
            ("9.0a", [(9, 0)], [(10, 0)]),
            ("9.0a+PTX", [(9, 0)], [(10, 0), (12, 0)]),
            ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
            ("9.0+PTX", [(9, 0), (10, 0), (13, 0)], [(8, 9)]),
            ("nonsense", [], [(8, 0)]),
        ],
    )
    def test_what_code_runs_where(
        self, target: str, runs: list[tuple[int, int]], does_not_run: list[tuple[int, int]]
    ) -> None:
        assert all(extension._runs_on(target, capability) for capability in runs)
        assert not any(extension._runs_on(target, capability) for capability in does_not_run)


class TestChoice:
    """What `auto` picks, and that a name is never replaced."""

    @pytest.fixture
    def triton(self, gpu: pytest.MonkeyPatch) -> None:
        gpu.setattr(dispatch, "_refusal_of_triton", lambda device, dtype: None)

    @pytest.mark.usefixtures("triton")
    def test_auto_is_triton_where_nothing_was_measured(self, gpu: pytest.MonkeyPatch) -> None:
        gpu.setattr(choices, "CHOICES", ())
        for op in schemas.SCHEMAS.keys() - schemas.CPU_ONLY:
            assert ops.bind(op, GPU, torch.float16).implementation == "triton"

    @pytest.mark.usefixtures("triton")
    def test_auto_follows_the_table(self, gpu: pytest.MonkeyPatch) -> None:
        half = (torch.float16,)
        rows = (
            choices.Choice(("varlen_attention",), (9, 0), half, "h200/ops.json", (64,)),
            choices.Choice(("segment_pool",), (9, 0), half, "h200/ops.json"),
        )
        gpu.setattr(choices, "CHOICES", rows)

        def pick(op: str, dtype: torch.dtype = torch.float16, dim: int | None = None) -> str:
            return ops.bind(op, GPU, dtype, head_dim=dim, width=384).implementation

        assert pick("varlen_attention", dim=64) == "cuda"
        assert pick("varlen_attention", dim=32) == pick("varlen_attention") == "triton"
        assert pick("varlen_attention", torch.bfloat16, 64) == "triton"
        assert pick("segment_pool") == "cuda"
        assert pick("add_norm") == ops.resolve(GPU, torch.float16) == "triton"
        gpu.setattr(extension, "capability_of", lambda index: (8, 0))
        assert pick("segment_pool") == "triton"
        # What the table prefers but cannot run is passed over, like anything under `auto`.
        gpu.setattr(extension, "capability_of", lambda index: (9, 0))
        gpu.setattr(extension, "CUDA", replace(LOADED, reason="was not built"))
        assert pick("segment_pool") == "triton"

    def test_a_name_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = "='cuda' was asked for, but the CUDA ops run on cuda, not on cpu"
        with pytest.raises(ImplementationError, match=f"^impl{expected}"):
            ops.resolve(CPU, torch.float32, "cuda")
        monkeypatch.setenv("SBERT_FAST_IMPL", "cuda")
        with pytest.raises(ImplementationError, match=f"^SBERT_FAST_IMPL{expected}"):
            ops.resolve(CPU, torch.float32)


@pytest.mark.usefixtures("emulated")
class TestEmulated:
    """The ops compiled for a CPU, in the place of the real ones."""

    def test_take_cpu_tensors(self) -> None:
        assert ops.refusal("cuda", CPU, torch.float16) is None
        assert ops.refusal("cuda", CPU, torch.bfloat16) is None
        assert ops.refusal("cuda", CPU, torch.float32) is not None
        assert "run on cpu, not on cuda" in str(ops.refusal("cuda", GPU, torch.float16))

    def test_auto_leaves_them_alone(self) -> None:
        assert ops.resolve(CPU, torch.bfloat16) != "cuda"

    def test_engine(self) -> None:
        model = families.make_model("bert")
        engine = PackedEncoder(model, dtype=torch.bfloat16, impl="cuda")
        assert engine.implementation == "cuda" and engine.prepared().pooling.norm_pool is not None
        prepared = engine.prepared()
        layer = prepared.stack.layers[0]
        up, down = layer.feed_forward.up, layer.feed_forward.down
        # As on a GPU: torch's products, their biases left to the kernels behind them.
        assert isinstance(up, TorchLinear) and isinstance(down, TorchLinear)
        kernels = prepared.embed, layer.attention.kernel, up.kernel("bias_gelu")
        found = {kernel.implementation for kernel in (*kernels, down.kernel("add_norm"))}
        assert found == {"cuda"}
        assert PackedEncoder(model, impl="reference").prepared().pooling.norm_pool is None

    def test_head_dim_is_refused_at_construction(self) -> None:
        model = families.make_model("bert", hidden_size=36, num_attention_heads=3)
        expected = "need a head_dim that is a multiple of 8, got 12"
        with pytest.raises(ImplementationError, match=expected):
            PackedEncoder(model, dtype=torch.float16, impl="cuda")
        assert PackedEncoder(model).implementation != "cuda"
