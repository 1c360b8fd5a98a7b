"""What embeddings depend on beside texts and options: a hash of the model, and where it runs."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from typing import Any

import torch

from sbert_fast.sentence_transformers.encoder import FastEncoder

_PACKAGES = (
    "sbert-fast",
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
)
# Of a tokenizer: what changes its ids and the tokenizer.json of its backend does not hold.
_TOKENIZER_SETTINGS = (
    "chat_template",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)
# Of a config: where it was loaded from, and by what.
_UNRELATED = ("_name_or_path", "transformers_version")


def identity(encoder: FastEncoder) -> dict[str, str]:
    """What two runs must have in common for equal bits.

    Args:
        encoder: as loaded, before it has embedded anything.

    Returns:
        `"model"`: SHA-256 of weights, configs, tokenizers and prompts; the versions of packages;
        `"implementation"`: what "auto" means; `"processor"`: the GPU, or the instruction set of
        the C++ ops.
    """
    found = {"model": model_digest(encoder)}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["implementation"] = os.environ.get("SBERT_FAST_IMPL", "auto")
    return found | {"processor": _processor(encoder.device)}


def model_digest(encoder: FastEncoder) -> str:
    """SHA-256 of what the embeddings of a model depend on, wherever it was loaded from."""
    digest = hashlib.sha256()
    settings = {"prompts": encoder.prompts, "default_prompt_name": encoder.default_prompt_name}
    digest.update(_json(settings | {"truncate_dim": encoder.truncate_dim}))
    for name, module in encoder.named_modules():
        digest.update(f"\0{name}\0{type(module).__module__}.{type(module).__qualname__}".encode())
        if (config := getattr(module, "config", None)) is not None and hasattr(config, "to_dict"):
            settings = config.to_dict()
            digest.update(_json({k: v for k, v in settings.items() if k not in _UNRELATED}))
        if hasattr(module, "get_config_dict"):
            digest.update(_json(module.get_config_dict()))
        if (tokenizer := getattr(module, "tokenizer", None)) is not None:
            digest.update(_tokenizer(tokenizer))
    tensors = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _json(settings: dict[str, Any]) -> bytes:
    return json.dumps(settings, sort_keys=True, default=repr).encode()


def _tokenizer(tokenizer: Any) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    described = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    settings = {name: getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS}
    if hasattr(backend, "to_str"):
        described = backend.to_str()
    else:
        # The repr of one that is written in Python may hold its folder or its address.
        values = vars(tokenizer).items() if hasattr(tokenizer, "__dict__") else ()
        settings |= {name: value for name, value in values if isinstance(value, bool | int | float)}
        settings["special_tokens_map"] = getattr(tokenizer, "special_tokens_map", None)
        if hasattr(tokenizer, "get_vocab"):
            settings["vocab"] = tokenizer.get_vocab()
    return described.encode() + _json(settings)


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    ops = torch.ops.sbert_fast
    return f"cpu, {ops.cpu_isa() if hasattr(ops, 'cpu_isa') else 'without C++ ops'}"
