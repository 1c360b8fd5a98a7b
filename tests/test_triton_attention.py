"""varlen_attention in Triton, in the interpreter and on a GPU.

The interpreter multiplies bf16 matrices wrongly: bf16 runs on a GPU alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_cases import (
    DEAD_TAIL,
    KINDS,
    RAGGED,
    SHORT,
    TABLE_REACH,
    Attend,
    Case,
    assert_dead_tail_is_zero,
    assert_nan_stays_in_its_sequence,
    assert_neighbours_change_no_bit,
    assert_nothing_to_attend,
    assert_place_changes_no_bit,
    assert_same_bits,
    check,
    sequence_rows,
    tiles_of,
)
from sbert_fast import ops
from sbert_fast.testing import PEERS, assert_close_to_oracle, oracle

kernel = pytest.importorskip("sbert_fast.kernels.varlen_attention")

OP = torch.ops.sbert_fast.varlen_attention.triton
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
TINY = (9, 0, 1, 16, 17, 3, 32, 20, 0)
MANY = tuple(i % 37 for i in range(200))
# What decoders ask of attention: alone, with windows, positions or a bias, and all at once.
DECODERS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 20},
    "one": {"kv_heads": 1},
    "each": {"kv_heads": 2},
    "normed": {"normed": True},
    "turned": {"normed": True, "rotary": True},
    "all": {"causal": True, "kv_heads": 1, "heads": 3, "normed": True, "rotary": True},
    "modernbert": {"rotary": True, "window": 20},
    "gemma": {"kv_heads": 1, "normed": True, "rotary": True, "window": 20},
    "bias": {"causal": True, "kv_heads": 2, "heads": 4, "normed": True, "reach": 9, "window": 40},
}
BOTH = (True, True)
ENCODERS = {
    "encoder": {"reach": 4, "window": 50, "rotary": True},
    "disentangled": {"tables": BOTH},
    "plain": {},
}
MIXTURES = ENCODERS | {"all": DECODERS["all"]}
every_mixture = pytest.mark.parametrize("mixture", MIXTURES)

GPU = [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (HALF, BFLOAT, SINGLE)]
every_dtype, every_place = (
    pytest.mark.parametrize(
        ("triton_device", "dtype"), [*on_cpu, *GPU], ids=str, indirect=["triton_device"]
    )
    # The interpreter is slow: there, what does not depend on the dtype is tried in one.
    for on_cpu in ([("cpu", HALF), ("cpu", SINGLE)], [("cpu", HALF)])
)
every_gpu_dtype = pytest.mark.parametrize(
    ("triton_device", "dtype"), GPU, ids=str, indirect=["triton_device"]
)
on_gpu = pytest.mark.parametrize(
    "triton_device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture(autouse=True)
def poisoned_and_quiet(poisoned: None) -> Iterator[None]:
    """Outputs hold NaN before a kernel runs. So may rows that are not written, and numpy would warn
    of them."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def attend(triton_device: str) -> Attend:
    """The op on `triton_device`, its result back on the host."""

    def run(args: Sequence[Any]) -> Tensor:
        there = [a.to(triton_device) if isinstance(a, Tensor) else a for a in args]
        return OP(*there).cpu()

    return run


@every_dtype
@pytest.mark.parametrize(
    ("dim", "tile"), [(26, None), (32, 128), (64, None), (128, 128), (256, 128)]
)
def test_ragged_lengths(
    attend: Attend, triton_device: str, dim: int, tile: int | None, dtype: torch.dtype
) -> None:
    longest = RAGGED[-2:] if (triton_device, dtype) != ("cpu", SINGLE) else (257,)
    check(Case((*RAGGED[:-2], *(longest if dim == 64 else ())), dim, dtype), attend, tile)


@every_dtype
@pytest.mark.parametrize("dim", [8, 16, 37, 80, 96, 136, 256])
def test_any_head_dim(attend: Attend, dim: int, dtype: torch.dtype) -> None:
    check(Case(TINY, dim, dtype), attend)
    check(Case((5, 70, 20), dim, dtype), attend)


@every_place
@pytest.mark.parametrize("tile", [None, 128])
def test_sequences_that_share_a_program(
    attend: Attend, tile: int | None, dtype: torch.dtype
) -> None:
    check(Case(MANY, 32, dtype, heads=1), attend, tile)
    check(Case(TINY, 32, dtype, heads=12), attend, tile)
    check(Case((1,) * 70, 64, dtype), attend, tile)


@every_place
@pytest.mark.parametrize(("reach", "dim"), [(0, 37), (3, 26), (128, 64)])
def test_relative_bias(attend: Attend, dim: int, reach: int, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 200), dim, dtype, reach=reach), attend)


