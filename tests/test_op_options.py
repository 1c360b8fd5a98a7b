"""What the ops take beyond the layers of BERT: against plain torch, and who refuses it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import BUCKETS, RAGGED, arguments, int32, table_of_distances
from sbert_fast import ops
from sbert_fast.errors import ImplementationError
from sbert_fast.ops import dispatch, schemas
from sbert_fast.testing import pack_lengths

CPU = torch.device("cpu")
RUNNABLE = [i for i in ops.IMPLEMENTATIONS if ops.refusal(i, CPU, torch.float32) is None]
TOKENS, WIDTH = 9, 24


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    """To the rounding of fp64, which the reference computes in."""
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# Attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 1, 2, 6])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dim", [16, 256])
def test_attention(causal: bool, kv_heads: int | None, window: int | None, dim: int) -> None:
    heads, groups = 6, kv_heads or 6
    cu = pack_lengths(RAGGED)
    tokens = int(cu[-1])
    q, k, v = (randn(tokens, n, dim) for n in (heads, groups, groups))
    qkv = torch.stack((q, k, v), 1) if kv_heads is None else torch.cat((q, k, v), 1)
    out = ops.varlen_attention(qkv, cu, 64, causal=causal, kv_heads=kv_heads, window=window)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        distance = torch.arange(end - start)[None] - torch.arange(end - start)[:, None]
        keep = torch.ones_like(distance, dtype=torch.bool)
        keep &= distance <= 0 if causal else True
        keep &= distance.abs() <= window if window is not None else True
        one = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))
        expected = F.scaled_dot_product_attention(*one, attn_mask=keep, enable_gqa=True)
        assert_equal(out[start:end], expected[0].transpose(0, 1))


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_norm_of_heads(turned: bool, kv_heads: int | None) -> None:
    cu, dim = pack_lengths(RAGGED), 16
    tokens, groups = int(cu[-1]), kv_heads or 4
    q, k, v = (randn(tokens, n, dim) for n in (4, groups, groups))
    weights = torch.rand(2, dim)
    normed = [rms_norm(x, w.double(), 1e-3) for x, w in zip((q, k), weights, strict=True)]

    def attend(*parts: Tensor, **options: Any) -> Tensor:
        qkv = torch.stack(parts, 1) if kv_heads is None else torch.cat(parts, 1)
        angles = torch.arange(tokens * 8).view(tokens, 8).float()
        rotary = (angles.cos(), angles.sin()) if turned else None
        return ops.varlen_attention(qkv, cu, 64, kv_heads=kv_heads, rotary=rotary, **options)

    assert_equal(attend(q, k, v, head_norm=(*weights, 1e-3)), attend(*normed, v))


BAD_NORMS = {
    "head_norm must be a tuple": (TypeError, torch.ones(16)),
    r"head_norm\[0\]": (ValueError, (torch.ones(8), torch.ones(16), 1e-6)),
    r"head_norm\[1\]": (TypeError, (torch.ones(16), None, 1e-6)),
    r"head_norm\[2\] must be at least 0": (ValueError, (torch.ones(16), torch.ones(16), -1.0)),
}


@pytest.mark.parametrize("match", BAD_NORMS)
def test_norms_of_heads_that_are_refused(match: str) -> None:
    error, norm = BAD_NORMS[match]
    with pytest.raises(error, match=match):
        ops.varlen_attention(torch.randn(8, 3, 2, 16), int32(0, 8), 8, head_norm=norm)


@pytest.mark.parametrize(("heads", "kv_heads"), [(0, 2), (3, 2)])
def test_heads_that_no_kv_heads_serve(heads: int, kv_heads: int) -> None:
    with pytest.raises(ValueError, match="at least one head H|kv_heads must divide the 3 heads"):
        qkv = torch.randn(8, heads + 2 * kv_heads, 16)
        ops.varlen_attention(qkv, int32(0, 8), 8, kv_heads=kv_heads)


# Norms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("rms", [False, True])
def test_norms(rms: bool) -> None:
    x, residual, weight = randn(TOKENS, WIDTH), randn(TOKENS, WIDTH), randn(WIDTH)
    expected = rms_norm(x + residual, weight, 1e-5)
    if not rms:
        expected = F.layer_norm(x + residual, (WIDTH,), weight, None, 1e-5)
    args = (x, None, residual, weight, None, 1e-5)
    assert_equal(ops.add_norm(*args, rms=rms), expected)
    normed, total = ops.add_norm(*args, rms=rms, return_sum=True)
    assert_equal(normed, expected)
    assert_equal(total, x + residual)
    pooled = ops.norm_pool(*args, int32(0, TOKENS), rms=rms, normalize=False)
    assert_equal(pooled[0], expected.mean(0))
    out = torch.empty(1, WIDTH)
    ops.norm_pool(*args, int32(0, TOKENS), rms=rms, normalize=False, out=out)
    assert torch.equal(out, pooled.float())


def test_the_sum_is_a_tensor_of_its_own() -> None:
    x = randn(TOKENS, WIDTH)
    _, total = ops.add_norm(x, None, None, torch.ones(WIDTH), None, 1e-5, return_sum=True)
    assert torch.equal(total, x) and total.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("impl", RUNNABLE)
def test_a_norm_without_bias_is_one_with_zeros(impl: str) -> None:
    x, weight = torch.randn(TOKENS, WIDTH), torch.rand(WIDTH)
    ids = torch.arange(TOKENS, dtype=torch.int32)
    cu = int32(0, TOKENS)
    for bias in (None, torch.zeros(WIDTH)):
        found = [
            ops.add_norm(x, None, x, weight, bias, 1e-5, impl=impl),
            ops.norm_pool(x, None, x, weight, bias, 1e-5, cu, impl=impl),
            ops.embed_norm(ids, ids, None, x, x, None, weight, bias, 1e-5, impl=impl),
        ]
        if bias is None:
            expected = found
    assert all(map(torch.equal, found, expected))


# Embeddings


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_embeddings_without_positions_or_norm(normed: bool, rms: bool) -> None:
    word, types, ids = randn(20, WIDTH), randn(1, WIDTH), torch.arange(TOKENS, dtype=torch.int32)
    weight = randn(WIDTH) if normed else None
    expected = word[:TOKENS] + types
    if weight is not None and rms:
        expected = rms_norm(expected, weight, 1e-5)
    elif weight is not None:
        expected = F.layer_norm(expected, (WIDTH,), weight, None, 1e-5)
    out = ops.embed_norm(ids, None, None, word, None, types, weight, None, 1e-5, rms=rms)
    assert_equal(out, expected)


# Gates


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("silu", F.silu),
    ],
)
def test_gated_activation(name: str, function: Any, first: bool) -> None:
    x, bias = randn(TOKENS, 2 * WIDTH), randn(2 * WIDTH)
    a, b = (x + bias).chunk(2, dim=1)
    expected = function(a) * b if first else a * function(b)
    assert_equal(ops.gated_activation(x, bias, activation=name, first=first), expected)


# Who lacks what

LACKED = [
    (implementation, op, need)
    for implementation, table in schemas.LACKED.items()
    for op, needs in table.items()
    for need in needs
]
OPTIONS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.1},
    "causal": {"causal": True},
    "kv_heads": {"kv_heads": 1},
    "query_norm": {"head_norm": (torch.ones(16), torch.ones(16), 1e-6)},
    "position_keys": {"disentangled": (table_of_distances(16), None, BUCKETS)},
    "position_queries": {"disentangled": (None, table_of_distances(16), BUCKETS)},
    "rms": {"rms": True},
    "rotary": {"rotary": (torch.ones(8, 8), torch.zeros(8, 8))},
    "without position_table": {"positions": None, "position_table": None},
    "without weight": {"weight": None, "bias": None},
}


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Implementations refuse no device and no dtype."""
    monkeypatch.setattr(dispatch, "_refusal_of_place", lambda *place: None)


