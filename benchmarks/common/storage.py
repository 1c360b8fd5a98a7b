"""Files of results: documents in JSON, and rows in JSON lines, appended one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sbert_fast.cli.files import atomic_file

Record = dict[str, Any]

# What an encode row is of; its figures may be stored more than once.
_ENCODE = ("model", "corpus", "texts", "scope", "system", "precision")


def write_json(document: Record, path: Path) -> None:
    """Write a document, see :func:`write_text`; ValueError where it holds NaN or infinity."""
    write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text so that `path` holds either all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, overwrite=True) as stream:
        stream.write(text.encode())


def append(path: Path | None, kind: str, line: Record) -> None:
    """Append a line of a `kind`: "run" (where the rows after it come from), "row" or "error".

    What was there before stays whole whatever happens; where `path` is None nothing is kept.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"kind": kind} | line) + "\n")


def read(path: Path) -> list[Record]:
    """All lines of a file, but for one that was cut short; none where there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def latest(lines: Iterable[Record]) -> list[Record]:
    """The last encode row of every system in the same configuration."""
    return list({tuple(line.get(name) for name in _ENCODE): line for line in lines}.values())
