"""Every implementation of every op where a model runs, and rows far apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attention_cases import Case
from op_cases import arguments, int32
from sbert_fast import ops
from sbert_fast.ops import schemas
from sbert_fast.testing import check_op

OPS = torch.ops.sbert_fast
HALF = torch.float16
# Short and long sequences, ragged ends: small enough for compute-sanitizer.
SANITIZED = (5, 0, 16, 60, 130, 200, 300)
WITHOUT_PEERS = schemas.CPU_ONLY | schemas.GRADIENTS
GPU_OPS = [op for op in schemas.SCHEMAS if op not in WITHOUT_PEERS and not op.endswith("_out")]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("op", GPU_OPS)
@pytest.mark.parametrize("impl", ["triton", "cuda", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_implementation_on_a_gpu(op: str, impl: str, dtype: torch.dtype) -> None:
    if (reason := ops.refusal(impl, torch.device("cuda"), dtype, op=op)) is not None:
        pytest.skip(reason)
    # Rows of the CUDA kernels begin at multiples of 16 bytes.
    args = arguments(op, dtype, dim=24 if impl == "cuda" else 26)
    there = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    out = pytree.tree_map(Tensor.cpu, getattr(getattr(OPS, op), impl)(*there))
    check_op(op, out, args, torch.float32 if "pool" in op else dtype)
    assert ops.resolve(torch.device("cuda"), dtype) == "triton"


def check_cuda(op: str, args: Sequence[Any]) -> None:
    """The CUDA kernel of `op` on float16, by the 2x rule."""
    if (reason := ops.refusal("cuda", torch.device("cuda"), HALF)) is not None:
        pytest.skip(reason)
    there = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    out = getattr(OPS, op).cuda(*there)
    check_op(op, out.cpu(), args, torch.float32 if "pool" in op else HALF)


# Beyond 64 tokens, compute capability 9.0 has a kernel of its own for head dims 32, 64 and 128; the
# one for all GPUs runs with the others, of which 72 does not fill its chunks.
@pytest.mark.parametrize("dim", [32, 64, 72, 96, 128])
def test_every_cuda_kernel_of_attention_and_pooling(dim: int) -> None:
    for op in ("varlen_attention", "segment_pool", "norm_pool"):
        check_cuda(op, arguments(op, HALF, SANITIZED, heads=12, dim=dim))


def test_every_cuda_kernel_of_attention_with_bias_and_window() -> None:
    check_cuda("varlen_attention", Case(SANITIZED, 64, HALF, reach=9, window=70).args())


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("op", ["segment_pool", "norm_pool"])
def test_every_cuda_kernel_of_max_pooling(op: str, dim: int) -> None:
    args = list(arguments(op, HALF, SANITIZED, heads=12, dim=dim))
    args[-4] = ops.POOLING_MODES.index("max")
    check_cuda(op, args)


def test_rows_more_than_2_to_the_31_bytes_apart_are_pooled_in_their_places() -> None:
    x = torch.zeros(2**21 + 8, 1024, dtype=torch.float16, device="cuda")
    x[-8:] = 1
    out = torch.full((2, 1024), -7.0, device="cuda")
    cu_seqlens = int32(0, 2**21, 2**21 + 8).cuda()
    OPS.segment_pool_out.triton(x, cu_seqlens, 0, True, 0, None, out, int32(1, 0).cuda())
    assert not out[1].any()
    torch.testing.assert_close(out[0], torch.full((1024,), 1 / 32, device="cuda"))


def test_values_are_checked_on_a_gpu_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, out = torch.ones(16, 64, device="cuda"), torch.full((3, 64), -7.0, device="cuda")
    table, weight = torch.ones(4, 64, device="cuda"), torch.ones(64, device="cuda")
    good, bad = int32(0, 3, 8).cuda(), int32(0, 9, 8).cuda()
    rows, twice = int32(2, 0).cuda(), int32(2, 2).cuda()
    monkeypatch.setenv("SBERT_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="^cu_seqlens must never decrease, got 9 then 8"):
        ops.segment_pool(x, bad, out=out, out_rows=rows)
    with pytest.raises(ValueError, match="^out_rows must name a row at most once, got 2 twice"):
        ops.segment_pool(x, good, out=out, out_rows=twice)
    with pytest.raises(ValueError, match=r"^ids\[1\] must be in \[0, 4\)"):
        ops.embed_norm(bad[:2], rows, None, table, table, None, weight, weight, 1e-5)
    assert (out == -7).all()
    ops.segment_pool(x, good, out=out, out_rows=rows)

    monkeypatch.delenv("SBERT_FAST_DEBUG")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.segment_pool(x, good, out=out, out_rows=rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
