"""Triton kernels of sbert_fast, one op per file.

This folder is installed as the package ``sbert_fast.kernels`` (``package_dir`` in ``setup.py``).
The parent folder has no ``__init__.py`` on purpose: a top-level package called ``kernels`` would
shadow Hugging Face's package of that name, which transformers imports.

Triton is imported by the first launch and not before. With ``TRITON_INTERPRET=1`` in the
environment, set before anybody imports Triton, the kernels run on CPU tensors in its interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Op -> module of this package that defines its launcher: a function of the op's name that takes the
# arguments of the op's schema, all tensors on one device.
LAUNCHERS = {
    "varlen_attention": "varlen_attention",
    "embed_norm": "embed_norm",
    "add_norm": "add_norm",
    "add_norm_sum": "add_norm",
    "bias_gelu": "bias_gelu",
    "gated_activation": "gated_activation",
    "segment_pool": "segment_pool",
    "segment_pool_out": "segment_pool",
    "norm_pool": "norm_pool",
    "norm_pool_out": "norm_pool",
    "content_hash": "content",
    "varlen_attention_backward": "varlen_attention_backward",
    "add_norm_backward": "add_norm_backward",
    "bias_gelu_backward": "bias_gelu_backward",
    "gated_activation_backward": "gated_activation_backward",
}

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)


# Triton compiles and loads a kernel at its first launch, which another thread must not cut into.
_launching = threading.RLock()


def interpreted() -> bool:
    """Whether kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def launcher(op: str) -> Callable[..., Any]:
    """The launcher of `op`; its module, and Triton, are imported by the first call."""

    @lru_cache(maxsize=1)
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{__name__}.{LAUNCHERS[op]}"), op)

    def launch(*args: Any) -> Any:
        # Triton launches on the current device, whatever the tensors are on.
        device = next(a.device for a in args if isinstance(a, Tensor))
        with _launching:
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return load()(*args)
            return load()(*args)

    launch.__name__ = op
    return launch


# Asks the machine what a graph cannot hold, and the answer is the same every time.
@torch.compiler.assume_constant_result
def refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None where they can."""
    if device.type == "cpu" and interpreted():
        return _missing()
    if device.type != "cuda":
        return f"the Triton kernels run on cuda, not on {device.type}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _missing() or _too_old(index)


@lru_cache(maxsize=1)
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    compilers = (os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))
    if not interpreted() and not any(compilers):
        return "Triton needs a C compiler: install gcc or clang, or name one in CC"
    return None


@lru_cache
def _too_old(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < MIN_CAPABILITY:
        return (
            "the Triton kernels need compute capability 8.0 or later, "
            f"{torch.cuda.get_device_name(index)} has {major}.{minor}"
        )
    return None
