"""segment_pool and norm_pool in Triton: figures, isolation, and what the compiler makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from op_cases import ARCHS, add_norm_args, int32, pool_args, randn, rotated
from sbert_fast.kernels import aot
from sbert_fast.ops import POOLING_MODES
from sbert_fast.testing import check_op

OPS = torch.ops.sbert_fast
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]
NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# Short segments, segments of a program, slices: every border, and neighbours of every kind.
LENGTHS = [5, 0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 0, 127, 128, 129, 300, 2, 0]
FEW_LENGTHS = [3, 0, 40, 1, 150, 16]
# The op, and whether its norm is RMSNorm.
NORMS = [("segment_pool", False), ("norm_pool", False), ("norm_pool", True)]
every_norm = pytest.mark.parametrize(("op", "rms"), NORMS)
# What is pooled has been normalised before: either norm with every second mode.
every_mode = pytest.mark.parametrize(
    ("op", "rms", "mode"),
    [
        (op, rms and i % 2 == 1, mode)
        for op, rms in (NORMS[0], NORMS[-1])
        for i, mode in enumerate(POOLING_MODES)
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.fixture(autouse=True)
def seeded(poisoned: None) -> Iterator[None]:
    torch.manual_seed(0)
    yield


def arguments(
    op: str, E: int, dtype: torch.dtype, mode: str, rms: bool = False, **options: Any
) -> list[Any]:
    """The arguments of `op`, the dead tail NaN."""
    x, *how = pool_args(E, dtype, mode, **options)
    if op == "segment_pool":
        return [x, *how]
    _, bias, residual, *norm = add_norm_args(x.shape[0], E, dtype)
    return [x, bias, residual, *norm, *how, *[True] * rms]


def run(op: str, args: list[Any], device: str) -> Any:
    """The Triton kernel of `op` on `device`, its result on the CPU."""
    there = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    out = getattr(OPS, op).triton(*there)
    return there[-2].cpu() if out is None else out.cpu()


@every_mode
def test_every_length(triton_device: str, op: str, rms: bool, mode: str) -> None:
    dtype = DTYPES[POOLING_MODES.index(mode) % len(DTYPES)]
    normalize = dtype != torch.bfloat16
    args = arguments(op, 37, dtype, mode, rms, lengths=LENGTHS, normalize=normalize)
    out = run(op, args, triton_device)
    check_op(op, out, args, torch.float32)
    assert not out[[i for i, length in enumerate(LENGTHS) if not length]].any()


@every_mode
@pytest.mark.parametrize("skip", [2, 17, 1000])
def test_skipped_tokens(triton_device: str, op: str, rms: bool, mode: str, skip: int) -> None:
    lengths = [5, 0, 2, 18, 49, 17, 146]
    args = arguments(op, 33, torch.float32, mode, rms, lengths=lengths, skip=skip)
    start = 5 + 2
    args[0][start : start + min(skip, 17)] = float("nan") if mode not in ("cls",) else 7.0
    check_op(op, run(op, args, triton_device), args, torch.float32)


@pytest.mark.parametrize(
    ("norm", "width", "mode"),
    rotated(
        NORMS,
        [(1, torch.float16), (384, torch.bfloat16), (1536, torch.float32)],
        ["mean", "max"],
    ),
)
def test_widths(
    triton_device: str, norm: tuple[str, bool], width: tuple[int, torch.dtype], mode: str
) -> None:
    op, rms = norm
    args = arguments(op, *width, mode, rms, lengths=FEW_LENGTHS)
    check_op(op, run(op, args, triton_device), args, torch.float32)


@pytest.mark.parametrize("op", ["segment_pool", "norm_pool"])
def test_the_widest_rows(triton_device: str, op: str) -> None:
    args = arguments(op, 4096, torch.float16, "mean", lengths=[2, 33])
    check_op(op, run(op, args, triton_device), args, torch.float32)
    args = arguments(op, 4097, torch.float16, "mean", lengths=[1])
    with pytest.raises(ValueError, match="1 to 4096 columns, got 4097"):
        run(op, args, triton_device)


@pytest.mark.parametrize("op", ["segment_pool", "norm_pool"])
def test_many_segments(triton_device: str, op: str) -> None:
    lengths = (torch.rand(100).pow(3) * 80).int().tolist()
    args = arguments(op, 40, torch.float32, "mean", lengths=lengths)
    check_op(op, run(op, args, triton_device), args, torch.float32)


@pytest.mark.parametrize("terms", ["bias", "residual", "neither"])
def test_optional_terms(triton_device: str, terms: str) -> None:
    args = arguments("norm_pool", 40, torch.float16, "mean", lengths=FEW_LENGTHS)
    args[1] = args[1] if terms == "bias" else None
    args[2] = args[2] if terms == "residual" else None
    check_op("norm_pool", run("norm_pool", args, triton_device), args, torch.float32)


@every_mode
def test_spans(triton_device: str, op: str, rms: bool, mode: str) -> None:
    ranges = [[2, 9], [0, 200], [4, 4], [200, 200], [40, 73], [199, 200], [30, 50]]
    spans = torch.tensor(ranges, dtype=torch.int32)
    args = arguments(op, 48, torch.float32, mode, rms, lengths=[150, 50], spans=spans, skip=1)
    check_op(op, run(op, args, triton_device), args, torch.float32)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_a_strided_view_has_the_same_bits(triton_device: str, mode: str) -> None:
    args = pool_args(37, torch.float16, mode, FEW_LENGTHS)
    expected = run("segment_pool", args, triton_device)
    wide = torch.full((args[0].shape[0], 100), float("nan"), dtype=torch.float16)
    wide[:, 5:42] = args[0]
    view = wide.to(triton_device)[:, 5:42]
    rest = [a.to(triton_device) if isinstance(a, Tensor) else a for a in args[1:]]
    assert torch.equal(OPS.segment_pool.triton(view, *rest).cpu(), expected)


@every_norm
@pytest.mark.parametrize("scattered", [True, False])
def test_rows_go_to_their_places(triton_device: str, op: str, rms: bool, scattered: bool) -> None:
    args = arguments(op, 37, torch.float32, "mean", lengths=FEW_LENGTHS)
    rows = torch.randperm(9)[: len(FEW_LENGTHS)] if scattered else torch.arange(len(FEW_LENGTHS))
    wide = torch.full((9, 50), -7.0)
    expected = wide.clone()
    norm = [True] * rms
    expected[rows, 3:40] = run(op, [*args, *norm], triton_device)
    there = [a.to(triton_device) if isinstance(a, Tensor) else a for a in args]
    wide = wide.to(triton_device)
    places = rows.int().to(triton_device) if scattered else None
    assert getattr(OPS, f"{op}_out").triton(*there, wide[:, 3:40], places, *norm) is None
    assert torch.equal(wide.cpu(), expected)


@every_norm
@pytest.mark.parametrize(
    ("dtype", "length", "mode"),
    [
        (torch.float16, 16, "mean"),
        (torch.float32, 40, "max"),
        (torch.float16, 129, "mean"),
        (torch.float32, 300, "max"),
    ],
)
def test_segments_are_isolated(
    triton_device: str, op: str, rms: bool, mode: str, dtype: torch.dtype, length: int
) -> None:
    lengths = [7, 0, 45, length, 1, 130]
    args = arguments(op, 37, dtype, mode, rms, lengths=lengths)
    expected = run(op, args, triton_device)[3]
    assert expected.isfinite().all()
    whole = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() == 2]
    at = slice(52, 52 + length)
    alone = [args[i][at].clone() for i in whole]
    for i, part in zip(whole, alone, strict=True):
        args[i][:] = float("nan")
        args[i][at] = part
    assert torch.equal(run(op, args, triton_device)[3], expected)
    for i, part in zip(whole, alone, strict=True):
        args[i] = part
    args[1 if op == "segment_pool" else 6] = int32(0, length)
    assert torch.equal(run(op, args, triton_device)[0], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_no_special_value_is_hidden(triton_device: str, mode: str, value: float) -> None:
    for token in (0, 4, 20, 47):
        args = pool_args(37, torch.float32, mode, [5, 3, 40], normalize=token == 4)
        args[0][token, 11] = value
        reference = OPS.segment_pool.reference(*args)
        out = run("segment_pool", args, triton_device)
        torch.testing.assert_close(out, reference, equal_nan=True)


@pytest.mark.parametrize("mode", ["mean", "weighted_mean"])
def test_the_error_does_not_grow_with_the_length(triton_device: str, mode: str) -> None:
    args = [1 + randn(5000, 33), int32(0, 5000), POOLING_MODES.index(mode), False, 0, None]
    check_op("segment_pool", run("segment_pool", args, triton_device), args, torch.float32)


@pytest.mark.parametrize("op", ["segment_pool", "norm_pool"])
def test_inputs_without_rows(triton_device: str, op: str) -> None:
    for lengths, rows in (([], 0), ([0, 0], 2)):
        args = arguments(op, 16, torch.float32, "mean", lengths=lengths)
        assert torch.equal(run(op, args, triton_device), torch.zeros(rows, 16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", ["segment_pool", "norm_pool"])
@pytest.mark.parametrize(
    "lengths",
    # Most of the thousands are short: the oracle is slow.
    [[1] * 70_000, [8192] * 3, ([0, 300, 1] + [0, 3, 1] * 9) * 500],
    ids=["short", "long", "mixed"],
)
def test_sizes_only_a_gpu_can_try(op: str, lengths: list[int]) -> None:
    args = arguments(op, 384, torch.float16, "mean", lengths=lengths)
    out = run(op, args, "cuda")
    check_op(op, out, args, torch.float32)
    assert torch.equal(run(op, args, "cuda"), out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_2_to_the_31_elements() -> None:
    E, long = 1024, 2**21
    args = arguments("segment_pool", E, torch.float16, "mean", lengths=[200, 3])
    x = torch.zeros(long + 203, E, dtype=torch.float16, device="cuda")
    x[long:] = args[0][:203].cuda()
    cu_seqlens = int32(0, long, long + 200, long + 203).cuda()
    out = OPS.segment_pool.triton(x, cu_seqlens, *args[2:]).cpu()
    check_op("segment_pool", out[1:], args, torch.float32)
    assert not out[0].any()


def builds(
    arch: int, x: torch.dtype, E: int, norm: bool, mode: str, rms: bool = False
) -> list[aot.Build]:
    """Both kernels for rows of E columns."""
    from sbert_fast.kernels import pooling

    module, vector, ids = "sbert_fast.kernels.pooling", "*fp32", "*i32"
    common = {"out_ptr": vector, "out_rows_ptr": ids, "partial_ptr": vector, "owner_ptr": ids}
    common |= {"slices": "i32", "skip": "i32"}
    first = {"x_ptr": NAMES[x], "ranges_ptr": ids, "segments": "i32", "eps": "fp32", **common}
    first |= {"groups": "i32", "windows": "i32"}
    second = {"cu_ptr": ids, **common}
    absent = dict.fromkeys(("bias_ptr", "residual_ptr", "weight_ptr", "ln_bias_ptr"))
    if norm:
        vectors = {"weight_ptr": vector, "ln_bias_ptr": vector}
        first |= {"bias_ptr": vector, "residual_ptr": NAMES[x], **vectors}
        second |= vectors
    modes = {"E": E, "out_stride": E, "NORMALIZE": 1, "POOLING": POOLING_MODES.index(mode)}
    options = modes | {"x_stride": E, "SPANS": 0, "RMS": rms} | pooling.config(E, x, norm)
    joining = modes | pooling.join_config(E)
    if not norm:
        options |= absent
        joining |= {"weight_ptr": None, "ln_bias_ptr": None}
    made = []
    for name, signature, constants in (("pool", first, options), ("join", second, joining)):
        how = {key: constants.pop(key, None) for key in ("num_warps", "maxnreg")}
        made.append(aot.Build(f"{module}:_{name}_kernel", signature, constants, arch, **how))
    return made


def test_kernels_compile_and_fit() -> None:
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    every = [(half, 384, norm, "mean") for norm in (False, True)]
    every += [(half, 1024, True, "max", True)]
    cases = [(arch, *case) for arch in ARCHS for case in every]
    cases += [(90, half, 768, True, "weighted_mean"), (90, bfloat, 384, True, "mean")]
    cases += [(90, half, 4096, True, "max"), (90, bfloat, 37, True, "max")]
    cases += [(90, dtype, 1024, True, "max") for dtype in (half, single)]
    todo = list({repr(build): build for case in cases for build in builds(*case)}.values())
    usages = aot.compile_all(todo)
    print(aot.table(todo, usages))
    aot.assert_fits(todo, usages)
