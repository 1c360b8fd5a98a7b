"""Gradients of the ops: against finite differences, by the 2x rule, and what reaches which."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from op_cases import arguments, embed_args
from sbert_fast import ops
from sbert_fast.ops import reference
from sbert_fast.testing import PEERS, assert_close_to_oracle, pack_lengths, to_fp64

OPS = (
    "varlen_attention",
    "embed_norm",
    "add_norm",
    "add_norm_sum",
    "bias_gelu",
    "gated_activation",
    "segment_pool",
)
# Bias, rotary positions, a head of keys for two of queries, and norms of heads.
FULL = {4: 5, 6: True, 10: 1, 11: True}
# By the places of arguments: what is changed in those of `op_cases.arguments`; see `case`.
CASES: list[tuple[str, dict[int, Any]]] = [
    ("varlen_attention", {}),
    ("varlen_attention", {3: -0.3}),
    ("varlen_attention", {4: 2}),
    ("varlen_attention", {4: 90}),
    ("varlen_attention", {4: 0, 5: 3}),
    ("varlen_attention", {9: True}),
    ("varlen_attention", {4: 4, 5: 9, 9: True}),
    ("varlen_attention", {6: True}),
    ("varlen_attention", {9: True, 10: 1}),
    ("varlen_attention", {10: 2, 11: True}),
    ("varlen_attention", FULL),
    ("varlen_attention", {17: 0.3}),
    ("varlen_attention", {4: 2, 5: 30, 9: True, 17: 0.5}),
    ("embed_norm", {}),
    ("embed_norm", {2: None}),
    ("embed_norm", {1: None, 4: None}),
    ("embed_norm", {2: None, 5: None, 6: None, 7: None}),
    ("embed_norm", {10: True}),
    ("add_norm", {}),
    ("add_norm", {1: None}),
    ("add_norm", {2: None, 6: True}),
    ("add_norm_sum", {}),
    ("add_norm_sum", {1: None, 6: True}),
    ("bias_gelu", {}),
    ("bias_gelu", {1: None, 2: True}),
    ("gated_activation", {}),
    ("gated_activation", {1: None, 2: 2}),
    ("gated_activation", {2: 3, 3: False}),
    ("gated_activation", {1: None, 2: 0}),
    *(
        ("segment_pool", {2: mode, 3: normalize, 4: skip})
        for mode, normalize, skip in itertools.product(range(6), (False, True), (0, 2))
    ),
    *(("segment_pool", {2: mode, 4: 1, 5: True}) for mode in range(6)),
]
every_case = pytest.mark.parametrize(("op", "changes"), CASES, ids=str)
every_impl = pytest.mark.parametrize("impl", ["reference", "cpu"])


def case(op: str, changes: dict[int, Any], dtype: torch.dtype, **sizes: Any) -> list[Any]:
    """The arguments of `op` with `changes`: of attention, the reach of a bias, and whether there
    are rotary positions or norms of heads, in the place of the first of their tensors; of pooling,
    whether there are spans."""
    args = [*arguments(op, dtype, **sizes)]
    args += [
        each.default_value for each in overload(op, "reference")._schema.arguments[len(args) :]
    ]
    for place, value in changes.items():
        args[place] = value
    if op == "segment_pool" and args[5]:
        # The same twice, overlapping, no longer than a prompt, empty, of two sequences.
        spans = [[0, 3], [0, 3], [0, 4], [2, 3], [4, 4], [3, 7]]
        args[5] = torch.tensor(spans, dtype=torch.int32)
    if op != "varlen_attention":
        return args
    g = torch.Generator().manual_seed(1)
    tokens, _, heads, dim = args[0].shape
    if args[4] is not None:
        args[4] = torch.randn(heads, 2 * args[4] + 1, generator=g)
    if args[6] is not None:
        angles = 6 * torch.rand(tokens, dim // 2, generator=g)
        args[6:8] = angles.cos(), angles.sin()
    if args[10]:
        args[0] = args[0].flatten(1, 2)[:, : heads + 2 * args[10]].contiguous()
    if args[11] is not None:
        args[11:14] = *(1 + 0.2 * torch.randn(2, dim, generator=g)), 1e-6
    if 17 in changes:
        args[18] = torch.tensor([2**40 + 7])  # the seed
    return args


def floats(op: str, args: list[Any]) -> list[int]:
    """The places of what has a gradient: rotary positions have none."""
    rotary = (6, 7) if op == "varlen_attention" else ()
    tensors = (i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point())
    return [i for i in tensors if i not in rotary]


def gradients(op: str, function: Any, args: list[Any], grad: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of all that has one, `grad` being those of the results."""
    args, places = list(args), floats(op, args)
    for place in places:
        args[place] = args[place].clone().requires_grad_()
    out = results(function(*args))
    wide = [part.to(each.dtype) for part, each in zip(grad, out, strict=True)]
    return list(torch.autograd.grad(out, [args[i] for i in places], wide))


def results(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


def overload(op: str, impl: str) -> Any:
    return getattr(getattr(torch.ops.sbert_fast, op), impl)


def called(op: str, impl: str, device: str = "cpu") -> Callable[..., Any]:
    """The op on a device, its results on the CPU; not given arguments that it lacks."""
    function, whole = overload(op, impl), overload(op, "reference")._schema.arguments
    own = {each.name for each in function._schema.arguments}
    kept = [each.name in own for each in whole]

    def call(*args: Any) -> Any:
        given = itertools.compress(args, kept)
        there = (a.to(device) if isinstance(a, Tensor) else a for a in given)
        return pytree.tree_map(Tensor.cpu, function(*there))

    return call


def upstream(op: str, args: list[Any]) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn_like(each.float()) for each in results(getattr(reference, op)(*args))]


