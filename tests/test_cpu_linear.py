"""The linear layers of the C++ ops: figures, isolation, independence of how work is cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from guarded import before_a_guard
from instruction_sets import EMULATED_TILES, NATIVE, WITH_TILES
from sbert_fast import linears
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.linears import PanelLinear
from sbert_fast.models.base import Linear
from sbert_fast.norms import PreparedNorm
from sbert_fast.ops import extension, panels
from sbert_fast.ops.reference import Activation
from sbert_fast.target import Target
from sbert_fast.testing import check_op

OPS = torch.ops.sbert_fast
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kind:
    """What a layer multiplies: rows of `dtype`, and weights of it, of int8, or split."""

    dtype: torch.dtype
    int8: bool = False
    split: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}{' by int8' * self.int8}{' split' * self.split}"

    def inputs(self, K: int) -> int:
        """As many as K, or nearly: panels may hold groups."""
        group = panels.INT8_GROUP if self.int8 else panels.SPLIT_GROUP if self.split else 1
        return max(group, K // group * group)

    def pack(self, weight: Tensor) -> Tensor:
        if self.split:
            return panels.pack_split(weight)
        return panels.pack_int8(weight) if self.int8 else panels.pack(weight.to(self.dtype))


# The code for tiles runs everywhere, on what stands in for them.
ISAS = NATIVE + EMULATED_TILES
DTYPES = [torch.float32, torch.bfloat16]
# Rows below, at and above a tile, a block of tiles and an item; columns below, at and above a
# vector and a panel; inputs below and above a run of steps. Those that 32 divides fill tiles.
ROWS = [1, 2, 7, 8, 9, 130, 15, 16, 17, 31, 32, 33, 100]
SIZES = [(2, 1), (6, 7), (38, 48), (32, 96), (64, 50), (384, 100), (96, 384), (26, 52)]

pytestmark = [
    pytest.mark.skipif(not extension.CPU.available, reason=str(extension.CPU.reason)),
    pytest.mark.usefixtures("poisoned_memory"),
]
every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KINDS = [Kind(dtype, int8) for int8 in (False, True) for dtype in DTYPES]
SPLIT = Kind(torch.float32, split=True)
every_kind = pytest.mark.parametrize(
    ("isa", "kind"),
    [*((isa, kind) for isa in ISAS for kind in KINDS), *((isa, SPLIT) for isa in WITH_TILES)],
    indirect=["isa"],
    ids=str,
)


def linear_args(T: int, K: int, N: int, kind: Kind) -> list[Any]:
    x, weight = torch.randn(T, kind.inputs(K)).to(kind.dtype), torch.randn(N, kind.inputs(K))
    return [x, kind.pack(weight), torch.randn(N), N, Activation.NONE, False]


def gated_args(T: int, K: int, F: int, kind: Kind) -> list[Any]:
    x, weight = torch.randn(T, kind.inputs(K)).to(kind.dtype), torch.randn(2 * F, kind.inputs(K))
    weight, bias = (panels.interleave(rows, first=True) for rows in (weight, torch.randn(2 * F)))
    return [x, kind.pack(weight), bias, F, Activation.SILU, True]


def linear_norm_args(T: int, K: int, N: int, kind: Kind) -> list[Any]:
    x, packed, bias, *_ = linear_args(T, K, N, kind)
    norm = 1 + 0.1 * torch.randn(N), 0.1 * torch.randn(N)
    return [x, packed, bias, torch.randn(T, N).to(kind.dtype), *norm, 1e-12]


MAKERS = [("linear", linear_args), ("linear", gated_args), ("linear_norm", linear_norm_args)]
every_op = pytest.mark.parametrize(("op", "make"), MAKERS)


@every_kind
@pytest.mark.parametrize(("K", "N"), SIZES)
@pytest.mark.parametrize("make", [linear_args, gated_args])
def test_linear(isa: str, make: Any, K: int, N: int, kind: Kind) -> None:
    for T in ROWS:
        args = make(T, K, N, kind)
        for activation in Activation:
            args[4] = activation
            check_op("linear", OPS.linear.cpu(*args), args, kind.dtype)
    args[2] = None
    check_op("linear", OPS.linear.cpu(*args), args, kind.dtype)


@every_isa
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("features", [96, 39])
def test_a_gate_in_float32_has_the_bits_of_two_ops(
    isa: str, features: int, first: bool, int8: bool
) -> None:
    kind = Kind(torch.float32, int8)
    x, weight, bias = torch.randn(40, 64), torch.randn(2 * features, 64), torch.randn(2 * features)
    how: list[Any] = [2 * features, Activation.NONE, False]
    halves = OPS.linear.cpu(x, kind.pack(weight), bias, *how)
    ordered, ordered_bias = (panels.interleave(rows, first) for rows in (weight, bias))
    packed = kind.pack(ordered)
    for activation in Activation:
        expected = OPS.gated_activation.cpu(halves, None, activation, first)
        out = OPS.linear.cpu(x, packed, ordered_bias, features, activation, True)
        assert torch.equal(out, expected)


@every_kind
@pytest.mark.parametrize(
    ("K", "N"), [(38, 8), (64, 48), (64, 50), (384, 100), (32, 144), (96, 384)]
)
@pytest.mark.parametrize("threads", [1, 2])  # of more than one, few rows take two passes
def test_linear_norm(
    isa: str, threads: int, K: int, N: int, kind: Kind, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    for T in ROWS:
        args = linear_norm_args(T, K, N, kind)
        check_op("linear_norm", OPS.linear_norm.cpu(*args), args, kind.dtype)
    args[2] = None
    check_op("linear_norm", OPS.linear_norm.cpu(*args), args, kind.dtype)


@every_isa
def test_linear_of_an_odd_number_of_inputs(isa: str) -> None:
    args = linear_args(9, 37, 50, Kind(torch.float32))
    check_op("linear", OPS.linear.cpu(*args), args, torch.float32)


@every_kind
@pytest.mark.parametrize("inputs", [294, 320])
@every_op
def test_a_row_is_the_same_wherever_it_is(
    isa: str, op: str, make: Any, inputs: int, kind: Kind
) -> None:
    """Alone, at any place among any number of rows, and beside rows of NaN: the same bits."""
    args = make(300, inputs, 100, kind)
    kernel = getattr(OPS, op).cpu
    expected = kernel(*args)
    for start, end in [(0, 1), (5, 6), (3, 20), (7, 300), (290, 299)]:
        part = [a[start:end] if isinstance(a, Tensor) and len(a) == 300 else a for a in args]
        assert torch.equal(kernel(*part), expected[start:end])
    args[0][torch.arange(300) != 123] = float("nan")
    assert torch.equal(kernel(*args)[123], expected[123])


@every_kind
@every_op
@pytest.mark.parametrize("T", [16, 200, 3000])
def test_threads_change_no_bit(isa: str, op: str, make: Any, T: int, kind: Kind) -> None:
    args = make(T, 384, 200, kind)
    kernel, threads = getattr(OPS, op).cpu, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = kernel(*args)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(kernel(*args), expected), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


@every_kind
@every_op
def test_the_number_of_rows_changes_no_bit(isa: str, op: str, make: Any, kind: Kind) -> None:
    args = make(300, 64, 50, kind)
    kernel = getattr(OPS, op).cpu
    expected = kernel(*args)
    for T in range(1, 301):
        part = [a[:T] if isinstance(a, Tensor) and len(a) == 300 else a for a in args]
        assert torch.equal(kernel(*part), expected[:T]), f"{T} rows"


@every_kind
@pytest.mark.parametrize(("T", "K", "N"), [(1, 64, 48), (17, 32, 50), (33, 96, 100), (40, 38, 7)])
def test_reads_end_with_the_last_element(isa: str, T: int, K: int, N: int, kind: Kind) -> None:
    for op, make in MAKERS:
        args = make(T, K, N, kind)
        expected = getattr(OPS, op).cpu(*args)
        args = [before_a_guard(a) if isinstance(a, Tensor) else a for a in args]
        assert torch.equal(getattr(OPS, op).cpu(*args), expected)


@every_kind
def test_inputs_without_rows(isa: str, kind: Kind) -> None:
    for op, make in MAKERS:
        assert getattr(OPS, op).cpu(*make(0, 16, 50, kind)).shape == (0, 50)


@every_isa
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("K", [52, 64, 1536])
def test_int8_products_are_exact(isa: str, T: int, K: int) -> None:
    """Outliers, nothing but zeros, the smallest numbers; channels of zeros and of outliers."""
    x, weight = torch.randn(T, K), torch.randn(100, K)
    x[0, 7], weight[3], weight[4, 5] = 1e4, 0.0, 1e4
    x[T // 2, 1:], x[T // 3] = 0.0, x[T // 3] * 1e-38
    args = [x, panels.pack_int8(weight), None, 100, Activation.NONE, False]
    assert torch.equal(OPS.linear.cpu(*args), OPS.linear.reference(*args))


@every_isa
@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_int8_product_of_what_is_not_finite_is_not_either(
    isa: str, value: float, dtype: torch.dtype
) -> None:
    args = linear_args(40, 64, 50, Kind(dtype, int8=True))
    args[0][[0, 39], [3, 63]] = value
    lost = ~OPS.linear.cpu(*args).isfinite()
    assert lost[[0, 39]].all()
    assert not lost[1:39].any()


def sums_of(isa: str, x: Tensor, weight: Tensor) -> Tensor:
    """The bits of the fp32 sums of one row: what a bf16 result leaves of them, rounded in turn."""
    OPS.set_cpu_isa(isa)
    parts, bias = [], torch.zeros(weight.shape[0])
    for _ in range(3):
        out = OPS.linear.cpu(x, panels.pack(weight), bias, len(weight), Activation.NONE, False)
        parts.append(out)
        bias = bias - out[0].float().nan_to_num(posinf=0, neginf=0)
    return torch.stack(parts)


@pytest.mark.skipif("amx_bf16" not in ISAS, reason="this CPU has no tiles, or may not use them")
@pytest.mark.parametrize("isa", ["amx_bf16"], indirect=True)
@pytest.mark.parametrize("kind", ["normal", "subnormal inputs", "special"])
def test_what_stands_in_for_tiles_gives_their_bits(isa: str, kind: str) -> None:
    for K, N in [(32, 48), (384, 100), (1536, 96)]:
        x, weight = torch.randn(1, K), torch.randn(N, K)
        if kind == "subnormal inputs":
            x[:, ::3] *= 1e-39
            weight[:, 1::3] *= 1e-39
        if kind == "special":
            weight[3, 5], weight[4, 9], weight[7, 0] = float("nan"), float("inf"), -float("inf")
        x, weight = x.bfloat16(), weight.bfloat16()
        tiles, portable = (sums_of(name, x, weight) for name in ("amx_bf16", "generic_tiles"))
        assert torch.equal(tiles.isnan(), portable.isnan())
        assert torch.equal(tiles.nan_to_num(), portable.nan_to_num())


@every_isa
def test_bfloat16_runs_on_panels_where_tiles_or_dot_products_are(isa: str) -> None:
    target = Target(torch.bfloat16, CPU)
    odd = PanelLinear.refusal(target, 37)
    if isa == "amx_bf16":
        assert PanelLinear.refusal(target, 384) is None
        assert PanelLinear.refusal(target, 38) is None
        assert odd == "the number of inputs (37) is odd"
    elif isa == "avx512_bf16" and "amx_bf16" not in ISAS:
        assert odd == "the number of inputs (37) is odd"
    else:
        assert odd is not None
        assert odd.startswith("oneDNN is faster w")


@every_isa
@every_dtype
def test_what_is_chosen_says_why_nothing_before_it_is(isa: str, dtype: torch.dtype) -> None:
    target = Target(dtype, CPU)
    choice = linears.choose(target, 37)
    before = linears.KINDS[: linears.KINDS.index(choice.kind)]
    assert choice.kind.refusal(target, 37) is None
    assert choice.refusals == {kind.name: kind.refusal(target, 37) for kind in before}
    assert str(choice).startswith(choice.kind.name)
    asked = ("live", "int8", "split")
    told = [f"{name}: {why}" for name, why in choice.refusals.items() if name not in asked]
    assert str(choice) == f"{choice.kind.name} ({'; '.join(told)})".removesuffix(" ()")


def test_live_weights_are_chosen_before_all_else_and_need_their_modules() -> None:
    target = Target(torch.float32, CPU, live=True)
    assert linears.choose(target) == linears.LinearChoice(linears.LiveLinear, {})
    part = as_part(torch.randn(30, 64), None, torch.float32)
    parts = part, Linear(part.weight, None)
    with pytest.raises(UnsupportedModelError, match=r"that of \(30, 64\) has none"):
        linears.prepare_linear(parts, target)


def as_part(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """A layer as an adapter reads it."""
    module = torch.nn.Linear(*reversed(weight.shape), bias=bias is not None, dtype=dtype)
    module.weight.data.copy_(weight)
    if bias is not None:
        module.bias.data.copy_(bias)
    return Linear(weight, bias, module)


@every_dtype
@pytest.mark.parametrize("inputs", [64, 37])
@pytest.mark.parametrize("kind", linears.KINDS, ids=lambda kind: kind.name)
def test_prepared_linears_agree(kind: Any, inputs: int, dtype: torch.dtype) -> None:
    """Whatever they run on; layers without a bias beside one that has it."""
    target = Target(dtype, CPU, live=kind is linears.LiveLinear)
    if kind in (linears.Int8Linear, linears.SplitLinear):
        pytest.skip("it rounds weights")
    if kind is not PanelLinear and (reason := kind.refusal(target, inputs)) is not None:
        pytest.skip(reason)
    if kind is PanelLinear and dtype == torch.bfloat16 and inputs % 2:
        pytest.skip("bfloat16 panels hold pairs of inputs")
    x, residual = torch.randn(32, inputs).to(dtype), torch.randn(32, 90).to(dtype)
    weights, bias = torch.randn(3, 30, inputs), torch.randn(30)
    parts = tuple(as_part(w, b, dtype) for w, b in zip(weights, (None, bias, None), strict=True))
    whole_bias = torch.cat((torch.zeros(30), bias, torch.zeros(30)))
    args: list[Any] = [x, panels.pack(weights.view(90, -1)), whole_bias, 90, Activation.GELU, False]
    if dtype == torch.bfloat16:
        # pack() takes an even number of inputs: the oracle gets one more, of zeros.
        wide = F.pad(weights.view(90, -1), (0, inputs % 2)).to(dtype)
        args[:2] = F.pad(x, (0, inputs % 2)), panels.pack(wide)
    check_op("linear", kind(parts, target, Activation.GELU)(x), args, dtype)

    ungated = args[1:3]
    for first in (True, False):
        rows = panels.unpack(ungated[0], 90), ungated[1]
        weight, args[2] = (panels.interleave(each, first) for each in rows)
        args[1], args[3:] = panels.pack(weight), (45, Activation.SILU, True)
        check_op("linear", kind(parts, target, Activation.SILU, first)(x), args, dtype)
    args[1:3] = ungated

    norm = PreparedNorm(torch.rand(90), torch.randn(90), 1e-5)
    out = kind(parts, target).add_norm(x, residual, norm)
    args[3:] = residual, norm.weight, norm.bias, norm.eps
    check_op("linear_norm", out, args, dtype)
