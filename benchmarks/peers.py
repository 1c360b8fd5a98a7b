"""The systems of the encode benchmark. Each does one job: strings to L2-normalised float32 rows.

`build` makes a system, or raises :class:`NotAvailable` with the reason why it cannot be measured.
Nothing heavy is imported before a system needs it, so that a process which runs one system shows
that system's memory and no other's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from padded import Forward, Inputs, ModelFolder, NotAvailable, Padded, Setting
from report import OURS, REFERENCE

MakeForward = Callable[[int], Forward]
_INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


class System(Protocol):
    """Something that embeds texts.

    Attributes:
        batch_sizes: whether it takes batch sizes; False where it plans its batches itself.
        workers: how many batches it can compute at the same time.
    """

    batch_sizes: bool
    workers: tuple[int, ...]

    def encode(self, texts: list[str], setting: Setting) -> NDArray[np.float32]:
        """L2-normalised float32 `[N, E]` in the order of `texts`."""

    def computed_tokens(self, texts: list[str], setting: Setting) -> int | None:
        """Tokens computed, padding included; None where there is no padding."""

    def forget(self) -> None:
        """Drop what is kept for the shapes of earlier batches."""


class Packed:
    """FastEncoder with its default settings."""

    batch_sizes = False
    workers = (1,)

    def forget(self) -> None:
        """It keeps nothing."""

    def __init__(self, folder: ModelFolder, precision: str) -> None:
        from sbert_fast import FastEncoder

        self.encoder = FastEncoder(str(folder.path), device="cpu", dtype=precision)
        if self.encoder.unsupported_reason:
            raise NotAvailable(f"unaccelerated: {self.encoder.unsupported_reason}")
        self.normalize = not folder.normalizes

    def encode(self, texts: list[str], setting: Setting) -> NDArray[np.float32]:
        out = self.encoder.encode(
            texts, show_progress_bar=False, normalize_embeddings=self.normalize
        )
        if self.encoder.stats.fallbacks:
            raise RuntimeError(f"encode did not run packed: {self.encoder.stats.fallbacks}")
        return out

    def computed_tokens(self, texts: list[str], setting: Setting) -> None:
        return None


class SentenceTransformers:
    """SentenceTransformer.encode, unpatched."""

    batch_sizes = True
    workers = (1,)

    def forget(self) -> None:
        """It keeps nothing."""

    def __init__(self, folder: ModelFolder, precision: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        dtype = getattr(torch, precision)
        self.model = SentenceTransformer(
            str(folder.path), device="cpu", model_kwargs={"dtype": dtype}
        )
        self.normalize = not folder.normalizes

    def encode(self, texts: list[str], setting: Setting) -> NDArray[np.float32]:
        return self.model.encode(
            texts,
            batch_size=setting.batch_size,
            show_progress_bar=False,
            normalize_embeddings=self.normalize,
        )

    def computed_tokens(self, texts: list[str], setting: Setting) -> int:
        total = 0

        def count(module: Any, args: tuple[Any, ...]) -> None:
            nonlocal total
            total += args[0]["input_ids"].numel()

        hook = self.model[0].register_forward_pre_hook(count)
        try:
            self.encode(texts, setting)
        finally:
            hook.remove()
        return total


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


def _hugging_face(folder: ModelFolder, precision: str) -> Any:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        folder.path, dtype=getattr(torch, precision), attn_implementation="sdpa"
    )
    return model.eval()


def export_onnx(folder: ModelFolder, target: Path) -> None:
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


def _onnxruntime(folder: ModelFolder, precision: str, onnx: Path) -> MakeForward:
    if precision != "float32":
        raise NotAvailable(f"has no {precision} kernels on a CPU")
    ort = _require("onnxruntime")

    def make(workers: int) -> Forward:
        options = ort.SessionOptions()
        options.intra_op_num_threads = folder.threads // workers
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]

    return make


def _openvino(folder: ModelFolder, precision: str, onnx: Path) -> MakeForward:
    core = _require("openvino").Core()
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    if precision == "bfloat16" and "BF16" not in core.get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        raise NotAvailable("this CPU has no bfloat16 instructions it could use")

    def make(workers: int) -> Forward:
        settings = {
            "INFERENCE_NUM_THREADS": folder.threads,
            "INFERENCE_PRECISION_HINT": hint,
            "NUM_STREAMS": workers,
        }
        compiled = core.compile_model(str(onnx), "CPU", settings)
        names = [port.any_name for port in compiled.inputs]
        own = threading.local()

        def forward(inputs: Inputs) -> NDArray[np.float32]:
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            arguments = {name: inputs[name] for name in names}
            return own.request.infer(arguments, share_inputs=True, share_outputs=True)[0]

        return forward

    return make


def _compiled(folder: ModelFolder, precision: str, backend: str) -> MakeForward:
    """torch.compile with weights frozen into the graph, and free batch and sequence dimensions."""
    import torch
    from torch._inductor import config

    module = _hugging_face(folder, precision)
    names = [n for n in _INPUT_NAMES if n in inspect.signature(module.forward).parameters]
    model = torch.compile(module, backend=backend, dynamic=True)

    def forward(inputs: Inputs) -> NDArray[np.float32]:
        tensors = {name: torch.from_numpy(inputs[name]) for name in names}
        with torch.no_grad(), config.patch(freezing=True):
            return model(**tensors).last_hidden_state.float().numpy()

    return lambda workers: forward


def _zentorch(folder: ModelFolder, precision: str) -> MakeForward:
    _require("zentorch")
    return _compiled(folder, precision, "zentorch")


def _torch_compile(folder: ModelFolder, precision: str) -> MakeForward:
    return _compiled(folder, precision, "inductor")


ONNX: dict[str, Callable[[ModelFolder, str, Path], MakeForward]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
TORCH: dict[str, Callable[[ModelFolder, str], MakeForward]] = {
    "zentorch": _zentorch,
    "torch-compile": _torch_compile,
}


def build(name: str, precision: str, folder: ModelFolder, onnx: Path) -> System:
    """Make a system.

    Args:
        name: `OURS` or one of `PEERS`.
        precision: one of `PRECISIONS`.
        folder: the model.
        onnx: its ONNX export; made there by the first system that needs it.

    Raises:
        NotAvailable: it cannot be measured here.
    """
    if name == OURS:
        return Packed(folder, precision)
    if name == REFERENCE:
        return SentenceTransformers(folder, precision)
    folder.check_mean_pooling()
    if name in TORCH:
        return Padded(folder, TORCH[name](folder, precision))
    _require(name)
    if not onnx.is_file():
        export_onnx(folder, onnx)
    # One batch on all threads, or a batch a thread: which is faster depends on the machine.
    workers = tuple(dict.fromkeys((1, folder.threads)))
    return Padded(folder, ONNX[name](folder, precision, onnx), workers)
