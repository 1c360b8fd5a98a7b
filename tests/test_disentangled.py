"""Attention with products of queries and keys with rows of tables of distances: against plain
torch, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from op_cases import BUCKETS, int32, table_of_distances
from sbert_fast import ops
from sbert_fast.testing import pack_lengths


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("terms", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_products_with_rows_of_distances(terms: tuple[bool, bool], kv_heads: int | None) -> None:
    cu, dim, heads, reach = pack_lengths((3, 0, 17, 1, 24)), 16, 4, 9
    tokens, groups = int(cu[-1]), kv_heads or heads
    q, k, v = (randn(tokens, n, dim) for n in (heads, groups, groups))
    qkv = torch.stack((q, k, v), 1) if kv_heads is None else torch.cat((q, k, v), 1)
    tables = [randn(heads, 7, dim) if there else None for there in terms]
    buckets = torch.randint(7, (2 * reach + 1,), dtype=torch.int32)
    out = ops.varlen_attention(
        qkv, cu, 24, scale=0.2, kv_heads=kv_heads, disentangled=(*tables, buckets)
    )
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        for head in range(heads):
            one = [x[start:end, head] for x in (q, k, v)]
            logits = one[0] @ one[1].T
            for i in range(end - start):
                for j in range(end - start):
                    row = buckets[max(-reach, min(j - i, reach)) + reach]
                    if (table := tables[0]) is not None:
                        logits[i, j] += one[0][i] @ table[head, row]
                    if (table := tables[1]) is not None:
                        logits[i, j] += one[1][j] @ table[head, row]
            expected = (logits * 0.2).softmax(1) @ one[2]
            torch.testing.assert_close(out[start:end, head], expected, rtol=1e-10, atol=1e-10)


TABLE = table_of_distances(16)
BAD_TABLES = {
    "disentangled must be a tuple .* or None, got": (TypeError, (TABLE, BUCKETS)),
    "disentangled must have .* got neither": (ValueError, (None, None, BUCKETS)),
    r"disentangled\[0\] must have shape \[2, P, 16\], got \[2, 4, 8\]": (
        ValueError,
        (TABLE[..., :8], TABLE, BUCKETS),
    ),
    r"disentangled\[1\] must have shape \[2, 4, 16\], got \[2, 3, 16\]": (
        ValueError,
        (TABLE, TABLE[:, 1:], BUCKETS),
    ),
    r"disentangled\[1\] must be float32, got float16": (TypeError, (None, TABLE.half(), BUCKETS)),
    r"disentangled\[2\] must be int32, got int64": (TypeError, (TABLE, None, BUCKETS.long())),
    r"disentangled\[2\] must have an odd length 2R \+ 1, got 2": (
        ValueError,
        (TABLE, TABLE, BUCKETS[1:]),
    ),
    r"disentangled\[2\]\[0\] must be in \[0, 3\), the rows of the tables, got 3": (
        ValueError,
        (TABLE[:, 1:].clone(), None, BUCKETS),
    ),
}


@pytest.mark.parametrize("match", BAD_TABLES)
def test_tables_of_distances_that_are_refused(match: str) -> None:
    error, parts = BAD_TABLES[match]
    with pytest.raises(error, match=f"^{match}"):
        ops.varlen_attention(torch.randn(8, 3, 2, 16), int32(0, 8), 8, disentangled=parts)