@every_case
def test_finite_differences(op: str, changes: dict[int, Any]) -> None:
    sizes: dict[str, Any] = {"lengths": (3, 0, 1, 4), "heads": 2, "dim": 8}
    args = to_fp64(case(op, changes, torch.float32, **sizes))
    if op == "embed_norm":
        args[9] = torch.float64
    places = floats(op, args)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        for place, value in zip(places, inputs, strict=True):
            args[place] = value
        return results(overload(op, "reference")(*args))

    inputs = tuple(args[place].requires_grad_() for place in places)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@every_impl
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_2x_rule(op: str, changes: dict[int, Any], impl: str, dtype: torch.dtype) -> None:
    check(op, impl, case(op, changes, dtype), dtype)


def check(op: str, impl: str, args: list[Any], dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare all gradients with those of the reference in fp64 by the 2x rule."""
    grad, wide = [each.to(dtype) for each in upstream(op, args)], to_fp64(args)
    if op == "embed_norm":
        wide[9] = torch.float64
    found = [
        gradients(op, called(op, impl, device), args, grad),
        gradients(op, getattr(reference, op), wide, grad),
        gradients(op, PEERS[op], args, grad),
    ]
    for ours, expected, peer in zip(*found, strict=True):
        assert_close_to_oracle(ours, expected, peer, dtype)


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize(
    "op", ["varlen_attention", "embed_norm", "add_norm", "bias_gelu", "segment_pool"]
)
def test_cuda_has_gradients(op: str) -> None:
    """Though its ops lack options, which formulas know."""
    args = case(op, {}, torch.float16, dim=32)
    if op == "embed_norm":
        args[9] = torch.float16
    check(op, "cuda", args, torch.float16)


@every_impl
@pytest.mark.parametrize(
    ("op", "changes"), [("varlen_attention", {}), ("varlen_attention", FULL), ("segment_pool", {})]
)
def test_a_sequence_that_is_nan_changes_no_gradient_of_another(
    op: str, changes: dict[int, Any], impl: str
) -> None:
    assert_sequences_are_apart(op, called(op, impl), case(op, changes, torch.float32))


def assert_sequences_are_apart(op: str, function: Callable[..., Any], args: list[Any]) -> None:
    """NaN in a sequence and in the dead tail changes no bit of the gradients of the others."""
    grad = upstream(op, args)
    alone, *_ = gradients(op, function, args, grad)
    start, end = args[1][4], args[1][5]
    poisoned = [args[0].clone(), *args[1:]]
    poisoned[0][start:end] = poisoned[0][args[1][-1] :] = float("nan")
    beside, *_ = gradients(op, function, poisoned, grad)
    others = torch.ones(len(alone), dtype=torch.bool)
    others[start:end] = False
    assert torch.equal(alone[others], beside[others])
    assert not alone[args[1][-1] :].any()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_impl
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_threads(op: str, impl: str) -> None:
    changes = FULL | {17: 0.2} if op == "varlen_attention" else {}
    args = case(op, changes, torch.float32, lengths=(70, 300, 9))
    grad, found = upstream(op, args), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(gradients(op, overload(op, impl), args, grad))
    for few, some, more in zip(*found, strict=True):
        assert torch.equal(few, some) and torch.equal(few, more)


@every_impl
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_traced(op: str, impl: str) -> None:
    args = case(op, FULL if op == "varlen_attention" else {}, torch.float32)
    for place in floats(op, args):
        args[place] = args[place].requires_grad_()
    torch.library.opcheck(overload(op, impl), tuple(args), test_utils="test_aot_dispatch_dynamic")


def test_a_table_sums_tokens_in_their_order() -> None:
    args = embed_args(4000, 16, torch.float32, torch.float32)
    args[6] = args[7] = None
    grad = torch.randn(4000, 16)
    word = gradients("embed_norm", overload("embed_norm", "reference"), args, [grad])[0]
    expected = torch.zeros(50, 16)
    for row, part in zip(args[0].tolist(), grad, strict=True):
        expected[row] += part
    assert torch.equal(word, expected)


def test_only_the_first_of_equal_tokens_is_the_maximum() -> None:
    x = torch.zeros(5, 8, requires_grad=True)
    ops.segment_pool(x, pack_lengths([3, 2]), mode="max", normalize=False).sum().backward()
    assert x.grad is not None and x.grad[:, 0].tolist() == [1, 0, 0, 1, 0]


QKV = torch.zeros(8, 3, 2, 16, requires_grad=True)
CU = pack_lengths((3, 5))
TURNS = torch.zeros(8, 8, requires_grad=True)
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("backward to rotary", {"rotary": (TURNS, TURNS)}),
    (
        "backward with position_keys",
        {"disentangled": (torch.ones(2, 1, 16), None, pack_lengths([]))},
    ),
]


@pytest.mark.parametrize(("what", "options"), REFUSED, ids=str)
def test_what_has_no_gradient_is_refused(what: str, options: dict[str, Any]) -> None:
    out = ops.varlen_attention(QKV, CU, 5, **options)
    with pytest.raises(NotImplementedError, match=f"has no {what} yet"):
        out.sum().backward()
