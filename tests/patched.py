"""A model beside its accelerated copy, and what "the same results" means for padded outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import families
from checks import assert_same_vectors
from sbert_fast import accelerate
from sbert_fast.patching import counts

LENGTHS = [7, 40, 1, 23, 64]
Batch = dict[str, Any]


def pair(name: str, **arguments: Any) -> tuple[Any, Any]:
    """A model, and an accelerated copy of it."""
    original = families.make_model(name, **arguments)
    return original, accelerate(copy.deepcopy(original))


def run(model: Any, batch: Batch) -> Any:
    with torch.inference_mode():
        return model(**batch)


def assert_same_states(ours: Any, theirs: Any, keep: Tensor) -> None:
    """Kept rows within the fp32 budget, masked rows zero, poolers within the budget."""
    keep = keep.bool()
    assert type(ours) is type(theirs)
    assert ours.keys() == theirs.keys()
    assert ours[0].shape == theirs[0].shape
    assert ours[0].dtype == theirs[0].dtype
    assert_same_vectors(ours[0][keep], theirs[0][keep])
    assert not ours[0][~keep].any()
    if "pooler_output" in theirs:
        assert_same_vectors(ours.pooler_output, theirs.pooler_output)


def assert_identical(ours: Any, theirs: Any) -> None:
    """Bit for bit, all the way down."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    elif theirs is not None:
        items = (ours.values(), theirs.values()) if hasattr(theirs, "values") else (ours, theirs)
        for a, b in zip(*items, strict=True):
            assert_identical(a, b)


def assert_packed(name: str, batch: Batch, **arguments: Any) -> None:
    """`batch` runs packed and gives what the original gives."""
    original, model = pair(name, **arguments)
    ours, theirs = run(model, batch), run(original, batch)
    keep = batch.get("attention_mask")
    keep = torch.ones_like(batch["input_ids"]) if keep is None else keep
    assert_same_states(ours, theirs, keep)
    assert counts(model) == {"packed": 1}


def assert_raises_as_original(name: str, batch: Batch) -> None:
    """Both refuse `batch`, in the same words."""
    original, model = pair(name)
    with pytest.raises(Exception) as theirs:
        run(original, batch)
    with pytest.raises(type(theirs.value)) as ours:
        run(model, batch)
    assert str(ours.value) == str(theirs.value)
    assert "packed" not in counts(model)
