"""The time of a model's matrix products alone: what is left if all else is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import stopwatch

_SAMPLES = 7
# Batches differ by a text or so: their sizes are rounded, and the smallest few are left to scale.
_GRID = {"cuda": 1024, "cpu": 16}
# BERT-like models whose feed-forwards have a gate.
_GATED = ("gte", "modernbert", "nomic_bert")


def layer_shapes(hidden: int, inner: int, gated: bool = False) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the four linear layers of a block; `inner` is half of a gated one."""
    return {
        "qkv": (3 * hidden, hidden),
        "output": (hidden, hidden),
        "up": (2 * inner if gated else inner, hidden),
        "down": (hidden, inner),
    }


def _shapes_of(config: dict[str, Any]) -> list[tuple[int, int]]:
    sizes = config["hidden_size"], config["intermediate_size"]
    return list(layer_shapes(*sizes, gated=config.get("model_type") in _GATED).values())


def flops_per_token(config: dict[str, Any]) -> int:
    """Of the linear layers of a BERT-family model, by its config; attention comes on top."""
    weights = sum(outputs * inputs for outputs, inputs in _shapes_of(config))
    return int(2 * config["num_hidden_layers"] * weights)


@contextmanager
def _preferred(library: str) -> Iterator[None]:
    """The library that torch multiplies with on a GPU, for a while."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def product(
    tokens: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Seconds of `[tokens, inputs] x [inputs, outputs]`, each way torch has.

    Returns:
        `seconds` of the fastest, `way`: its name, `ways`: seconds, or an error, of every one.
    """
    size = (tokens * (inputs + outputs) + inputs * outputs) * dtype.itemsize
    sets = stopwatch.cold_sets(device, size)
    xs = [torch.randn(tokens, inputs, device=device).to(dtype) for _ in range(sets)]
    rows = torch.randn(outputs, inputs, device=device).to(dtype)
    columns = rows.t().contiguous()
    calls: dict[str, stopwatch.Call] = {
        "linear": lambda i: F.linear(xs[i], rows),
        "mm": lambda i: torch.mm(xs[i], columns),
    }
    ways: dict[str, Any] = {}
    for library in ("cublas", "cublaslt") if device.type == "cuda" else ("default",):
        with _preferred(library):
            timings = stopwatch.take_turns(calls, sets, device, _SAMPLES)
        for name, timing in timings.items():
            ways[f"{library} {name}"] = timing.error or timing.median
    good = {way: seconds for way, seconds in ways.items() if isinstance(seconds, float)}
    if not good:
        raise RuntimeError(f"no matrix product ran: {ways}")
    best = min(good, key=good.__getitem__)
    return {"seconds": good[best], "way": best, "ways": ways}


def gemm_seconds(
    batch_tokens: list[int], config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds that the linear layers of a model take on batches of so many tokens."""
    shapes, grid = _shapes_of(config), _GRID[device.type]
    known: dict[int, float] = {}

    def block(tokens: int) -> float:
        rounded = max(grid, round(tokens / grid) * grid)
        if rounded not in known:
            known[rounded] = sum(product(rounded, *s, dtype, device)["seconds"] for s in shapes)
        return known[rounded] * tokens / rounded

    return config["num_hidden_layers"] * sum(map(block, batch_tokens))
