"""Rows of the table in kernels/triton/tuning.py: what may be tried in their place, and how they are
written back.

Nothing here changes a result: `short` and `block`, which decide about bits, stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import ROOT
from benchmarks.common.storage import write_text
from sbert_fast.kernels.tuning import Attention

TABLE = ROOT / "kernels" / "triton" / "tuning.py"
# Bits of the dtype and width of the head dim: the key of a row.
Key = tuple[int, int]
# Most valuable first: the head dims of MiniLM and of BERT.
BY_VALUE: tuple[Key, ...] = (
    *((16, 32), (16, 64), (16, 128), (16, 256), (16, 16)),
    *((32, 64), (32, 32), (32, 128), (32, 256), (32, 16)),
)
_LINES = (
    ("group", "group_warps", "heads", "head_stages"),
    ("block_q", "warps", "far_block_q", "far_warps"),
    ("stages", "registers"),
)


@dataclass(frozen=True)
class Step:
    """Fields of a row that are tuned together.

    Attributes:
        name: for people.
        fields: names of the fields.
        lengths: what they are timed on, in the words of `benchmarks.ops.cases.lengths_of`.
        values: what the fields may be.
        short: they are those of the short kernel.
    """

    name: str
    fields: tuple[str, ...]
    lengths: tuple[str, ...]
    values: tuple[tuple[int | None, ...], ...]
    short: bool = False

    def inputs(self, row: Attention) -> list[str]:
        """The lengths that this row's kernel computes."""
        longest = row.short if self.short else 512
        return [n for n in self.lengths if not n.isdecimal() or int(n) <= longest]

    def candidates(self, present: Attention, capability: tuple[int, int]) -> list[Attention]:
        """The rows to try in place of `present` on a device of this compute capability."""
        rows = [replace(present, **dict(zip(self.fields, v, strict=True))) for v in self.values]
        # Elsewhere they are not used, and nothing can be learnt about them.
        used = [r for r in rows if capability == (9, 0) or r.registers == present.registers]
        return [row for row in used if row != present]

    def told(self, row: Attention) -> str:
        """The fields of a row in words."""
        return " ".join(f"{name}={getattr(row, name)}" for name in self.fields)


# Half a warp to two warps a sequence.
_GROUPS = tuple(
    (group, warps)
    for group, warps in itertools.product((2, 4, 8), (1, 2, 4, 8))
    if group <= 2 * warps <= 4 * group
)
# 8 to 32 query rows a warp.
_BLOCKS = tuple(
    (rows, warps)
    for rows, warps in itertools.product((32, 64, 128), (2, 4, 8))
    if 8 * warps <= rows <= 32 * warps
)
STEPS = (
    Step("group", ("group", "group_warps"), ("short", "16", "32"), _GROUPS, short=True),
    Step(
        "heads",
        ("heads", "head_stages"),
        ("short", "16", "32"),
        ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2)),
        short=True,
    ),
    Step("block", ("block_q", "warps"), ("64", "mixed", "passages"), _BLOCKS),
    Step("far block", ("far_block_q", "far_warps"), ("512", "uniform"), _BLOCKS),
    Step(
        "pipeline",
        ("stages", "registers"),
        ("64", "mixed", "512"),
        tuple(itertools.product((1, 2, 3, 4), (None, 128, 168))),
    ),
)


def render(key: Key, row: Attention) -> str:
    """The text of a row."""
    start = f"    {key}: Attention("
    lines = [
        ", ".join(
            f"{name}={value}"
            for name in names
            if (value := getattr(row, name)) is not None or name != "registers"
        )
        for names in _LINES
    ]
    return f"{start}{row.short}, {row.block}, " + f",\n{' ' * len(start)}".join(lines) + "),\n"


def write(path: Path, rows: Mapping[Key, Attention]) -> None:
    """Make `rows` the table of tuning.py, whole or not at all.

    Raises:
        ValueError: there is no table where it is expected.
    """
    before, start, rest = path.read_text(encoding="utf-8").partition("# fmt: off\n_ATTENTION = {\n")
    _, end, after = rest.partition("}\n# fmt: on\n")
    if not start or not end:
        raise ValueError(f"{path} must have a table _ATTENTION between its fmt markers")
    write_text(before + start + "".join(render(*row) for row in rows.items()) + end + after, path)
