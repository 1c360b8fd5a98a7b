"""Where `auto` picks a CUDA kernel instead of the Triton one: a static table of what was measured.

A row is added when a check on a GPU has shown, for these sources, that the CUDA kernel is right and
the faster one; `result` is the file that shows it, and tests/benchmarks/test_report.py holds the
row to it. Without a row `auto` stays with Triton.

Length is deliberately not a key: a sequence would change its bits with the batch it is in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sbert_fast.ops import extension


@dataclass(frozen=True, slots=True)
class Choice:
    """Ops that run on their CUDA kernels.

    Attributes:
        ops: names of ops.
        capability: compute capability of the GPU, exactly.
        dtypes: dtypes of the activations.
        result: the file under benchmarks/results that justifies the row.
        head_dims: of attention, the head dims D; empty for the other ops.
    """

    ops: tuple[str, ...]
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    result: str
    head_dims: tuple[int, ...] = ()


CHOICES: tuple[Choice, ...] = ()


def find(
    op: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int | None
) -> Choice | None:
    """The row that makes `auto` pick the CUDA kernel of `op`; None where there is none."""
    for choice in CHOICES:
        applies = op in choice.ops and capability == choice.capability and dtype in choice.dtypes
        if applies and (head_dim in choice.head_dims or not choice.head_dims):
            return choice
    return None


# As extension.cuda_refusal.
@torch.compiler.assume_constant_result
def prefers_cuda(op: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> bool:
    """Whether `auto` picks the CUDA kernel of `op` on `device`, where that can run."""
    if not CHOICES or device.type != "cuda" or not torch.cuda.is_available():
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return find(op, extension.capability_of(index), dtype, head_dim) is not None
