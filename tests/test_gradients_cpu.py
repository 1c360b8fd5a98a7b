"""Gradients of the C++ ops: every instruction set, sizes that vectors do not divide, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from op_cases import add_norm_args, arguments
from sbert_fast.testing import pack_lengths
from test_gradients import CASES, FULL, case, check, overload


@pytest.mark.usefixtures("isa", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "changes"),
    [each for each in CASES if each[0] not in ("embed_norm", "segment_pool")],
)
def test_instruction_sets(op: str, changes: dict[int, Any], dtype: torch.dtype) -> None:
    check(op, "cpu", case(op, changes, dtype), dtype)


@pytest.mark.usefixtures("isa", "poisoned_memory")
@pytest.mark.parametrize("dim", [8, 16, 33, 64, 100, 256])
def test_head_dims(dim: int) -> None:
    changes = FULL | {4: 40, 6: None if dim % 2 else True}
    args = case("varlen_attention", changes, torch.float32, lengths=(1, 130, 0, 33), dim=dim)
    check("varlen_attention", "cpu", args, torch.float32)


@pytest.mark.usefixtures("isa", "poisoned_memory")
@pytest.mark.parametrize(
    "changes",
    [{5: 3}, {5: 40, 9: True}, {9: True}, {4: 7, 5: 20, 17: 0.3}, FULL | {5: 70}],
    ids=str,
)
def test_keys_that_are_out_of_sight(changes: dict[int, Any]) -> None:
    """Of sequences that are longer than what the queries of a block see."""
    args = case("varlen_attention", changes, torch.float32, lengths=(1, 200, 0, 33))
    check("varlen_attention", "cpu", args, torch.float32)


@pytest.mark.usefixtures("isa", "poisoned_memory")
@pytest.mark.parametrize("width", [1, 7, 16, 384, 5000])
def test_widths(width: int) -> None:
    args = add_norm_args(130, width, torch.float32)
    check("add_norm", "cpu", args, torch.float32)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tanh", [False, True])
def test_slopes_of_gelu_far_from_zero(tanh: bool) -> None:
    """0 or 1 but for rounding, and nothing is NaN."""
    x = torch.tensor([[11, 40, 1e10, 3e38]], requires_grad=True)
    for sign, slope in ((1, 1.0), (-1, 0.0)):
        out = overload("bias_gelu", "cpu")(sign * x, None, tanh)
        (found,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(found, torch.full_like(x, sign * slope))


def _replaced(op: str, place: int, value: Any) -> list[Any]:
    args = [*arguments(op, torch.float32)]
    args += {
        ATTENTION: [False, None, None, 0, None, None, 0.0],
        NORM: [False, None],
    }.get(op, [])
    args[place] = value
    return args


ATTENTION, NORM = "varlen_attention_backward", "add_norm_backward"
GELU, GATE = "bias_gelu_backward", "gated_activation_backward"
BAD: list[tuple[str, int, Any, str]] = [
    (ATTENTION, 0, torch.zeros(112, 2, 8), r"grad must be .* \[T, H, D\] = \[112, 2, 26\], got"),
    (ATTENTION, 1, torch.zeros(112, 2, 26), r"qkv must be contiguous float32 \[T, 3, H, D\]"),
    (ATTENTION, 1, torch.zeros(112, 3, 2, 8), "grad must be"),
    (ATTENTION, 1, torch.zeros(112, 3, 2, 4), r"D must be in \[8, 256\], got 4"),
    (ATTENTION, 2, pack_lengths([113]), r"cu_seqlens must end at or before T = 112, got 113"),
    (ATTENTION, 3, 63, "max_seqlen must be at least 64, the longest sequence, got 63"),
    (ATTENTION, 5, torch.zeros(2, 6), r"bias must be \[H, 2R \+ 1\] with an odd number"),
    (ATTENTION, 6, -2, "window must be at least -1, got -2"),
    (ATTENTION, 8, torch.zeros(112, 13), "rotary_cos and rotary_sin must both be given"),
    (ATTENTION, 10, 1, r"qkv must be contiguous float32 \[T, H \+ 2 \* kv_heads, D\]"),
    (ATTENTION, 11, torch.zeros(8), r"query_norm must be .* \[D\] = \[26\], got"),
    (NORM, 0, torch.zeros(112, 8), r"grad must be .* \[T, E\] = \[112, 52\], got"),
    (NORM, 1, torch.zeros(112, 52, dtype=torch.float64), "x must be float32 or bfloat16"),
    (NORM, 3, torch.zeros(3, 52), "residual must be"),
    (NORM, 4, torch.zeros(8), "weight must be"),
    (NORM, 7, torch.zeros(8), "grad_sum must be"),
    (GELU, 0, torch.zeros(112, 8), r"grad must be .* \[T, F\] = \[112, 52\], got"),
    (GELU, 1, torch.zeros(112, 52, dtype=torch.float64), "x must be float32 or bfloat16"),
    (GELU, 2, torch.zeros(8), "bias must be"),
    (GATE, 0, torch.zeros(112, 52), r"grad must be .* \[T, F\] = \[112, 26\], got"),
    (GATE, 3, 4, r"activation must be in \[0, 4\), got 4"),
]


@pytest.mark.parametrize(("op", "place", "value", "message"), BAD)
def test_bad_arguments(op: str, place: int, value: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        overload(op, "cpu")(*_replaced(op, place, value))
