"""Draws the pictures of README and of the benchmarks page from stored results: make plots."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report import RESULTS
from sbert_fast.bench import pictures


def draw(folder: Path) -> list[Path]:
    """The pictures of the run in `folder` that timed lengths and single calls; none where no run
    did both."""
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("by_length") and document.get("latency"):
            return pictures.draw(document, folder)
    return []


def main() -> int:
    """Draw every device whose results allow it."""
    for folder in sorted(RESULTS.iterdir()):
        for path in draw(folder):
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
