"""The correctness that stands before every figure: the worst text beside unpatched float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.text import OURS, OURS_CUDA, REFERENCE

FLOAT32_LOSS = 1e-6
WORST_LOSS = 5e-4

# By name and precision of a system.
Embeddings = dict[tuple[str, str], NDArray[np.float32]]
Gates = dict[tuple[str, str], dict[str, Any]]


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of every row of `a` with the same row of `b`, both `[N, E]`, in float64.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"embeddings must have the reference's shape {b.shape}, got {a.shape}")
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    return (a64 * b64).sum(1) / (np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1))


def check(embeddings: Embeddings) -> Gates:
    """The gates of ours: the worst 1 - cosine, its limit, and whether it is green.

    Args:
        embeddings: `[N, E]`; among them the reference in float32. Ours in a precision without the
            reference has no gate.
    """
    truth = embeddings[REFERENCE, "float32"]

    def loss(name: str, precision: str) -> float:
        return float((1 - cosines(embeddings[name, precision], truth)).max())

    gates = {}
    for name, precision in embeddings:
        if name not in (OURS, OURS_CUDA) or (REFERENCE, precision) not in embeddings:
            continue
        limit, rule = FLOAT32_LOSS, "fixed"
        if precision != "float32":
            limit = min(2 * loss(REFERENCE, precision), WORST_LOSS)
            rule = f"twice what {REFERENCE} loses, at most {WORST_LOSS:.0e}"
        ours = loss(name, precision)
        # Written so that NaN, which compares false, is never green.
        green = ours <= limit
        gates[name, precision] = {"green": green, "loss": ours, "limit": limit, "rule": rule}
    return gates


def ratios(ours: str, each: Any, running: Sequence[Any], gates: Gates) -> dict[str, float]:
    """How many times faster ours is than `each`, by the precision of ours.

    Args:
        ours: name of the one of ours.
        each: a system with `name`, `precision` and `seconds`, one a round.
        running: all systems that took their turns.
        gates: of ours; what has no green one has no ratios.
    """

    def trusted(system: Any) -> bool:
        gate = gates.get((system.name, system.precision))
        return system.name not in (OURS, OURS_CUDA) or (gate is not None and gate["green"])

    return {
        other.precision: float(np.median(np.divide(each.seconds, other.seconds)))
        for other in running
        if other.name == ours != each.name and trusted(other) and trusted(each)
    }
