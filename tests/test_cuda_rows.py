"""embed_norm, add_norm and bias_gelu in CUDA C++, thread by thread on a CPU, and on a GPU: figures,
isolation, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import assert_same_bits
from cuda_places import (
    Run,
    assert_devices_agree,
    assert_streams_and_graphs,
    enter,
    needs_memory,
    roomy,
    runner,
    there,
    two_gpus,
)
from op_cases import add_norm_args, assert_gelu_of_special_values, embed_args, randn
from sbert_fast.testing import check_op

HALVES = [torch.float16, torch.bfloat16]
# Every layout of rows: within one piece of sixteen bytes, half full, full, over several warps.
SHAPES = [(1, 8), (37, 24), (9, 128), (9, 136), (19, 312), (33, 384), (9, 512), (9, 520)]
SHAPES += [(17, 768), (5, 1024)]
WIDE_SHAPES = [(3, 1032), (2, 2048), (2, 2056), (3, 4096)]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_gpu = pytest.mark.parametrize("place", [GPU], indirect=True)
every_op = pytest.mark.parametrize("op", ["embed_norm", "add_norm", "bias_gelu"])


@pytest.fixture(autouse=True, params=[0, 7, GPU])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Threads by their numbers, in a random order, and those of a GPU."""
    yield from enter(request)


@pytest.fixture
def run(place: str) -> Run:
    return runner(place)


def arguments(op: str, T: int, E: int, dtype: torch.dtype) -> list[Any]:
    if op == "embed_norm":
        return embed_args(T, E, dtype, dtype)
    args = add_norm_args(T, E, dtype)
    return args if op == "add_norm" else [args[0], args[1], False]


@pytest.mark.parametrize("out_dtype", HALVES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("T", "E"), [*SHAPES, *WIDE_SHAPES])
def test_embed_norm(run: Run, T: int, E: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for types in ("given", "type 0", "no table"):
        args = embed_args(T, E, dtype, out_dtype, types)
        check_op("embed_norm", run("embed_norm", args), args, out_dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "E"), [*SHAPES, *WIDE_SHAPES])
def test_add_norm(run: Run, T: int, E: int, dtype: torch.dtype) -> None:
    x, bias, residual, *norm = add_norm_args(T, E, dtype)
    for optional in ([bias, residual], [bias, None], [None, residual], [None, None]):
        args = [x, *optional, *norm]
        check_op("add_norm", run("add_norm", args), args, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_add_norm_of_a_large_mean_keeps_its_variance(run: Run, dtype: torch.dtype) -> None:
    args = add_norm_args(9, 312, dtype)
    args[0] = (args[0].float() + 100).to(dtype)
    check_op("add_norm", run("add_norm", args), args, dtype)


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "F"), [*SHAPES, (2, 16384)])
def test_bias_gelu(run: Run, T: int, F: int, dtype: torch.dtype, tanh: bool) -> None:
    for scale in (1e-3, 1.0, 4.0):
        x = randn(T, F, dtype=dtype, scale=scale)
        for args in ([x, randn(F, scale=scale), tanh], [x, None, tanh]):
            check_op("bias_gelu", run("bias_gelu", args), args, dtype)