def public_call(op: str, changes: dict[str, Any]) -> Any:
    """The public op on 8 tokens, with changed arguments."""
    x, ids = torch.randn(8, 16), torch.arange(8, dtype=torch.int32)
    norm = {"weight": torch.ones(16), "eps": 1e-5}
    summands = {"x": x, "bias": None, "residual": x, "ln_bias": None}
    args: dict[str, Any] = {
        "varlen_attention": {"qkv": torch.randn(8, 3, 2, 16), "cu_seqlens": int32(0, 8)},
        "embed_norm": {"ids": ids, "positions": ids, "types": None, "word": x, "bias": None},
        "add_norm": summands | norm,
        "norm_pool": summands | norm | {"cu_seqlens": int32(0, 8)},
    }[op.removesuffix("_out")]
    if op == "varlen_attention":
        args |= {"max_seqlen": 8}
        if "kv_heads" in changes:
            args["qkv"] = torch.randn(8, 4, 16)
    if op == "embed_norm":
        args |= {"position_table": x, "type_table": None} | norm
    if op.endswith("_out"):
        args["out"] = torch.empty(1, 16)
    return getattr(ops, op.removesuffix("_out"))(**args | changes)


@pytest.mark.parametrize(("implementation", "op", "need"), LACKED)
@pytest.mark.usefixtures("anywhere")
def test_what_is_lacked_is_refused_by_name(implementation: str, op: str, need: str) -> None:
    ops.reset_launches()
    why = f"'{implementation}' was asked for, but .* have no {op} .*{need.split()[-1]} yet"
    with pytest.raises(ImplementationError, match=f"^impl={why}"):
        public_call(op, OPTIONS[need] | {"impl": implementation})
    assert not ops.launches()


