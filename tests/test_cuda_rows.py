"""embed_norm, add_norm and bias_gelu in CUDA C++, run thread by thread on a CPU: figures,
isolation, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulation
from op_cases import add_norm_args, assert_gelu_of_special_values, embed_args, randn
from sbert_fast.testing import check_op

OPS = torch.ops.sbert_fast
HALVES = [torch.float16, torch.bfloat16]
# Every layout of rows: within one piece of sixteen bytes, half full, full, over several warps.
SHAPES = [(1, 8), (37, 24), (9, 128), (9, 136), (19, 312), (33, 384), (9, 512), (9, 520)]
SHAPES += [(17, 768), (5, 1024)]
WIDE_SHAPES = [(3, 1032), (2, 2048), (2, 2056), (3, 4096)]


@pytest.fixture(autouse=True, params=[0, 7])
def seeded(poisoned_memory: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads by their numbers, and in a random order; unwritten memory is NaN."""
    torch.manual_seed(0)
    cuda_emulation.load()
    cuda_emulation.set_order(request.param)
    yield
    cuda_emulation.set_order(0)


def run(op: str, args: list[Any]) -> Tensor:
    return getattr(OPS, op).cuda(*args)


@pytest.mark.parametrize("out_dtype", HALVES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "E"), [*SHAPES, *WIDE_SHAPES])
def test_embed_norm(T: int, E: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for types in ("given", "type 0", "no table"):
        args = embed_args(T, E, dtype, out_dtype, types)
        check_op("embed_norm", run("embed_norm", args), args, out_dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "E"), [*SHAPES, *WIDE_SHAPES])
def test_add_norm(T: int, E: int, dtype: torch.dtype) -> None:
    x, bias, residual, *norm = add_norm_args(T, E, dtype)
    for optional in ([bias, residual], [bias, None], [None, residual], [None, None]):
        args = [x, *optional, *norm]
        check_op("add_norm", run("add_norm", args), args, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_add_norm_of_a_large_mean_keeps_its_variance(dtype: torch.dtype) -> None:
    args = add_norm_args(9, 312, dtype)
    args[0] = (args[0].float() + 100).to(dtype)
    check_op("add_norm", run("add_norm", args), args, dtype)


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "F"), [*SHAPES, (2, 16384)])
def test_bias_gelu(T: int, F: int, dtype: torch.dtype, tanh: bool) -> None:
    for scale in (1e-3, 1.0, 4.0):
        x = randn(T, F, dtype=dtype, scale=scale)
        for args in ([x, randn(F, scale=scale), tanh], [x, None, tanh]):
            check_op("bias_gelu", run("bias_gelu", args), args, dtype)


@pytest.mark.parametrize("tanh", [True, False])
def test_bias_gelu_of_special_values(tanh: bool) -> None:
    def gelu(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8)).bfloat16()
        large = x.abs() == torch.tensor(1e30).bfloat16()
        out = run("bias_gelu", [x, None, tanh]).float()
        return torch.where(large & (x > 0) & (out == x), 1e30, out)

    assert_gelu_of_special_values(gelu)


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_bias_gelu_rounds_the_exact_figure(dtype: torch.dtype, tanh: bool) -> None:
    x = torch.linspace(-5, 5, 4096).to(dtype)[None]
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh" if tanh else "none")
    error = (run("bias_gelu", [x, None, tanh]) - exact).abs()
    # Half a unit in the last place, or of the subnormal numbers.
    finfo = torch.finfo(dtype)
    unit = exact.abs().clamp_min(finfo.smallest_normal) * finfo.eps
    assert (error <= 0.51 * unit + 1e-7).all()


@pytest.mark.parametrize("op", ["add_norm", "bias_gelu"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("E", [24, 384, 768, 2048])
def test_rows_are_isolated(op: str, E: int, dtype: torch.dtype) -> None:
    args = add_norm_args(21, E, dtype)
    if op == "bias_gelu":
        args = [args[0], args[1], False]
    rows = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() == 2]
    expected = run(op, args)[13]
    for i in rows:
        args[i][torch.arange(21) != 13] = float("nan")
    assert torch.equal(run(op, args)[13], expected)
    for i in rows:
        args[i] = args[i][13:14].clone()
    assert torch.equal(run(op, args)[0], expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_inputs_without_rows(dtype: torch.dtype) -> None:
    assert run("embed_norm", embed_args(0, 16, dtype, dtype)).shape == (0, 16)
    assert run("add_norm", add_norm_args(0, 16, dtype)).shape == (0, 16)
    assert run("bias_gelu", [randn(0, 16, dtype=dtype), None, False]).shape == (0, 16)


@pytest.mark.parametrize("E", [4, 37, 4104])
def test_other_widths_are_refused(E: int) -> None:
    expected = rf"must have a multiple of 8 columns, at most 4096, .* got {E}: impl='triton' takes"
    half = torch.float16
    with pytest.raises(RuntimeError, match=f"add_norm: x {expected}"):
        run("add_norm", add_norm_args(2, E, half))
    with pytest.raises(RuntimeError, match=f"embed_norm: word {expected}"):
        run("embed_norm", embed_args(2, E, half, half))
    if E < 4096:
        with pytest.raises(RuntimeError, match="bias_gelu: x must have a multiple of 8 columns"):
            run("bias_gelu", [randn(2, E, dtype=half), None, False])


def test_what_is_refused() -> None:
    half = torch.float16
    args = add_norm_args(5, 16, half)

    def refused(message: str, op: str = "add_norm", **changes: Any) -> None:
        changed = list(args) if op == "add_norm" else embed_args(5, 16, half, half)
        for at, value in changes.items():
            changed[int(at[1:])] = value
        with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
            run(op, changed)

    refused("x must be float16 or bfloat16, got float32", _0=randn(5, 16))
    refused(r"x must be contiguous float16 \[T, E\]", _0=randn(16, 5, dtype=half).T)
    refused(r"bias must be contiguous float32 \[E\] = \[16\]", _1=randn(16, dtype=half))
    refused(r"residual must be .* \[5, 16\], got float16 \[4, 16\]", _2=randn(4, 16, dtype=half))
    refused("residual must be contiguous float16", _2=randn(5, 16, dtype=torch.bfloat16))
    refused("weight must begin at a multiple of 16 bytes", _3=randn(17)[1:])
    shifted = randn(5 * 16 + 1, dtype=half)[1:].view(5, 16)
    refused("x must begin at a multiple of 16 bytes, got one 2 bytes behind", _0=shifted)
    embed = "embed_norm"
    refused("ids must be contiguous int32", embed, _0=torch.zeros(5, dtype=torch.int64))
    refused(r"positions must be .* \[5\]", embed, _1=torch.zeros(4, dtype=torch.int32))
    refused("types must be None where there is no type_table", embed, _5=None)
    refused("type_table must have a row", embed, _2=None, _5=randn(0, 16, dtype=half))
    refused("out_dtype must be float16 or bfloat16, got float32", embed, _9=torch.float32)
