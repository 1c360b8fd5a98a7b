"""What each family runs on: a row of the README's table, from calls that are made here."""

from __future__ import annotations

import warnings

import torch

import families
import rerankers
from patched import pair, run
from sbert_fast import FastCrossEncoder, FastEncoder, ops
from sbert_fast.errors import ImplementationError
from sbert_fast.patching import counts

TEXTS = families.make_texts(3)


def row(name: str) -> list[str]:
    """Base model, encode, cross-encoder, accelerate, CPU in float32 and bfloat16, Triton, CUDA; the
    CUDA ops take CPU tensors, in the emulator."""
    original, accelerated = pair(name)
    run(accelerated, families.make_batch(name, [5, 3]))
    return [
        f"`{type(original).__name__}`",
        _packed(_encodes(name)),
        _packed(_scores(name)),
        _packed(counts(accelerated) == {"packed": 1}),
        _on_cpu(name, torch.float32),
        _on_cpu(name, torch.bfloat16),
        _on_gpu(name, "triton", None),
        _on_gpu(name, "cuda", "cpu"),
    ]


def _packed(runs: bool) -> str:
    return "packed" if runs else "stock"


def _encodes(name: str) -> bool:
    encoder = FastEncoder(families.make_sentence_transformer(name))
    encoder.encode(TEXTS)
    return not encoder.stats.fallbacks


def _scores(name: str) -> bool:
    make = rerankers.make_reranker if name in rerankers.NAMES else families.make_cross_encoder
    with warnings.catch_warnings(action="ignore"):
        model = FastCrossEncoder(make(name))
    model.predict([(text, TEXTS[0]) for text in TEXTS])
    return not model.stats.fallbacks


def _on_cpu(name: str, dtype: torch.dtype) -> str:
    encoder = FastEncoder(families.make_sentence_transformer(name), dtype=dtype)
    ops.reset_launches()
    encoder.encode(TEXTS)
    return "C++" if {implementation for _, implementation in ops.launches()} == {"cpu"} else "part"


def _on_gpu(name: str, implementation: str, device: str | None) -> str:
    """Whether the kernels have every op: in an interpreter or an emulator where no GPU is."""
    model = families.make_sentence_transformer(name)
    try:
        encoder = FastEncoder(model, impl=implementation, dtype=torch.float16, device=device)
        ops.reset_launches()
        encoder.encode(TEXTS[0])
    except ImplementationError:
        return "part"
    return "all" if {each for _, each in ops.launches()} == {implementation} else "part"
