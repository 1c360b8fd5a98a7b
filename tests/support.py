"""What each family runs on: a row of the README's table, from calls that are made here."""

from __future__ import annotations

import warnings

import torch

import families
import rerankers
from patched import pair, run
from sbert_fast import FastCrossEncoder, FastEncoder, ops
from sbert_fast.engine import PackedEncoder
from sbert_fast.ops import limits, schemas
from sbert_fast.patching import counts

TEXTS = families.make_texts(3)


def row(name: str) -> list[str]:
    """Base model, encode, cross-encoder, accelerate, CPU in float32 and bfloat16, Triton, CUDA."""
    original, accelerated = pair(name)
    run(accelerated, families.make_batch(name, [5, 3]))
    return [
        f"`{type(original).__name__}`",
        _packed(_encodes(name)),
        _packed(_scores(name)),
        _packed(counts(accelerated) == {"packed": 1}),
        _on_cpu(name, torch.float32),
        _on_cpu(name, torch.bfloat16),
        *(on_gpu(name, implementation) for implementation in ("triton", "cuda")),
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


def on_gpu(name: str, implementation: str) -> str:
    """Whether the kernels have every op, asked of the schemas: no GPU is needed to know it."""
    for op, how in PackedEncoder(families.make_model(name)).required_ops():
        needs = (*how.get("needs", ()), *(n for n, v in how.get("options", {}).items() if v))
        lacked = schemas.LACKED.get(implementation, {}).get(op, ())
        if implementation not in schemas.implementations(op) or set(needs) & set(lacked):
            return "part"
        if implementation == "cuda" and how.get("head_dim", 0) > limits.MAX_HEAD_DIM:
            return "part"
    return "all"
