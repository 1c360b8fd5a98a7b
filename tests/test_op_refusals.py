"""What the public ops refuse, in the same words whichever implementation would run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from refusal_cases import DIM, HEADS, TABLES, TOKENS, UNTOUCHED, WIDTH, public_arguments
from sbert_fast import ops
from sbert_fast.ops import schemas
from sbert_fast.testing import pack_lengths

CPU = torch.device("cpu")
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

REFUSALS = [
    pytest.param(op, *row, id=f"{op}-{row[0]}-{number}")
    for op, table in TABLES.items()
    for number, row in enumerate(table)
]
every_op = pytest.mark.parametrize("op", TABLES)


@every_impl
@pytest.mark.parametrize(("op", "name", "change", "error", "message"), REFUSALS)
def test_refusals(
    op: str,
    name: str,
    change: Callable[[Any], Any],
    error: type[Exception],
    message: str,
    impl: str,
) -> None:
    args = {**public_arguments(op), "impl": impl}
    args[name] = change(args[name])
    target = args.get("out")
    before = ops.launches()
    with pytest.raises(error, match=f"^{message}") as raised:
        getattr(ops, op)(**args)
    assert raised.type is error
    assert ops.launches() == before
    if isinstance(target, Tensor) and target.device == CPU:
        assert (target == UNTOUCHED).all()


@every_impl
@every_op
def test_arguments_that_are_not_changed_are_accepted(op: str, impl: str) -> None:
    args = public_arguments(op)
    result = getattr(ops, op)(**args, impl=impl)
    assert result.isfinite().all()
    if "out" in args:
        assert result is args["out"]
        assert (result[1] == UNTOUCHED).all() and (result[[0, 2]] != UNTOUCHED).all()


@every_impl
def test_rows_of_out_are_needed_where_none_are_named(impl: str) -> None:
    for op in ("segment_pool", "norm_pool"):
        args = public_arguments(op) | {"out": torch.full((1, WIDTH), UNTOUCHED), "out_rows": None}
        with pytest.raises(ValueError, match="^out must have at least 2 rows, got 1"):
            getattr(ops, op)(**args, impl=impl)
        assert (args["out"] == UNTOUCHED).all()


@every_impl
@pytest.mark.parametrize(
    ("op", "name"), [("segment_pool", "x"), ("norm_pool", "x"), ("norm_pool", "residual")]
)
def test_out_shares_no_memory_with_what_is_read(op: str, name: str, impl: str) -> None:
    args = public_arguments(op)
    both = torch.rand(TOKENS + 3, WIDTH)
    args[name] = both[:TOKENS]
    args["out"] = both[TOKENS - 1 : TOKENS + 2]
    before = both.clone()
    with pytest.raises(ValueError, match=f"^out must share no memory with {name}"):
        getattr(ops, op)(**args, impl=impl)
    assert torch.equal(both, before)
    args["out"] = both[TOKENS:]
    getattr(ops, op)(**args, impl=impl)
    assert torch.equal(both[:TOKENS], before[:TOKENS])


@every_impl
def test_16_bit_tables_give_no_other_dtype(impl: str) -> None:
    args = public_arguments("embed_norm")
    for name in ("word", "position_table", "type_table"):
        args[name] = args[name].half()
    with pytest.raises(TypeError, match="^out_dtype must be float16 where word is .* got float32"):
        ops.embed_norm(**args, impl=impl)


@every_impl
def test_whole_numbers_of_numpy_are_ints(impl: str) -> None:
    args = public_arguments("varlen_attention")
    expected = ops.varlen_attention(**args, impl=impl)
    args |= {"max_seqlen": np.int32(5), "window": np.int64(3), "scale": np.float32(0.25)}
    assert torch.equal(ops.varlen_attention(**args, impl=impl), expected)


@every_impl
def test_tiles_in_any_order_change_no_result(impl: str) -> None:
    args = public_arguments("varlen_attention")
    expected = ops.varlen_attention(**args, impl=impl)
    args["tiles"] = args["tiles"].flip(0)
    assert torch.equal(ops.varlen_attention(**args, impl=impl), expected)
    args["tiles"] = None
    assert torch.equal(ops.varlen_attention(**args, impl=impl), expected)


@every_op
def test_fake_tensors_have_no_values_to_check(op: str) -> None:
    args = {k: v for k, v in public_arguments(op).items() if k not in ("rotary", "out", "out_rows")}
    expected = getattr(ops, op)(**args)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in args.items()}
        result = getattr(ops, op)(**fake)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


@every_op
def test_every_public_op_is_one_graph(op: str) -> None:
    args = public_arguments(op)
    expected = getattr(ops, op)(**args).clone()
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, op), backend="aot_eager", fullgraph=True)
    if "out" in args:
        args["out"] = torch.full_like(args["out"], UNTOUCHED)
    assert torch.equal(compiled(**args), expected)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_with_a_max_seqlen_that_depends_on_data(strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor, cu: Tensor) -> Tensor:
            longest = cu.diff().max().item()
            return ops.varlen_attention(qkv, cu, longest, impl="reference")

    args = public_arguments("varlen_attention")
    inputs = args["qkv"], args["cu_seqlens"]
    dims = {"qkv": {0: torch.export.Dim("tokens", min=2)}, "cu": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(Module(), inputs, dynamic_shapes=dims, strict=strict)
    qkv, cu = torch.rand(32, 3, HEADS, DIM), pack_lengths((20, 1, 7))
    torch.testing.assert_close(program.module()(qkv, cu), Module()(qkv, cu))