@every_place
@pytest.mark.parametrize(("window", "dim"), [(0, 26), (1, 64), (20, 37), (64, 128), (1000, 64)])
def test_window(attend: Attend, dim: int, window: int, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 300), dim, dtype, window=window), attend)


@every_place
@pytest.mark.parametrize("dim", [8, 26, 64, 70])
def test_rotary(attend: Attend, dim: int, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 20, 200), dim, dtype, rotary=True), attend)


@every_dtype
def test_all_options_at_once(attend: Attend, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 200), 32, dtype, reach=9, window=40, rotary=True), attend, 128)


@every_dtype
@pytest.mark.parametrize(
    ("dim", "tables"),
    [(26, BOTH), (64, (True, False)), (64, (False, True)), (136, BOTH), (256, BOTH)],
    ids=str,
)
def test_tables_of_distances(
    attend: Attend, tables: tuple[bool, bool], dim: int, dtype: torch.dtype
) -> None:
    check(Case((5, 0, 17, 70), dim, dtype, tables=tables, scale=(3 * dim) ** -0.5), attend)


@every_dtype
@pytest.mark.parametrize("decoder", ["all", "bias"])
def test_tables_of_distances_in_decoders(attend: Attend, decoder: str, dtype: torch.dtype) -> None:
    check(Case((5, 17, 70), 26, dtype, tables=BOTH, **DECODERS[decoder]), attend, 128)


@every_place
def test_rows_of_distances_beyond_a_sequence_reach_nothing(
    attend: Attend, dtype: torch.dtype
) -> None:
    args = Case((5, 20, 40), 32, dtype, tables=BOTH).args()
    tables, buckets, expected = args[-3:-1], args[-1], attend(args)
    for index, length in enumerate((5, 20, 40)):
        used = buckets[TABLE_REACH - length + 1 : TABLE_REACH + length].long()
        for at, table in zip((-3, -2), tables, strict=True):
            args[at] = torch.full_like(table, float("nan"))
            args[at][:, used] = table[:, used]
        rows = sequence_rows(args[1], index)
        assert_same_bits(attend(args)[rows], expected[rows])


@every_place
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders(attend: Attend, decoder: str, dtype: torch.dtype) -> None:
    check(Case((5, 0, 16, 17, 40, 130), 26, dtype, **DECODERS[decoder]), attend, 128)


@every_dtype
@pytest.mark.parametrize("decoder", ["all", "bias"])
def test_decoders_of_wide_heads(attend: Attend, decoder: str, dtype: torch.dtype) -> None:
    check(Case((5, 0, 16, 17, 40, 130), 256, dtype, **DECODERS[decoder]), attend, 128)


@every_dtype
def test_norms_of_heads_without_an_epsilon(attend: Attend, dtype: torch.dtype) -> None:
    """Rows that are not there, beside those that are, are not divided by zero."""
    args = Case((3, 20, 70), 26, dtype, normed=True).args()
    args[:1], args[-1] = [args[0][:-DEAD_TAIL]], 0.0
    expected, peer = oracle("varlen_attention", *args), PEERS["varlen_attention"](*args)
    assert_close_to_oracle(attend(args), expected, peer, dtype)


@every_place
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_any_scale(attend: Attend, scale: float, dtype: torch.dtype) -> None:
    check(Case(SHORT, 26, dtype, scale=scale), attend)
    check(Case(SHORT, 26, dtype, scale=scale, reach=2, window=9), attend)


@every_dtype
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_adversarial_inputs(attend: Attend, kind: str, dtype: torch.dtype) -> None:
    if dtype == HALF and kind in ("huge logits", "outlier channels"):
        return  # beyond what float16 holds, the inputs or the logits of the peer
    check(Case((12, 60, 150), 32, dtype, kind=kind, scale=0.25), attend)


