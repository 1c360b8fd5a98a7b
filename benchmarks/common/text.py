"""What people read: names as they stand in results, progress, errors in a line, tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence

OURS, OURS_CUDA = "sbert-fast", "sbert-fast cuda"
REFERENCE, UNPADDED, COMPILED = "sentence-transformers", "st-unpadded", "torch-compile"
PEERS = (REFERENCE, "onnxruntime", "openvino", "zentorch", COMPILED)
PRECISIONS = ("float32", "bfloat16", "int8")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Where a row has the ratios of each of ours.
RATIOS = {OURS: "ratios", OURS_CUDA: "ratios_cuda"}
COPY = "copy of as many bytes"


def say(text: str) -> None:
    """Tell what is going on, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def message(error: BaseException) -> str:
    """An exception in one line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:160]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns; short rows are filled up with empty cells."""
    # A status may run past its column: only complete rows decide the widths.
    complete = [header, *(row for row in rows if len(row) == len(header))]
    widths = [max(map(len, column)) for column in zip(*complete, strict=True)]
    full = (header, ["-" * width for width in widths], *rows)
    padded = ([*row, *[""] * (len(header) - len(row))] for row in full)
    return [
        f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in padded
    ]
