"""The correctness that stands before every figure: the worst text beside unpatched float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import OURS, OURS_CUDA, REFERENCE

FLOAT32_LOSS = 1e-6
WORST_LOSS = 5e-4


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of every row of `a` with the same row of `b`, both `[N, E]`, in float64.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"embeddings must have the reference's shape {b.shape}, got {a.shape}")
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    return (a64 * b64).sum(1) / (np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1))


def check(
    embeddings: dict[tuple[str, str], NDArray[np.float32]],
    precisions: list[str],
    system: str = OURS,
) -> dict[str, dict[str, Any]]:
    """The gate of each precision: our worst 1 - cosine, its limit, and whether it is green.

    Args:
        embeddings: `[N, E]` by system and precision; ours and the reference in each of
            `precisions`, and the reference in float32.
        precisions: which to check.
        system: the one of ours to check.
    """
    truth = embeddings[REFERENCE, "float32"]

    def loss(system: str, precision: str) -> float:
        return float((1 - cosines(embeddings[system, precision], truth)).max())

    gates = {}
    for precision in precisions:
        limit, rule = FLOAT32_LOSS, "fixed"
        if precision != "float32":
            limit = min(2 * loss(REFERENCE, precision), WORST_LOSS)
            rule = f"twice what {REFERENCE} loses, at most {WORST_LOSS:.0e}"
        ours = loss(system, precision)
        # Written so that NaN, which compares false, is never green.
        gates[precision] = {"green": ours <= limit, "loss": ours, "limit": limit, "rule": rule}
    return gates


def ratios(
    ours: str, each: Any, running: Sequence[Any], gates: dict[tuple[str, str], dict[str, Any]]
) -> dict[str, float]:
    """How many times faster ours is than `each`, by the precision of ours.

    Args:
        ours: name of the one of ours.
        each: a system with `name`, `precision` and `seconds`, one a round.
        running: all systems that took their turns.
        gates: of ours, by name and precision; what has no green one has no ratios.
    """

    def trusted(system: Any) -> bool:
        gate = gates.get((system.name, system.precision))
        return system.name not in (OURS, OURS_CUDA) or (gate is not None and gate["green"])

    return {
        other.precision: float(np.median(np.divide(each.seconds, other.seconds)))
        for other in running
        if other.name == ours != each.name and trusted(other) and trusted(each)
    }
