"""Gradients in Triton: figures, isolation, and what the compiler makes of their kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from op_cases import add_norm_args, randn
from sbert_fast.kernels import aot
from sbert_fast.testing import pack_lengths
from test_gradients import (
    CASES,
    FULL,
    assert_sequences_are_apart,
    called,
    case,
    check,
    gradients,
    upstream,
)

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
OPS = torch.ops.sbert_fast
every_case = pytest.mark.parametrize(("op", "changes"), CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
# Two columns, fewer than a chunk, three chunks, chunks and a rest, rows over four and eight warps.
SHAPES = [(33, 2), (9, 37), (70, 384), (5, 1000), (5, 2048), (3, 4096)]


@pytest.fixture(autouse=True)
def poisoned_and_quiet(poisoned: None) -> Iterator[None]:
    """Outputs hold NaN before a kernel runs. So may rows that are not written, and numpy would warn
    of them."""
    with np.errstate(all="ignore"):
        yield


@every_case
@every_dtype
def test_2x_rule(triton_device: str, op: str, changes: dict[int, Any], dtype: torch.dtype) -> None:
    check(op, "triton", case(op, changes, dtype), dtype, triton_device)


ATTENTION = "varlen_attention"
WINDOWED: dict[int, Any] = {4: 7, 5: 20, 6: True, 9: True}


@every_dtype
@pytest.mark.parametrize("dim", [16, 37, 64, 100, 256])
def test_head_dims(triton_device: str, dim: int, dtype: torch.dtype) -> None:
    for changes in ({4: 90}, FULL | {6: None if dim % 2 else True}):
        args = case(ATTENTION, changes, dtype, lengths=(1, 70, 0, 17), dim=dim)
        check(ATTENTION, "triton", args, dtype, triton_device)


@every_dtype
@pytest.mark.parametrize(
    "changes",
    [{5: 3}, {5: 40, 9: True}, {9: True, 10: 1}, WINDOWED, FULL | {4: 100, 5: 40}],
    ids=str,
)
def test_keys_that_are_out_of_sight(
    triton_device: str, changes: dict[int, Any], dtype: torch.dtype
) -> None:
    """Of sequences that are longer than what the queries of a block see."""
    args = case(ATTENTION, changes, dtype, lengths=(1, 100, 0))
    check(ATTENTION, "triton", args, dtype, triton_device)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({5: 3, 10: 1, 11: True}, HALF), ({5: 3, 10: 1, 11: True}, SINGLE), ({4: 7}, HALF)],
    ids=str,
)
def test_rows_behind_a_sequence_reach_nothing(
    triton_device: str, changes: dict[int, Any], dtype: torch.dtype
) -> None:
    """They may see no key; or see keys that a bias puts beyond what an exponential can be."""
    args = case(ATTENTION, changes, dtype, lengths=(5, 20))
    args[4] = None if args[4] is None else (args[4].detach() + 120).requires_grad_()
    check(ATTENTION, "triton", args, dtype, triton_device)


@pytest.mark.parametrize(
    ("reach", "causal"), [(5, False), (31, False), (32, True), (63, False), (200, True)]
)
def test_reaches_of_a_bias(triton_device: str, reach: int, causal: bool) -> None:
    """Short of blocks, along their edges and beyond sequences, of more than a program adds up."""
    lengths = (*(0,) * 15, 1, 5, 70)
    args = case(ATTENTION, {4: reach, 9: causal}, SINGLE, lengths=lengths, dim=8)
    check(ATTENTION, "triton", args, SINGLE, triton_device)


@every_dtype
@pytest.mark.parametrize("changes", [{}, FULL, WINDOWED | {17: 0.3}], ids=str)
def test_a_sequence_that_is_nan_changes_no_gradient_of_another(
    triton_device: str, changes: dict[int, Any], dtype: torch.dtype
) -> None:
    args = case(ATTENTION, changes, dtype)
    assert_sequences_are_apart(ATTENTION, called(ATTENTION, "triton", triton_device), args)


@every_dtype
@pytest.mark.parametrize("changes", [{}, {4: 5, 9: True}, {10: 1, 11: True}], ids=str)
def test_place_in_the_batch_changes_no_gradient(
    triton_device: str, changes: dict[int, Any], dtype: torch.dtype
) -> None:
    args = case(ATTENTION, changes, dtype, lengths=(9, 0, 70, 33))
    function, grad = called(ATTENTION, "triton", triton_device), upstream(ATTENTION, args)
    together, *_ = gradients(ATTENTION, function, args, grad)
    alone = [args[0][9:79].clone(), pack_lengths((70,)), 70, *args[3:]]
    (part,) = grad
    own, *_ = gradients(ATTENTION, function, alone, [part[9:79].clone()])
    assert torch.equal(own, together[9:79])


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=str)
def test_gradients_without_tokens(triton_device: str, lengths: tuple[int, ...]) -> None:
    args = case(ATTENTION, FULL, SINGLE, lengths=lengths)
    found = gradients(
        ATTENTION, called(ATTENTION, "triton", triton_device), args, upstream(ATTENTION, args)
    )
    assert not any(part.any() for part in found)


@pytest.mark.gpu
def test_gradients_repeat_bit_for_bit(triton_device: str) -> None:
    if triton_device == "cpu":
        return  # nothing runs at the same time in the interpreter
    args = case(ATTENTION, FULL | {17: 0.3}, HALF, lengths=[i * 7 % 150 for i in range(300)])
    function, grad = called(ATTENTION, "triton", triton_device), upstream(ATTENTION, args)
    expected = gradients(ATTENTION, function, args, grad)
    for _ in range(5):
        found = gradients(ATTENTION, function, args, grad)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("op", ["add_norm", "add_norm_sum"])
@every_dtype
@pytest.mark.parametrize(("T", "E"), SHAPES)
def test_norms(triton_device: str, T: int, E: int, dtype: torch.dtype, op: str, rms: bool) -> None:
    torch.manual_seed(0)
    x, bias, residual, *norm = add_norm_args(T, E, dtype)
    for optional in ([bias, residual], [None, None]):
        check(op, "triton", [x, *optional, *norm, rms], dtype, triton_device)


@every_dtype
def test_norms_without_an_epsilon(triton_device: str, dtype: torch.dtype) -> None:
    """Rows that are not there, beside those that are, are not divided by zero."""
    torch.manual_seed(0)
    args = [*add_norm_args(3, 37, dtype)[:5], 0.0, False]
    check("add_norm", "triton", args, dtype, triton_device)


@every_dtype
@pytest.mark.parametrize("activation", range(4))
@pytest.mark.parametrize(("T", "F"), [(9, 1), (9, 37), (5, 1000), (2, 16384)])
def test_gates(triton_device: str, T: int, F: int, activation: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 4.0):
        x, bias = randn(T, 2 * F, dtype=dtype, scale=scale), randn(2 * F, scale=scale)
        args = [x, bias if scale == 1 else None, activation, scale > 1]
        check("gated_activation", "triton", args, dtype, triton_device)


@every_dtype
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize(("T", "F"), [(9, 1), (33, 37), (5, 1000), (2, 16384)])
def test_gelu(triton_device: str, T: int, F: int, tanh: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for bias in (None, randn(F)):
        args = [randn(T, F, dtype=dtype), bias, tanh]
        check("bias_gelu", "triton", args, dtype, triton_device)


@pytest.mark.parametrize("activation", range(4))
def test_gates_of_special_values(triton_device: str, activation: int) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0, 1e-40, 200.0, 1e30, inf, -200.0, -1e30, -inf, nan]])
    gate = torch.ones_like(x)
    run = called("gated_activation_backward", "triton", triton_device)
    slope = run(gate, torch.cat((x, gate), 1), None, activation, True)[0, : x.shape[1]]
    low, high = (1, 1) if activation == 0 else (0, 0.5)
    assert slope[:3].tolist() == [high] * 3
    assert slope[3:6].tolist() == [1.0] * 3
    assert slope[6:9].round(decimals=30).tolist() == [low] * 3
    assert slope[9].isnan() or activation == 0


@every_dtype
@pytest.mark.parametrize("op", ["add_norm", "gated_activation"])
def test_rows_are_isolated(triton_device: str, op: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad = randn(41, 74, dtype=dtype), randn(41, 74, dtype=dtype)
    rest: list[Any] = [None, None, torch.ones(74), 1e-5]
    if op == "gated_activation":
        grad, rest = grad[:, :37].contiguous(), [None, 1, True]
    run = called(f"{op}_backward", "triton", triton_device)

    def result(grad: Tensor, x: Tensor) -> Tensor:
        out = run(grad, x, *rest)
        return out if isinstance(out, Tensor) else out[0]

    expected = result(grad, x)[33]
    for poisoned in (grad, x):
        poisoned[torch.arange(41) != 33] = float("nan")
    assert torch.equal(result(grad, x)[33], expected)
    assert torch.equal(result(grad[33:34].clone(), x[33:34].clone())[0], expected)


@every_dtype
def test_inputs_without_rows(triton_device: str, dtype: torch.dtype) -> None:
    x = randn(0, 16, dtype=dtype)
    run = called("add_norm_backward", "triton", triton_device)
    d_x, sums = run(x, x, None, None, torch.ones(16), 1e-5)
    assert d_x.shape == (0, 16) and torch.equal(sums, torch.zeros(3, 16))
    run = called("gated_activation_backward", "triton", triton_device)
    assert run(x[:, :8], x, None, 1, True).shape == (0, 16)


def meta(*shape: int, to: torch.dtype = SINGLE) -> Tensor:
    return torch.empty(*shape, dtype=to, device="meta")


def builds_of_rows(arch: int, dtype: torch.dtype, E: int, rms: bool = False) -> list[aot.Build]:
    """The kernels for rows of E columns, four times as many in gates."""
    from sbert_fast.kernels import (
        add_norm_backward,
        bias_gelu_backward,
        gated_activation_backward,
    )

    x, vector = meta(8, E, to=dtype), meta(E)
    norm = (x, x, vector, x, vector, x, x, meta(1, 3, E), 8, 1e-5)
    wide, gate = meta(8, 8 * E, to=dtype), meta(8, 4 * E, to=dtype)
    return [
        aot.build_of(
            bias_gelu_backward._bias_gelu_backward_kernel,
            (gate, gate, meta(4 * E), gate, 8),
            {"F": 4 * E, "TANH": False} | bias_gelu_backward.config(4 * E, dtype),
            arch,
        ),
        aot.build_of(
            add_norm_backward._add_norm_backward_kernel,
            norm,
            {"E": E, "RMS": rms} | add_norm_backward.config(E, dtype),
            arch,
        ),
        aot.build_of(
            gated_activation_backward._gated_activation_backward_kernel,
            (gate, wide, meta(8 * E), wide, 8),
            {"F": 4 * E, "ACTIVATION": 1, "FIRST": True}
            | gated_activation_backward.config(4 * E, dtype),
            arch,
        ),
    ]


def test_kernels_of_rows_compile_and_fit() -> None:
    cases: list[tuple[Any, ...]] = [(arch, HALF, 1024) for arch in aot.ARCHS]
    cases += [(90, HALF, width) for width in (37, 384, 4096)]
    cases += [(90, BFLOAT, 1024), (90, SINGLE, 1024), (90, HALF, 768, True)]
    todo = [build for case in cases for build in builds_of_rows(*case)]
    usages = aot.compile_all(todo)
    print(aot.table(todo, usages))
    aot.assert_fits(todo, usages)
