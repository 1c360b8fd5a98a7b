"""The runtimes that people use on a CPU, all behind one driver: the Rust tokenizer, batches sorted
by length and padded, masked mean and L2 in numpy."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from sys import stderr
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbert_fast.bench.checkpoint import Checkpoint
from sbert_fast.bench.names import COMPILED, OURS, REFERENCE
from sbert_fast.bench.systems import NotAvailable, Packed, SentenceTransformers, Setting, System
from sbert_fast.data import sample_texts

Inputs = dict[str, NDArray[np.int64]]
Forward = Callable[[Inputs], NDArray[np.float32]]
MakeForward = Callable[[int], Forward]
_CALIBRATION_TEXTS = 300
_INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


class Padded(System):
    """A bare forward pass behind length-sorted padded batches, masked mean and L2.

    Args:
        folder: where tokenizer and limits come from.
        make_forward: from a number of workers, which share the threads evenly, to what each of
            them calls: int64 `[B, S]` arrays by name to last hidden states, float32 `[B, S, E]`,
            valid until the worker's next call.
        workers: numbers of workers that it supports.
    """

    def __init__(
        self, folder: Checkpoint, make_forward: MakeForward, workers: tuple[int, ...] = (1,)
    ) -> None:
        self.folder, self.workers = folder, workers
        self._forward = cache(make_forward)

    def encode(self, texts: list[str], setting: Setting) -> NDArray[np.float32]:
        tokens, forward = self.folder.tokenize(texts), self._forward(setting.workers)

        def run(rows: NDArray[np.int64]) -> NDArray[np.float32]:
            inputs = tokens.padded(rows, self.folder.pad)
            mask = inputs["attention_mask"][:, None].astype(np.float32)
            pooled = (mask @ forward(inputs))[:, 0] / tokens.lengths[rows, None]
            return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

        batches = tokens.batches(setting.batch_size)
        with ThreadPoolExecutor(setting.workers) as pool:
            computed = list((map if setting.workers == 1 else pool.map)(run, batches))
        out = np.empty((len(texts), computed[0].shape[1]), np.float32)
        out[np.concatenate(batches)] = np.concatenate(computed)
        return out

    def forget(self) -> None:
        """Load the model anew: runtimes keep what they made for every shape, which is gigabytes."""
        self._forward.cache_clear()

    def computed_tokens(self, texts: list[str], setting: Setting) -> int:
        tokens = self.folder.tokenize(texts)
        batches = tokens.batches(setting.batch_size)
        return sum(int(tokens.lengths[rows[0]]) * len(rows) for rows in batches)


def _require(module: str) -> Any:
    """Import a peer.

    Raises:
        NotAvailable: it is not installed, or does not load.
    """
    if importlib.util.find_spec(module) is None:
        raise NotAvailable("not installed")
    try:
        with redirect_stdout(stderr):
            return importlib.import_module(module)
    except Exception as error:
        raise NotAvailable(f"does not load: {type(error).__name__}: {error}") from error


def _hugging_face(folder: Checkpoint, precision: str) -> Any:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        folder.path, dtype=getattr(torch, precision), attn_implementation="sdpa"
    )
    return model.eval()


def export_onnx(folder: Checkpoint, target: Path) -> None:
    """Write the transformer of `folder` as ONNX with free batch and sequence dimensions.

    Raises:
        NotAvailable: onnx or onnxscript is missing.
    """
    for module in ("onnx", "onnxscript"):
        _require(module)
    import torch

    model = _hugging_face(folder, "float32")
    names = [n for n in _INPUT_NAMES if n in inspect.signature(model.forward).parameters]

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(names, args, strict=True))).last_hidden_state

    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=folder.max_length)}
    ones = torch.ones(2, 8, dtype=torch.int64)
    with redirect_stdout(stderr):
        torch.onnx.export(
            LastHiddenState().eval(),
            tuple(ones.clone() for _ in names),
            str(target),
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_shapes=(tuple(dict(free) for _ in names),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _quantized(onnx: Path) -> Path:
    """The export with int8 weights by channel, what they multiply being rounded as it comes."""
    target = onnx.with_name("int8.onnx")
    if not target.is_file():
        _require("onnxruntime")
        quantization = importlib.import_module("onnxruntime.quantization")
        how = {"weight_type": quantization.QuantType.QInt8, "per_channel": True}
        with redirect_stdout(stderr):
            quantization.quantize_dynamic(onnx, target, **how)
    return target


def _onnxruntime(folder: Checkpoint, precision: str, onnx: Path) -> MakeForward:
    if precision == "bfloat16":
        raise NotAvailable(f"has no {precision} kernels on a CPU")
    ort = _require("onnxruntime")
    if precision == "int8":
        onnx = _quantized(onnx)

    def make(workers: int) -> Forward:
        options = ort.SessionOptions()
        options.intra_op_num_threads = folder.threads // workers
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]

    return make


def _calibrated(model: Any, folder: Checkpoint) -> Any:
    """An OpenVINO model in int8, calibrated on the sample texts."""
    nncf = _require("nncf")
    tokens = folder.tokenize(sample_texts()[:_CALIBRATION_TEXTS])
    names = [port.any_name for port in model.inputs]
    rows = [tokens.padded(np.array([row]), folder.pad) for row in range(len(tokens.lengths))]
    dataset = nncf.Dataset([{name: inputs[name] for name in names} for inputs in rows])
    with redirect_stdout(stderr):
        return nncf.quantize(
            model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows)
        )


def _openvino(folder: Checkpoint, precision: str, onnx: Path) -> MakeForward:
    core = _require("openvino").Core()
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bfloat16" and not has_bf16:
        raise NotAvailable("this CPU has no bfloat16 instructions it could use")
    # In int8 it is the precision of what is not quantised.
    hint = "f32" if precision == "float32" or not has_bf16 else "bf16"
    model = core.read_model(str(onnx))
    if precision == "int8":
        model = _calibrated(model, folder)

    def make(workers: int) -> Forward:
        settings = {
            "INFERENCE_NUM_THREADS": folder.threads,
            "INFERENCE_PRECISION_HINT": hint,
            "NUM_STREAMS": workers,
        }
        compiled = core.compile_model(model, "CPU", settings)
        names = [port.any_name for port in compiled.inputs]
        own = threading.local()

        def forward(inputs: Inputs) -> NDArray[np.float32]:
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            arguments = {name: inputs[name] for name in names}
            return own.request.infer(arguments, share_inputs=True, share_outputs=True)[0]

        return forward

    return make


def _compiled(
    folder: Checkpoint, precision: str, onnx: Path, backend: str = "inductor"
) -> MakeForward:
    """torch.compile with weights frozen into the graph, and free batch and sequence dimensions."""
    import torch
    from torch._inductor import config

    if precision == "int8":
        raise NotAvailable("quantises models of torchao alone")
    module = _hugging_face(folder, precision)
    names = [n for n in _INPUT_NAMES if n in inspect.signature(module.forward).parameters]
    model = torch.compile(module, backend=backend, dynamic=True)

    def forward(inputs: Inputs) -> NDArray[np.float32]:
        tensors = {name: torch.from_numpy(inputs[name]) for name in names}
        with torch.no_grad(), config.patch(freezing=True):
            return model(**tensors).last_hidden_state.float().numpy()

    return lambda workers: forward


# What runs the ONNX export, and what runs the Hugging Face model.
ONNX: dict[str, Callable[..., MakeForward]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
TORCH: dict[str, Callable[..., MakeForward]] = {
    "zentorch": partial(_compiled, backend="zentorch"),
    COMPILED: _compiled,
}


def build(
    name: str, precision: str, folder: Checkpoint, onnx: Path, low_memory: bool = False
) -> System:
    """Make a system that runs on a CPU; the first one that needs the export `onnx` makes it.
    `low_memory` is for ours.

    Raises:
        NotAvailable: it cannot be measured here.
    """
    if name == OURS:
        return Packed(folder, precision, low_memory=low_memory)
    if name == REFERENCE:
        return SentenceTransformers(folder, precision)
    if not folder.pools_by_mean:
        raise NotAvailable("its driver pools by the mean and nothing else")
    if name != COMPILED:
        _require(name)
    if name in TORCH:
        return Padded(folder, TORCH[name](folder, precision, onnx))
    if not onnx.is_file():
        export_onnx(folder, onnx)
    # One batch on all threads, or a batch a thread: which is faster depends on the machine.
    workers = tuple(dict.fromkeys((1, folder.threads)))
    return Padded(folder, ONNX[name](folder, precision, onnx), workers)
