"""What "the same result as sentence-transformers" means, for every test that says it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# The fp32 budget of a vector: 1 - cos, and the difference of any component in units of its norm.
MAX_DISTANCE = 1e-6
MAX_DELTA = 2e-6


def _rows(vectors: Any) -> np.ndarray:
    array = vectors.numpy() if isinstance(vectors, Tensor) else np.asarray(vectors)
    array = array.astype(np.float64)
    return array.reshape(-1, array.shape[-1])


def cosine_distances(ours: Any, theirs: Any) -> np.ndarray:
    """`1 - cos` of matching rows in fp64; 0 where both rows are zero."""
    a, b = _rows(ours), _rows(theirs)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = (a * b).sum(axis=1)
    return 1 - np.divide(dots, norms, out=np.ones_like(dots), where=norms > 0)


def assert_same_vectors(ours: Any, theirs: Any) -> None:
    """fp32 vectors `[..., E]` within the budget, the worst row and not the mean."""
    assert tuple(ours.shape) == tuple(theirs.shape)
    if 0 in ours.shape:
        return
    distances = cosine_distances(ours, theirs)
    worst = int(distances.argmax())
    assert distances[worst] <= MAX_DISTANCE, f"1 - cos = {distances[worst]:.3e} in row {worst}"
    b = _rows(theirs)
    deltas = np.abs(_rows(ours) - b).max(axis=1)
    over = deltas - MAX_DELTA * np.linalg.norm(b, axis=1)
    worst = int(over.argmax())
    assert over[worst] <= 0, f"a component of row {worst} is off by {deltas[worst]:.3e}"


def assert_same_result(ours: Any, theirs: Any) -> None:
    """The same types, dtypes, devices and shapes all the way down, and the same values."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_result(a, b)
    elif isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            assert_same_result(ours[key], value)
    elif isinstance(theirs, (Tensor, np.ndarray)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.device == theirs.device
        if ours.dtype in (torch.float32, np.float32):
            assert_same_vectors(ours, theirs)
        else:
            assert (ours == theirs).all()
    else:
        assert ours == theirs


def assert_same_scores(ours: Any, theirs: Any) -> None:
    """The same type, dtype and shape, and the same scores to 1e-5."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        ours, theirs = (torch.stack(x) if x else torch.tensor([]) for x in (ours, theirs))
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    delta = np.asarray(ours, dtype=np.float64) - np.asarray(theirs)
    assert np.abs(delta).max(initial=0) < 1e-5


def bits(vectors: Any) -> np.ndarray:
    """fp32 vectors as the integers that hold them: equal only where every bit is."""
    array = vectors.numpy() if isinstance(vectors, Tensor) else np.asarray(vectors)
    assert array.dtype == np.float32
    return array.view(np.int32)