@pytest.mark.parametrize("tanh", [True, False])
def test_bias_gelu_of_special_values(run: Run, tanh: bool) -> None:
    def gelu(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8)).bfloat16()
        large = x.abs() == torch.tensor(1e30).bfloat16()
        out = run("bias_gelu", [x, None, tanh]).float()
        return torch.where(large & (x > 0) & (out == x), 1e30, out)

    assert_gelu_of_special_values(gelu)


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_bias_gelu_rounds_the_exact_figure(run: Run, dtype: torch.dtype, tanh: bool) -> None:
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
def test_rows_are_isolated(run: Run, op: str, E: int, dtype: torch.dtype) -> None:
    args = arguments(op, 21, E, dtype)
    rows = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() == 2]
    expected = run(op, args)[13]
    for i in rows:
        args[i][torch.arange(21) != 13] = float("nan")
    assert torch.equal(run(op, args)[13], expected)
    for i in rows:
        args[i] = args[i][13:14].clone()
    assert torch.equal(run(op, args)[0], expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_inputs_without_rows(run: Run, dtype: torch.dtype) -> None:
    assert run("embed_norm", embed_args(0, 16, dtype, dtype)).shape == (0, 16)
    assert run("add_norm", add_norm_args(0, 16, dtype)).shape == (0, 16)
    assert run("bias_gelu", [randn(0, 16, dtype=dtype), None, False]).shape == (0, 16)


@pytest.mark.parametrize("E", [4, 37, 4104])
def test_other_widths_are_refused(run: Run, place: str, E: int) -> None:
    for op, x, most in (
        ("add_norm", "x", 4096),
        ("embed_norm", "word", 4096),
        ("bias_gelu", "x", 2**31 - 1),
    ):
        if E % 8 == 0 and E <= most:
            continue
        args = [roomy(a, place) for a in arguments(op, 2, E, torch.float16)]
        told = f"multiple of 8 columns, at most {most}, .* got {E}: impl='triton' takes other"
        with pytest.raises(RuntimeError, match=f"^{op}: {x} must have a {told}"):
            run(op, args)


def test_what_is_refused(run: Run, place: str) -> None:
    half = torch.float16

    def refused(message: str, op: str = "add_norm", **changes: Any) -> None:
        args = [roomy(a, place) for a in arguments(op, 5, 16, half)]
        for at, value in changes.items():
            args[int(at[1:])] = value
        with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
            run(op, args)

    def rows(*shape: int, dtype: torch.dtype = half) -> Tensor:
        return roomy(randn(*shape, dtype=dtype), place)

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return roomy(torch.zeros(shape, dtype=dtype), place)

    fp32 = torch.float32
    refused("x must be float16 or bfloat16, got float32", _0=rows(5, 16, dtype=fp32))
    refused(r"x must be contiguous float16 \[T, E\]", _0=rows(16, 5).T)
    refused(r"bias must be contiguous float32 \[E\] = \[16\]", _1=rows(16))
    refused(r"residual must be .* \[5, 16\], got float16 \[4, 16\]", _2=rows(4, 16))
    refused("residual must be contiguous float16", _2=rows(5, 16, dtype=torch.bfloat16))
    # Views of what is on the device already: a copy would be aligned.
    refused("weight must begin at a multiple of 16 bytes", _3=rows(17, dtype=fp32)[1:])
    shifted = rows(5 * 16 + 1)[1:].view(5, 16)
    refused("x must begin at a multiple of 16 bytes, got one 2 bytes behind", _0=shifted)
    embed = "embed_norm"
    refused("ids must be contiguous int32", embed, _0=zeros(5, dtype=torch.int64))
    refused(r"positions must be .* \[5\]", embed, _1=zeros(4))
    refused("types must be None where there is no type_table", embed, _5=None)
    refused("type_table must have a row", embed, _2=None, _5=rows(0, 16))
    refused("out_dtype must be float16 or bfloat16, got float32", embed, _9=fp32)


@on_gpu
@every_op
@pytest.mark.parametrize("E", [384, 2048])
def test_streams_and_graphs(place: str, op: str, E: int) -> None:
    assert_streams_and_graphs(op, there(arguments(op, 300, E, torch.float16), place))


@on_gpu
@two_gpus
@every_op
def test_tensors_of_another_device(op: str) -> None:
    assert_devices_agree(op, arguments(op, 300, 384, torch.float16))


@on_gpu
@pytest.mark.parametrize("op", ["add_norm", "bias_gelu"])
def test_more_than_two_to_the_31_elements(run: Run, place: str, op: str) -> None:
    needs_memory(40)
    T, E = 2**21 + 5, 1024
    _, *others = there(arguments(op, 1, E, torch.float16), place)
    x = torch.randn(T, E, dtype=torch.float16, device=place)
    assert x.numel() > 2**31
    if op == "add_norm":
        others[1] = None
    last = [x[-3:].clone(), *others]
    out = getattr(torch.ops.sbert_fast, op).cuda(x, *others)
    assert_same_bits(out[-3:].cpu(), run(op, last))
