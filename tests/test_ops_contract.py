"""What every implementation of every op owes PyTorch: opcheck, compile, export, no fallback."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from op_cases import RAGGED, arguments
from sbert_fast import ops
from sbert_fast.errors import ImplementationError
from sbert_fast.ops import schemas
from sbert_fast.testing import check_op, oracle, pack_lengths

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
IMPLS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            (reason := ops.refusal(name, CPU, torch.float32)) is not None, reason=str(reason)
        ),
    )
    for name in schemas.IMPLEMENTATIONS
    if name not in ("torch", "cuda")  # on CUDA only
]
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_op = pytest.mark.parametrize(
    ("op", "impl"),
    [
        pytest.param(op, *impl.values, marks=impl.marks)
        for op in schemas.SCHEMAS
        for impl in IMPLS
        if impl.values[0] in schemas.implementations(op)
    ],
)


def overload(op: str, impl: str) -> Any:
    return getattr(getattr(torch.ops.sbert_fast, op), impl)


@every_op
@pytest.mark.parametrize("lengths", [RAGGED, (), (0, 0)], ids=["ragged", "none", "empty"])
def test_opcheck(op: str, impl: str, lengths: tuple[int, ...]) -> None:
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        overload(op, impl), arguments(op, torch.float32, lengths), test_utils=utils
    )


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(op: str, impl: str, dtype: torch.dtype) -> None:
    if (reason := ops.refusal(impl, CPU, dtype)) is not None:
        pytest.skip(reason)
    if op in schemas.GRADIENTS:
        pytest.skip("autograd's results are compared, in test_gradients.py")
    args = arguments(op, dtype)
    if op.endswith("_out"):
        *inputs, out, rows = args
        pooled = oracle(op[:-4], *inputs)
        overload(op, impl)(*args)
        check_op(op[:-4], out[rows.long()], inputs, torch.float32)
        untouched = set(range(out.shape[0])) - set(rows.tolist())
        assert out[list(untouched)].isnan().all() and pooled.shape[0] == len(rows)
        return
    out = overload(op, impl)(*args)
    eps_dtype = torch.float32 if op.endswith("_pool") else dtype
    if op == "varlen_attention":
        end = int(args[1][-1])
        assert (out[end:] == 0).all()
    check_op(op, out, args, eps_dtype)


def test_2x_rule_can_fail() -> None:
    args = arguments("add_norm", torch.float32)
    wrong = ops.add_norm(*args[:5], 1e-2, impl="reference")
    with pytest.raises(AssertionError, match="over the bound"):
        check_op("add_norm", wrong, args, torch.float32)


@every_impl
def test_compile_does_not_recompile_for_new_lengths(impl: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def forward(qkv: torch.Tensor, cu: torch.Tensor, longest: int) -> torch.Tensor:
        attended = ops.varlen_attention(qkv, cu, longest, impl=impl)
        return ops.segment_pool(attended.flatten(1), cu, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    generator = random.Random(0)
    for _ in range(15):
        lengths = [generator.randint(1, 12) for _ in range(generator.randint(2, 9))]
        qkv, cu, longest, *_ = arguments("varlen_attention", torch.float32, lengths)
        torch.testing.assert_close(compiled(qkv, cu, longest), forward(qkv, cu, longest))
    assert counter.frame_count <= 2


@every_impl
def test_export_round_trip(impl: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
            width = x.shape[1]
            y = ops.add_norm(x, None, x, torch.ones(width), torch.zeros(width), 1e-12, impl=impl)
            return ops.segment_pool(ops.bias_gelu(y, None, impl=impl), cu, impl=impl)

    x, cu, *_ = arguments("segment_pool", torch.float32)
    tokens, batch = torch.export.Dim("tokens", min=2), torch.export.Dim("batch", min=3)
    program = torch.export.export(
        Module(), (x, cu), dynamic_shapes={"x": {0: tokens}, "cu": {0: batch}}
    )
    other, other_cu, *_ = arguments("segment_pool", torch.float32, (9, 30, 2))
    torch.testing.assert_close(program.module()(other, other_cu), Module()(other, other_cu))


@every_op
def test_backward_is_refused(op: str, impl: str) -> None:
    if op.endswith("_out"):
        pytest.skip("returns nothing that could be differentiated")
    if ops.gradient_refusal(op, {}) is None:
        pytest.skip("has a backward, see test_gradients.py")
    args = list(arguments(op, torch.float32))
    floats = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in args]
    at = floats.index(True)
    args[at] = args[at].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{op} has no backward"):
        result = overload(op, impl)(*args)
        (result if isinstance(result, torch.Tensor) else result[0]).sum().backward()


CU = pack_lengths((3, 5))
QKV = torch.zeros(8, 3, 2, 16)


def test_explicit_implementation_never_falls_back() -> None:
    half = torch.zeros(8, 3, 2, 16, dtype=torch.float16)
    with pytest.raises(ImplementationError, match="impl='cpu' was asked for, but"):
        ops.varlen_attention(half, CU, 5, impl="cpu")


def test_launch_counters_name_the_side_that_ran() -> None:
    ops.reset_launches()
    ops.varlen_attention(QKV, CU, 5, impl="reference")
    assert ops.launches() == {("varlen_attention", "reference"): 1}