@pytest.mark.parametrize(("op", "need"), sorted({(op, need) for _, op, need in LACKED}))
def test_auto_runs_what_has_it(op: str, need: str) -> None:
    ops.reset_launches()
    public_call(op, OPTIONS[need])
    ((ran, implementation),) = ops.launches()
    assert ran == op
    assert need not in schemas.LACKED.get(implementation, {}).get(op, ())


@pytest.mark.parametrize("op", sorted(schemas.WITHOUT_CUDA_KERNEL))
@pytest.mark.usefixtures("anywhere")
def test_an_op_without_a_kernel(op: str) -> None:
    with pytest.raises(ImplementationError, match=f"the CUDA ops have no {op} yet"):
        ops.bind(op, CPU, torch.float32, "cuda")


def test_python_ends_in_peace() -> None:
    """torch aborts over overloads that were defined in an order that it does not expect."""
    done = subprocess.run([sys.executable, "-P", "-c", "import sbert_fast.ops"], check=False)
    assert done.returncode == 0


@pytest.mark.usefixtures("anywhere")
def test_head_dims_beyond_the_kernels() -> None:
    assert ops.refusal("cuda", CPU, torch.float32, head_dim=128) is None
    with pytest.raises(ImplementationError, match="the CUDA ops take head dims up to 128, not 136"):
        ops.bind("varlen_attention", CPU, torch.float32, "cuda", head_dim=136)


@pytest.mark.parametrize(("implementation", "op", "need"), LACKED)
def test_overloads_have_no_argument_for_what_they_lack(
    implementation: str, op: str, need: str
) -> None:
    packet = getattr(torch.ops.sbert_fast, op)
    full = {a.name: a.type for a in packet.reference._schema.arguments}
    lean = {a.name: a.type for a in getattr(packet, implementation)._schema.arguments}
    name = need.removeprefix("without ")
    if need == "rotary":
        return  # it refuses what it is given
    assert lean.get(name) != full[name]


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("varlen_attention", (True, 0)),
        ("varlen_attention", (False, 0, None, None, 0.0, table_of_distances(26), None, BUCKETS)),
        ("varlen_attention", (False, 0, None, None, 0.0, None, None, None, 0.3, torch.tensor([7]))),
        ("add_norm_sum", ()),
        ("gated_activation", ()),
    ],
)
def test_options_in_a_graph(op: str, options: tuple[Any, ...]) -> None:
    args = (*arguments(op, torch.float32), *options)
    torch.library.opcheck(
        getattr(torch.ops.sbert_fast, op).reference,
        args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
