"""varlen_attention in C++ on every instruction set of this CPU: figures, isolation, determinism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import attention_cases
from attention_cases import (
    DEAD_TAIL,
    HEADS,
    KINDS,
    RAGGED,
    SHORT,
    Case,
    assert_same_bits,
    sequence_rows,
)
from guarded import before_a_guard
from instruction_sets import EMULATED_TILES, OF_FLOATS
from sbert_fast.ops import extension
from sbert_fast.testing import pack_lengths

OPS = torch.ops.sbert_fast
ISAS = OF_FLOATS + EMULATED_TILES
DTYPES = [torch.float32, torch.bfloat16]
DIMS = (8, 26, 32, 37, 64, 80, 96, 128, 136, 256)
NEITHER, BOTH = (False, False), (True, True)

pytestmark = [
    pytest.mark.skipif(not extension.CPU.available, reason=str(extension.CPU.reason)),
    pytest.mark.usefixtures("poisoned_memory"),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The first decorator of a test, and so the parameter that varies fastest: the figures that a result
# is compared with are computed once for all instruction sets.
every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


def attention(args: Sequence[Any]) -> Tensor:
    return OPS.varlen_attention.cpu(*args)


def check(case: Case) -> None:
    attention_cases.check(case, attention)


@every_isa
@every_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_ragged_lengths(isa: str, dim: int, dtype: torch.dtype) -> None:
    check(Case(RAGGED, dim, dtype))


@every_isa
@every_dtype
@pytest.mark.parametrize(("reach", "dim"), [(0, 37), (3, 26), (3, 128), (128, 64)])
def test_relative_bias(isa: str, dim: int, reach: int, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 300), dim, dtype, reach=reach))


@every_isa
@every_dtype
@pytest.mark.parametrize(("window", "dim"), [(0, 26), (1, 64), (20, 37), (64, 128), (1000, 64)])
def test_window(isa: str, dim: int, window: int, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 500), dim, dtype, window=window))


@every_isa
@every_dtype
@pytest.mark.parametrize("dim", [8, 26, 32, 64, 70, 128])
def test_rotary(isa: str, dim: int, dtype: torch.dtype) -> None:
    check(Case((*SHORT, 300), dim, dtype, rotary=True))


@every_isa
@every_dtype
@pytest.mark.parametrize("dim", [26, 64, 256])
@pytest.mark.parametrize("heads", [(6, 0), (6, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_causal_and_grouped_heads(
    isa: str, causal: bool, heads: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    lengths = (*SHORT, 300) if dim < 256 else (5, 0, 33, 140)
    check(Case(lengths, dim, dtype, heads=heads[0], kv_heads=heads[1], causal=causal))


@every_isa
@every_dtype
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("dim", [8, 26, 64, 128, 256])
def test_norm_of_heads(isa: str, dim: int, rotary: bool, dtype: torch.dtype) -> None:
    check(Case(SHORT, dim, dtype, rotary=rotary, normed=True))


@every_isa
@every_dtype
@pytest.mark.parametrize("dim", [8, 26, 37, 64, 136, 256])
@pytest.mark.parametrize("tables", [BOTH, (True, False), (False, True)], ids=str)
def test_tables_of_distances(
    isa: str, tables: tuple[bool, bool], dim: int, dtype: torch.dtype
) -> None:
    check(Case((*SHORT, 300), dim, dtype, tables=tables, scale=(3 * dim) ** -0.5))


@every_isa
@every_dtype
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reach": None},  # as ModernBERT
        {"reach": None, "dim": 256, "kv_heads": 1, "normed": True},  # as Gemma 3
        {"causal": True},
        {"kv_heads": 1},
        {"causal": True, "kv_heads": 2, "normed": True},
        {"causal": True, "kv_heads": 1, "normed": True, "tables": BOTH},
    ],
    ids=str,
)
def test_options_together(isa: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    how = {"dim": 32, "reach": 9} | options
    check(Case((*SHORT, 300), dtype=dtype, window=40, rotary=True, **how))


@every_isa
@every_dtype
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_any_scale(isa: str, scale: float, dtype: torch.dtype) -> None:
    check(Case(SHORT, 26, dtype, scale=scale))
    check(Case(SHORT, 26, dtype, scale=scale, reach=2, window=9))


@every_isa
@every_dtype
@pytest.mark.parametrize("lengths", [(8192,), tuple(i % 24 for i in range(3000))], ids=len)
def test_one_long_and_thousands_of_short(
    isa: str, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    if isa == "generic_tiles" and lengths == (8192,):
        lengths = (2048,)  # what stands in for tiles is slow
    check(Case(lengths, 32, dtype, heads=1))


@every_isa
@pytest.mark.parametrize(("dim", "lengths"), [(64, (1100, 3)), (256, (700, 3))], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 40},
        {"window": 500, "reach": 30},
        {"causal": True, "kv_heads": 1, "rotary": True, "normed": True},
        {"scale": 20.0},
    ],
    ids=str,
)
def test_more_keys_than_panels_hold(
    isa: str, options: dict[str, Any], dim: int, lengths: tuple[int, ...]
) -> None:
    check(Case(lengths, dim, torch.bfloat16, **options))


@every_isa
@every_dtype
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_nothing_to_attend(isa: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    out = attention(Case(lengths, 32, dtype).args())
    assert_same_bits(out, torch.zeros(DEAD_TAIL, HEADS, 32, dtype=dtype))


@every_isa
@every_dtype
def test_dead_tail_is_zero_whatever_it_holds(isa: str, dtype: torch.dtype) -> None:
    args = Case(SHORT, 37, dtype).args()
    expected = attention(args)
    args[0][-DEAD_TAIL:] = float("nan")
    out = attention(args)
    assert_same_bits(out, expected)
    assert_same_bits(out[-DEAD_TAIL:], torch.zeros_like(out[-DEAD_TAIL:]))


@every_isa
@every_dtype
@pytest.mark.parametrize("dim", [26, 64])
@pytest.mark.parametrize("tables", [NEITHER, BOTH], ids=str)
def test_neighbours_change_no_bit(
    isa: str, tables: tuple[bool, bool], dim: int, dtype: torch.dtype
) -> None:
    """NaN in every other sequence, in the dead tail and in the other head reaches nothing."""
    args = Case(SHORT, dim, dtype, reach=4, window=50, rotary=True, tables=tables).args()
    qkv, cu_seqlens, cos, sin = args[0], args[1], args[6], args[7]
    expected = attention(args)
    for index in range(len(SHORT)):
        rows = sequence_rows(cu_seqlens, index)
        for position, tensor in ((0, qkv), (6, cos), (7, sin)):
            args[position] = torch.full_like(tensor, float("nan"))
            args[position][rows] = tensor[rows]
        assert_same_bits(attention(args)[rows], expected[rows])
        args[0][:, :, 1] = float("nan")
        assert_same_bits(attention(args)[rows, 0], expected[rows, 0])


@every_isa
@every_dtype
@pytest.mark.parametrize("tables", [NEITHER, BOTH], ids=str)
def test_nan_spreads_through_its_own_sequence_only(
    isa: str, tables: tuple[bool, bool], dtype: torch.dtype
) -> None:
    args = Case((20, 140, 20), 32, dtype, tables=tables).args()
    args[0][50, 1, 0] = float("nan")  # one key of one head
    expected = torch.zeros(180 + DEAD_TAIL, HEADS, 32, dtype=torch.bool)
    expected[20:160, 0] = True
    assert torch.equal(attention(args).isnan(), expected)


@every_isa
@every_dtype
@pytest.mark.parametrize("dim", [32, 37])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 30}, {"causal": True, "kv_heads": 1, "normed": True}, {"tables": BOTH}],
    ids=str,
)
def test_place_in_the_batch_changes_no_bit(
    isa: str, options: dict[str, Any], dim: int, dtype: torch.dtype
) -> None:
    """Permuted or alone, a sequence keeps its bits."""
    args = Case((*SHORT, 300), dim, dtype, reach=7, rotary=dim % 2 == 0, **options).args()
    cu_seqlens, by_row = args[1], {i: args[i] for i in (0, 6, 7) if args[i] is not None}
    expected = attention(args)
    pieces = [sequence_rows(cu_seqlens, index) for index in range(len(SHORT) + 1)]
    order = torch.randperm(len(pieces)).tolist()
    rows = torch.cat([torch.arange(pieces[i].start, pieces[i].stop) for i in order])
    for place, values in by_row.items():
        args[place] = values[rows]
    args[1] = pack_lengths([pieces[i].stop - pieces[i].start for i in order])
    assert_same_bits(attention(args), expected[rows])
    for piece in pieces:
        for place, values in by_row.items():
            args[place] = values[piece].clone()
        args[1] = pack_lengths([piece.stop - piece.start])
        assert_same_bits(attention(args), expected[piece])


@every_isa
@pytest.mark.parametrize("kind", ["one key above", "one key below", "huge logits"])
@pytest.mark.parametrize("lengths", [(80,), (300,), (100, 300, 5, 16)], ids=str)
def test_extreme_scores_change_no_bit_elsewhere(
    isa: str, lengths: tuple[int, ...], kind: str
) -> None:
    """Tiles shift the scores of a row only where its weights are out of reach without."""
    extreme = Case(lengths, 32, torch.bfloat16, kind=kind, scale=0.25).args()[0][: sum(lengths)]
    args = Case((*SHORT, *lengths, *SHORT), 32, torch.bfloat16, scale=0.25).args()
    rows = slice(sum(SHORT), sum(SHORT) + sum(lengths))
    expected = attention(args)
    args[0][rows] = extreme
    out = attention(args)
    assert_same_bits(out[: rows.start], expected[: rows.start])
    assert_same_bits(out[rows.stop :], expected[rows.stop :])
    args[0], args[1] = extreme, pack_lengths(lengths)
    assert_same_bits(attention(args), out[rows])


@every_isa
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_stays_in_its_rows_or_its_sequence(isa: str, part: int) -> None:
    attention_cases.assert_nan_stays_in_its_sequence(attention, part, torch.bfloat16)


@pytest.mark.skipif("amx_bf16" not in ISAS, reason="this CPU has no tiles, or may not use them")
@pytest.mark.parametrize("isa", ["amx_bf16"], indirect=True)
@pytest.mark.parametrize("dim", [32, 64, 96, 256])
@pytest.mark.parametrize(
    "options",
    [{}, {"reach": 9, "window": 40}, {"causal": True, "kv_heads": 1}, {"scale": 20.0}],
    ids=str,
)
def test_what_stands_in_for_tiles_gives_their_bits(
    isa: str, options: dict[str, Any], dim: int
) -> None:
    args = Case((6, 16, 33, 64, 140, 300), dim, torch.bfloat16, **options).args()
    tiles = attention(args)
    OPS.set_cpu_isa("generic_tiles")
    assert_same_bits(attention(args), tiles)


@every_isa
@every_dtype
def test_threads_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    for lengths, tables in (((3000,), NEITHER), ((1, 40, 0, 7) * 200, BOTH)):
        args = Case(lengths, 16, dtype, tables=tables).args()
        try:
            torch.set_num_threads(1)
            expected = attention(args)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert_same_bits(attention(args), expected)
        finally:
            torch.set_num_threads(threads)


@every_isa
@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_inputs(isa: str, kind: str, dtype: torch.dtype) -> None:
    for lengths in ((60, 300), (600,)):
        check(Case(lengths, 32, dtype, kind=kind, scale=0.25))


@every_isa
@every_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_reads_end_with_the_last_element(isa: str, dim: int, dtype: torch.dtype) -> None:
    lengths = (3, 17, 130)
    case = Case(lengths, dim, dtype, reach=2, rotary=dim % 2 == 0, normed=True, tables=BOTH)
    args = case.args()
    for position in (0, 6, 7):  # no dead tail behind the last sequence
        args[position] = None if args[position] is None else args[position][: sum(lengths)]
    expected = attention(args)
    for position in (0, 4, 6, 7, 11, 12, 14, 15, 16):
        args[position] = None if args[position] is None else before_a_guard(args[position])
    assert_same_bits(attention(args), expected)
