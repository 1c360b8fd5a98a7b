"""Embeddings, norms and activations in Triton: figures, isolation, and what the compiler makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from op_cases import (
    ARCHS,
    add_norm_args,
    assert_gelu_of_special_values,
    embed_args,
    randn,
    rotated,
)
from sbert_fast.kernels import aot
from sbert_fast.testing import check_op

OPS = torch.ops.sbert_fast
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]
NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# One column, fewer than a chunk, three chunks, chunks and a rest, rows over two and four warps.
SHAPES = [(1, 1), (9, 37), (33, 384), (5, 1000), (5, 1536), (3, 4096)]
# Arguments of embed_norm that may be missing, by position.
POSITIONS, NORM = (1, 4), (6, 7)
# Of its tables of types, and what is missing.
TABLES = [
    (("given",), ("given", *POSITIONS)),
    (("type 0",), ("type 0", *NORM)),
    (("no table",), ("no table", *POSITIONS, *NORM)),
]
# The dtypes of its tables and of its result, and whether its norm is RMSNorm.
EMBEDDED = [
    *((d, d, False) for d in DTYPES),
    (torch.float32, torch.float16, False),
    (torch.float16, torch.float32, True),
    (torch.float16, torch.float16, True),
]
ABSENT = ("positions_ptr", "position_table_ptr", "weight_ptr", "bias_ptr")
# An op, and whether its norm is RMSNorm.
ADDED = [(op, rms) for rms in (False, True) for op in ("add_norm", "add_norm_sum")]
ISOLATED = [("add_norm", False), ("add_norm", True), ("add_norm_sum", False)]
ISOLATED += [("bias_gelu", False), ("gated_activation", False)]
ACTIVATIONS = [
    *(("bias_gelu", tanh) for tanh in (True, False)),
    *(("gated_activation", f, first) for f in (1, 2, 3) for first in (True, False)),
]
every_activation = pytest.mark.parametrize(("op", "how"), [(op, how) for op, *how in ACTIVATIONS])
# numpy's, where a power of two stands for infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")


@pytest.fixture(autouse=True)
def seeded(poisoned: None) -> Iterator[None]:
    torch.manual_seed(0)
    yield


def run(op: str, args: list[Any], device: str) -> Any:
    """The Triton kernel of `op` on `device`, its results on the CPU."""
    there = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    return pytree.tree_map(Tensor.cpu, getattr(OPS, op).triton(*there))


@pytest.mark.parametrize(("shape", "how", "tables"), rotated(SHAPES, EMBEDDED, TABLES))
def test_embed_norm(
    triton_device: str,
    shape: tuple[int, int],
    how: tuple[torch.dtype, torch.dtype, bool],
    tables: tuple[tuple[Any, ...], ...],
) -> None:
    dtype, out_dtype, rms = how
    for types, *missing in tables:
        args = [*embed_args(*shape, dtype, out_dtype, types), *[True] * rms]
        for i in missing:
            args[i] = None
        check_op("embed_norm", run("embed_norm", args, triton_device), args, out_dtype)


@pytest.mark.parametrize(("shape", "dtype", "how"), rotated(SHAPES, DTYPES, ADDED))
def test_add_norm(
    triton_device: str, shape: tuple[int, int], dtype: torch.dtype, how: tuple[str, bool]
) -> None:
    op, rms = how
    x, bias, residual, *norm = add_norm_args(*shape, dtype)
    for optional in ([bias, residual], [bias, None], [None, residual], [None, None]):
        args = [x, *optional, *norm, *[True] * rms]
        check_op(op, run(op, args, triton_device), args, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_of_a_large_mean_keeps_its_variance(
    triton_device: str, dtype: torch.dtype
) -> None:
    args = add_norm_args(9, 37, dtype)
    args[0] = (args[0].float() + 100).to(dtype)
    check_op("add_norm", run("add_norm", args, triton_device), args, dtype)


@every_activation
@pytest.mark.parametrize(
    ("T", "F", "dtype"),
    [
        *((9, 37, dtype) for dtype in DTYPES),
        *((T, F, torch.float16) for T, F in ((9, 1), (5, 1000), (2, 16384))),
    ],
)
def test_activations(
    triton_device: str, T: int, F: int, dtype: torch.dtype, op: str, how: list[Any]
) -> None:
    columns = 2 * F if op == "gated_activation" else F
    for scale in (1e-3, 0.1, 1.0, 4.0):
        x, bias = randn(T, columns, dtype=dtype, scale=scale), randn(columns, scale=scale)
        args = [x, bias if scale < 1 else None, *how]
        check_op(op, run(op, args, triton_device), args, dtype)


@every_activation
def test_special_values(triton_device: str, op: str, how: list[Any]) -> None:
    def activate(x: Tensor) -> Tensor:
        if op == "gated_activation":
            x = torch.cat((x, torch.ones_like(x))[:: 1 if how[1] else -1], 1)
        return run(op, [x, None, *how], triton_device)

    assert_gelu_of_special_values(activate)


def test_bias_gelu_keeps_its_relative_accuracy(triton_device: str) -> None:
    x = torch.linspace(-5, 5, 4096)[None]
    exact = torch.nn.functional.gelu(x.double())
    error = (run("bias_gelu", [x, None, False], triton_device) - exact).abs()
    assert (error / exact.abs()).max() < 1e-4
    assert error[x.abs() < 3].max() < 3e-7


@pytest.mark.parametrize(("how", "E", "dtype"), rotated(ISOLATED, [37, 384], DTYPES))
def test_rows_are_isolated(
    triton_device: str, how: tuple[str, bool], E: int, dtype: torch.dtype
) -> None:
    op, rms = how
    args = [*add_norm_args(21, E, dtype), *[True] * rms]
    if op == "bias_gelu":
        args = [args[0], args[1], False]
    elif op == "gated_activation":
        args = [torch.cat((args[0], args[2]), 1), randn(2 * E), 3, True]

    def results() -> Tensor:
        out = run(op, args, triton_device)
        return out if isinstance(out, Tensor) else torch.cat(out, 1)

    rows = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() == 2]
    expected = results()[13]
    for i in rows:
        args[i][torch.arange(21) != 13] = float("nan")
    assert torch.equal(results()[13], expected)
    for i in rows:
        args[i] = args[i][13:14].clone()
    assert torch.equal(results()[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_without_rows(triton_device: str, dtype: torch.dtype) -> None:
    assert run("embed_norm", embed_args(0, 16, dtype, dtype), triton_device).shape == (0, 16)
    args = add_norm_args(0, 16, dtype)
    both = run("add_norm_sum", args, triton_device)
    assert all(out.shape == (0, 16) for out in (*both, run("add_norm", args, triton_device)))
    x = randn(0, 32, dtype=dtype)
    assert run("bias_gelu", [x, None, False], triton_device).shape == (0, 32)
    assert run("gated_activation", [x, None, 1, True], triton_device).shape == (0, 16)


def test_rows_that_are_too_wide_are_refused(triton_device: str) -> None:
    with pytest.raises(ValueError, match="1 to 4096 columns, got 4097"):
        run("add_norm", add_norm_args(2, 4097, torch.float32), triton_device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_2_to_the_31_elements() -> None:
    T, E = 2**21 + 5, 1024
    args = add_norm_args(3, E, torch.float16)
    ends = torch.zeros(T, E, dtype=torch.float16, device="cuda")
    ends[-3:] = args[0].cuda()
    rest = [a.cuda() if isinstance(a, Tensor) else a for a in (args[1], None, *args[3:])]
    calls = {"add_norm_sum": rest, "bias_gelu": [rest[0], False]}
    calls["gated_activation"] = [rest[0], 1, True]
    for op, others in calls.items():
        out = getattr(OPS, op).triton(ends, *others)
        out = pytree.tree_map(lambda result: result[-3:].cpu(), out)
        few = [o.cpu() if isinstance(o, Tensor) else o for o in others]
        check_op(op, out, [args[0], *few], torch.float16)


def builds(
    arch: int, dtype: torch.dtype, width: int, rms: bool = False, absent: tuple[str, ...] = ()
) -> list[aot.Build]:
    """The kernels for rows of `width` columns, four times as many in activations; embed_norm
    without the arguments `absent`."""
    from sbert_fast.kernels import add_norm, bias_gelu, embed_norm, gated_activation

    x, vector, ids = NAMES[dtype], "*fp32", "*i32"
    norm = {"bias_ptr": vector, "weight_ptr": vector, "out_ptr": x, "T": "i32", "eps": "fp32"}
    embed = {name: ids for name in ("ids_ptr", "positions_ptr", "types_ptr")}
    embed |= {name: x for name in ("word_ptr", "position_table_ptr", "type_table_ptr")}
    add = {"x_ptr": x, "residual_ptr": x, "ln_bias_ptr": vector}
    gelu = {"x_ptr": x, "bias_ptr": vector, "out_ptr": x, "T": "i32"}
    options = {"E": width, "RMS": rms}
    given = {name: kind for name, kind in (embed | norm).items() if name not in absent}
    without = options | dict.fromkeys(absent)
    gate = {"F": 4 * width, "ACTIVATION": 1, "FIRST": 1}
    made = []
    for module, signature, constants in (
        (embed_norm, given, without | embed_norm.config(width, dtype)),
        (add_norm, add | norm, options | {"sum_ptr": None} | add_norm.config(width, dtype)),
        (add_norm, add | norm | {"sum_ptr": x}, options | add_norm.config(width, dtype)),
        (bias_gelu, gelu, {"F": 4 * width, "TANH": 0} | bias_gelu.config(4 * width, dtype)),
        (gated_activation, gelu, gate | gated_activation.config(4 * width, dtype)),
    ):
        warps = constants.pop("num_warps")
        op = module.__name__.rpartition(".")[2]
        kernel = f"{module.__name__}:_{op}_kernel"
        made.append(aot.Build(kernel, signature, constants, arch, num_warps=warps))
    return made


def test_kernels_compile_and_fit() -> None:
    every = [(torch.float16, 1024), (torch.float16, 768, True, ABSENT)]
    cases: list[tuple[Any, ...]] = [(arch, *case) for arch in ARCHS for case in every]
    cases += [(90, torch.float16, 1024, True, ABSENT[:2]), (90, torch.bfloat16, 1024)]
    cases += [(90, torch.float16, width) for width in (37, 384, 4096)]
    cases += [(90, torch.float32, 1024)]
    todo = list({repr(build): build for case in cases for build in builds(*case)}.values())
    usages = aot.compile_all(todo)
    print(aot.table(todo, usages))
    aot.assert_fits(todo, usages)
    for build, usage in zip(todo, usages, strict=True):
        # A row within a warp needs no shared memory, unless its layout is changed on the way.
        width = build.constexprs.get("E") or build.constexprs["F"] // 4
        assert usage.shared == 0 or width in (37, 4096), build
        # Odd rows are addressed column by column, with their sum twice.
        twice = width == 37 and "sum_ptr" in build.signature
        assert usage.registers <= (168 if twice else 128), build