@every_place
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_nothing_to_attend(attend: Attend, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_nothing_to_attend(attend, lengths, dtype)


@every_place
@every_mixture
def test_dead_tail_is_zero_whatever_it_holds(
    attend: Attend, mixture: str, dtype: torch.dtype
) -> None:
    assert_dead_tail_is_zero(attend, Case(SHORT, 38, dtype, **MIXTURES[mixture]).args())


@every_place
@every_mixture
def test_neighbours_change_no_bit(attend: Attend, mixture: str, dtype: torch.dtype) -> None:
    case = Case((5, 0, 16, 30, 33, 100), 26, dtype, **MIXTURES[mixture])
    assert_neighbours_change_no_bit(attend, case.args())


@every_place
@pytest.mark.parametrize(
    ("part", "mixture"), [*((part, "plain") for part in range(3)), (1, "disentangled")]
)
def test_nan_spreads_through_its_own_sequence_only(
    attend: Attend, part: int, mixture: str, dtype: torch.dtype
) -> None:
    assert_nan_stays_in_its_sequence(attend, part, dtype, **MIXTURES[mixture])


@every_place
@every_mixture
def test_place_in_the_batch_changes_no_bit(
    attend: Attend, mixture: str, dtype: torch.dtype
) -> None:
    case = Case((9, 17, 32, *SHORT), 32, dtype, **MIXTURES[mixture])
    assert_place_changes_no_bit(attend, case.args())


@pytest.mark.parametrize(
    ("triton_device", "dtype", "dim"),
    [
        ("cpu", HALF, 32),
        *(pytest.param(*g.values, d, marks=g.marks) for g in GPU for d in (32, 64)),
    ],
    ids=str,
    indirect=["triton_device"],
)
@pytest.mark.parametrize("normed", [False, True])
def test_a_far_longer_neighbour_changes_no_bit(
    attend: Attend, normed: bool, dim: int, dtype: torch.dtype
) -> None:
    """Batches with more than 256 tokens in a sequence have launch parameters of their own."""
    case = Case((40, 257, 140), dim, dtype, heads=1, normed=normed)
    assert_place_changes_no_bit(attend, case.args())


@every_gpu_dtype
@pytest.mark.parametrize("dim", [26, 32, 64, 128, 256])
def test_runs_repeat_bit_for_bit(attend: Attend, dim: int, dtype: torch.dtype) -> None:
    args = Case(tuple(i * 7 % 150 for i in range(600)), dim, dtype, heads=12).args()
    expected = attend(args)
    for _ in range(5):
        assert_same_bits(attend(args), expected)


@every_place
def test_short_sequences_beside_one_beyond_32_bit_offsets(
    attend: Attend, dtype: torch.dtype
) -> None:
    """They run one by one then, and keep their bits."""
    args = Case((*TINY, 40, 7), 32, dtype).args()
    args[-1] = tiles_of(args[1], 64)
    expected = attend(args)
    args[2] = 8_000_000
    (short, *_) = kernel.plan(args[0], args[0], *args[1:4], -1, (None,) * 3, args[-1], (0, 0))
    assert short.options["GROUP"] == 1
    assert_same_bits(attend(args), expected)


@on_gpu
def test_seventy_thousand_sequences_of_one_token(attend: Attend) -> None:
    case = Case((1,) * 70_000, 32, HALF)
    args = case.args()
    assert_same_bits(attend(args)[:-DEAD_TAIL], args[0][:-DEAD_TAIL, 2])
    args[2] = 64
    assert_same_bits(attend(args)[:-DEAD_TAIL], args[0][:-DEAD_TAIL, 2])


@on_gpu
def test_more_than_two_to_the_31_elements(triton_device: str) -> None:
    tokens, heads, dim = 1_000_000, 12, 64
    assert tokens * 3 * heads * dim > 2**31
    qkv = torch.randn(tokens, 3, heads, dim, device=triton_device, dtype=HALF)
    for length in (16, 50, 200):
        cu = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=triton_device)
        out = ops.varlen_attention(qkv, cu, length, impl="triton")
        last = qkv[-length:].clone()
        one = torch.tensor([0, length], dtype=torch.int32, device=triton_device)
        assert_same_bits(out[-length:], ops.varlen_attention(last, one, length, impl="triton"))


@on_gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, TINY, ()], ids=len)
def test_torch_implementation(
    lengths: tuple[int, ...], dtype: torch.dtype, triton_device: str
) -> None:
    def run(args: Sequence[Any]) -> Tensor:
        there = [a.to(triton_device) if isinstance(a, Tensor) else a for a in args]
        return torch.ops.sbert_fast.varlen_attention.torch(*there).cpu()

    check(Case(lengths, 64, dtype), run)
    check(Case(lengths, 26, dtype, reach=3), run)


@on_gpu
@pytest.mark.parametrize("dim", [26, 32, 64, 128])
def test_tf32_where_torch_is_told_so(
    attend: Attend, dim: int, triton_device: str, request: pytest.FixtureRequest
) -> None:
    args = Case((*RAGGED, *TINY), dim, SINGLE).args()
    exact = attend(args)
    request.getfixturevalue("tf32")
    out = attend(args)
    assert not torch.equal(out, exact)
    there = [a.to(triton_device) if isinstance(a, Tensor) else a for a in args]
    peer = PEERS["varlen_attention"](*there).cpu()
    # A tf32 number has the mantissa of a float16, 10 bits.
    assert_close_to_oracle(out, oracle("varlen_attention", *args), peer, HALF)
