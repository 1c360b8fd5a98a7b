"""explain: what runs, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import spectral_norm

import families
from patched import LENGTHS
from planted_gpu import LOADED, plant
from sbert_fast import FastEncoder, accelerate, explain, linears, ops
from sbert_fast.engine import PackedEncoder
from sbert_fast.ops import choices, dispatch, extension
from sbert_fast.target import Target

CPU = torch.device("cpu")
# Of a library that loads where it finds no GPU.
NO_GPU = "torch finds no NVIDIA GPU: there is none, or its driver is missing or too old"


@pytest.fixture(autouse=True)
def _auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBERT_FAST_IMPL", raising=False)


def test_explain_the_installation() -> None:
    text = explain()
    assert "float32" in text
    assert "C++ ops" in text
    assert "batch planner" in text
    reason = ops.extension.CUDA.reason
    assert f"CUDA ops: {reason or ops.extension.CUDA.path}" in text


class TestCudaLibrary:
    """What the installation tells of the library of the CUDA ops."""

    LOADED = "_C_cuda.so (CUDA 13.0, for 8.0, 9.0a)"

    def told(self) -> str:
        (line,) = (line for line in explain().splitlines() if line.startswith("CUDA ops: "))
        return line.removeprefix("CUDA ops: ")

    @pytest.fixture(autouse=True)
    def _loads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, library=replace(LOADED, targets=("8.0", "9.0a")))

    def test_usable(self) -> None:
        assert self.told() == self.LOADED

    @pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 0)])
    def test_a_gpu_it_has_no_code_for(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
    ) -> None:
        plant(monkeypatch, capability, ops.extension.CUDA)
        told, gpu = self.told(), ".".join(map(str, capability))
        assert told.startswith(f"{self.LOADED}, not usable on this machine: the CUDA ops ")
        assert f"GPU has {gpu}" in told
        assert (f"build them again with TORCH_CUDA_ARCH_LIST={gpu}" in told) == (gpu != "7.5")

    def test_no_gpu_or_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert self.told() == f"{self.LOADED}, not usable on this machine: {NO_GPU}"

    def test_torch_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        reason = extension._misfit(LOADED.path, LOADED.cuda, LOADED.targets)
        monkeypatch.setattr(extension, "CUDA", replace(LOADED, reason=reason))
        assert self.told() == f"torch {torch.__version__} is built without CUDA"

    def test_emulated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        emulated = extension.Extension("_C_cuda", LOADED.path, None, emulated=True)
        monkeypatch.setattr(extension, "CUDA", emulated)
        assert self.told().startswith("_C_cuda.so, not usable on this machine: the emulated CUDA")


class TestModelOnAGpu:
    """What a model on a GPU tells of the CUDA kernels, under `auto`."""

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        plant(monkeypatch)
        monkeypatch.setattr(dispatch, "_refusal_of_triton", lambda device, dtype: None)
        monkeypatch.setattr(choices, "CHOICES", ())
        return monkeypatch

    def told(self, gpu: pytest.MonkeyPatch, **arguments: object) -> str:
        model = accelerate(families.make_model("bert").bfloat16(), **arguments)
        gpu.setattr(PackedEncoder, "device", torch.device("cuda", 0))
        return explain(model)

    def test_a_gpu_without_code(self, gpu: pytest.MonkeyPatch) -> None:
        plant(gpu, (11, 0))
        told = self.told(gpu)
        assert "on cuda:0, ops: triton (picked by auto; cuda: the CUDA ops were built for" in told
        assert "GPU has 11.0: build them again" in told

    def test_a_dtype_without_kernels(self, gpu: pytest.MonkeyPatch) -> None:
        told = self.told(gpu, dtype=torch.float32)
        assert "cuda: the CUDA ops take float16 and bfloat16, not torch.float32" in told

    def test_nothing_is_listed(self, gpu: pytest.MonkeyPatch) -> None:
        assert "picked by auto; cuda: sbert_fast/ops/choices.py lists no op for" in self.told(gpu)

    def test_what_is_listed(self, gpu: pytest.MonkeyPatch) -> None:
        row = choices.Choice(("bias_gelu", "add_norm"), (9, 0), (torch.bfloat16,), "ops.json")
        gpu.setattr(choices, "CHOICES", (row,))
        listed = [f"{op}: cuda, by sbert_fast/ops/choices.py" for op in ("add_norm", "bias_gelu")]
        assert f"(picked by auto; {'; '.join(listed)})" in self.told(gpu)

    def test_what_is_asked_for_needs_no_reason(self, gpu: pytest.MonkeyPatch) -> None:
        assert "ops: reference (asked for by impl='reference')" in self.told(gpu, impl="reference")


def test_explain_a_model() -> None:
    model = families.make_sentence_transformer("bert")
    assert "supported, not accelerated" in explain(model)
    accelerate(model, impl="reference")
    model.encode(["one", "two"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model[0].model(**families.make_batch("bert", LENGTHS))
    text = explain(model)
    assert "accelerated (bert): float32 on cpu, ops: reference (asked for by impl" in text
    assert "packed calls: 1" in text
    assert "1 x torch.autocast is on" in text


def _cast_a_part(model: Any) -> None:
    model.encoder.layer[0].output.dense.bfloat16()


def _hook(model: Any) -> None:
    model.encoder.layer[1].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.config, "is_decoder", True), "config.is_decoder is set"),
        (lambda m: m.register_parameter("own", nn.Parameter(torch.ones(1))), "parameter 'own'"),
        (_cast_a_part, "parameters have several dtypes"),
        (_hook, "BertLayer has forward hooks"),
    ],
    ids=["config", "adapter", "dtypes", "hook"],
)
@pytest.mark.parametrize("called", [False, True])
def test_explain_an_accelerated_model_that_runs_packed_no_more(
    change: Callable[[Any], object], reason: str, called: bool
) -> None:
    model = accelerate(families.make_model("bert"))
    batch = families.make_batch("bert", LENGTHS)
    with torch.inference_mode():
        model(**batch)
        change(model)
        if called:
            with contextlib.suppress(RuntimeError):
                model(**batch)
    told = explain(model)
    (line,) = (line for line in told.splitlines() if "every call runs the original" in line)
    assert "accelerated (bert)" in told
    assert reason in line
    assert "packed calls: 1" in told
    assert f"calls of the original forward: {int(called)}" in told


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: spectral_norm(m.encoder.layer[0].output.dense), "a weight is not among"),
        (lambda m: m.train(), "training mode with dropout"),
    ],
    ids=["adapted", "dropout"],
)
@pytest.mark.parametrize("trains", [False, True])
def test_explain_a_model_that_only_trains_packed(
    change: Callable[[Any], object], reason: str, trains: bool
) -> None:
    model = accelerate(families.make_model("bert"))
    change(model)
    model.requires_grad_(trains)
    batch = families.make_batch("bert", LENGTHS)
    model(**batch)
    with torch.inference_mode():
        model(**batch)
        told = explain(model)
    (line,) = (line for line in told.splitlines() if "the original forward now" in line)
    which = " that records no gradients" if trains else ""
    assert line.strip().startswith(f"every call{which} runs the original forward now: {reason}")
    assert f"packed calls: {int(trains)}" in told


def test_explain_tells_the_kernels_of_linear_layers() -> None:
    model = families.make_model("bert", hidden_size=52, num_attention_heads=2, intermediate_size=37)
    engine = PackedEncoder(model, dtype=torch.bfloat16)
    expected = [linears.choose(Target(torch.bfloat16, CPU), inputs) for inputs in (52, 37)]
    assert engine.linears() == (expected if expected[0] != expected[1] else expected[:1])
    told = explain(accelerate(model, dtype=torch.bfloat16))
    assert f"; linear: {'; '.join(map(str, engine.linears()))}" in told


def test_explain_tells_why_no_panels_run() -> None:
    model = accelerate(families.make_model("bert"), impl="reference")
    (told,) = (line for line in explain(model).splitlines() if "accelerated" in line)
    assert "(panels: the C++ ops do not run" in told.partition("; linear: ")[2]


def test_explain_a_fast_encoder() -> None:
    encoder = FastEncoder(families.make_sentence_transformer("bert"))
    encoder.encode(["one", "two"])
    text = explain(encoder)
    assert "encode: packed, float32 on cpu" in text
    assert "2 texts" in text
    assert "accelerate(model)" not in text


def _replace_forward(model: Any) -> None:
    model.encoder.forward = lambda *args, **how: type(model.encoder).forward(
        model.encoder, *args, **how
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "BertLayer has forward hooks"),
        (lambda m: m.register_forward_hook(lambda *_: None), "BertModel has forward hooks"),
        (_replace_forward, "forward of BertEncoder was replaced on an instance"),
        (lambda _: register_module_forward_hook(lambda *_: None), "registered on all modules"),
    ],
    ids=["inside", "around", "forward", "all modules"],
)
def test_explain_a_fast_encoder_whose_modules_must_be_called(
    change: Callable[[Any], Any], reason: str
) -> None:
    encoder = FastEncoder(families.make_sentence_transformer("bert"))
    handle = change(encoder[0].auto_model)
    try:
        encoder.encode(["one"])
        told = explain(encoder)
    finally:
        if handle is not None:
            handle.remove()
    (line,) = (line for line in told.splitlines() if "encode: " in line)
    assert line.startswith("  encode: sentence-transformers now: ") and reason in line
    assert f"1 x {encoder.stats.fallbacks.popitem()[0]}" in told


@pytest.mark.parametrize("length", [0, families.MAX_TOKENS + 1, "many"])
def test_a_max_seq_length_that_is_refused_is_told(length: object) -> None:
    encoder = FastEncoder(families.make_sentence_transformer("bert"))
    encoder.max_seq_length = length
    with pytest.raises(ValueError, match="max_seq_length must be an integer") as error:
        encoder.encode(["one"])
    assert encoder.unsupported_reason == str(error.value)
    assert f"  encode: refused: {error.value}" in explain(encoder).splitlines()


def test_weights_that_are_refused_are_told() -> None:
    encoder = FastEncoder(families.make_sentence_transformer("bert"))
    with torch.no_grad():
        encoder[0].auto_model.embeddings.LayerNorm.bias[3] = float("nan")
    encoder.refresh()
    assert encoder.unsupported_reason == "weights hold NaN or infinity: embeddings.LayerNorm.bias"
    assert f"encode: refused: {encoder.unsupported_reason}" in explain(encoder)
