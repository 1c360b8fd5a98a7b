"""Rows of results in files of JSON lines, appended one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What an encode row is of; its figures may be stored more than once.
_ENCODE = ("model", "corpus", "texts", "scope", "system", "precision")


def append(path: Path | None, kind: str, line: dict[str, Any]) -> None:
    """Append a line; what was there before stays whole whatever happens.

    Args:
        path: the file, made where it is missing; None keeps nothing.
        kind: "run" (where the rows after it come from), "row" or "error".
        line: its content.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"kind": kind} | line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a file, but for one that was cut short; none where there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def latest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last encode row of every system in the same configuration."""
    return list({tuple(line.get(name) for name in _ENCODE): line for line in lines}.values())
