"""What tests of runs over corpora share: inputs of every format, and what a folder holds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

LINES = ["red", "The cat sits.", "", "naïve café, 日本語", "a\u2028b\x85c", ' "quoted", ', "x"]
TEXTS = [*LINES, "two\nlines", "a\rb", "tab\there"]


def write_input(path: str, texts: list[str], extra: bool = False) -> None:
    """A file of the format and compression that its name says; `extra` gives every row an id."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        columns: dict[str, Any] = {"id": list(range(len(texts)))} if extra else {}
        pq.write_table(pa.table(columns | {"text": texts}), path, row_group_size=7)
        return
    if name.endswith(".txt"):
        content = "".join(text + "\n" for text in texts)
    elif name.endswith(".jsonl"):
        records = [({"id": i} if extra else {}) | {"text": text} for i, text in enumerate(texts)]
        content = "".join(json.dumps(record) + "\n" for record in records)
    else:
        separator = "," if name.endswith(".csv") else "\t"
        rows = [("id", "text"), *((str(i), text) for i, text in enumerate(texts))]
        quoted = (['"' + value.replace('"', '""') + '"' for value in row] for row in rows)
        content = "".join(separator.join(row) + "\r\n" for row in quoted)
    if path.endswith(".gz"):
        Path(path).write_bytes(gzip.compress(content.encode()))
    elif path.endswith(".zst"):
        Path(path).write_bytes(pa.Codec("zstd").compress(content.encode(), asbytes=True))
    else:
        Path(path).write_bytes(content.encode())


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.name != ".lock"}


def stored(folder: str | Path) -> pa.Table:
    """All rows of the parts, in order."""
    return pa.concat_tables(pq.read_table(path) for path in sorted(Path(folder).glob("part-*")))


def vectors(table: pa.Table) -> NDArray[Any]:
    rows = table["embedding"].combine_chunks()
    return np.asarray(rows.flatten()).reshape(-1, rows.type.list_size)
