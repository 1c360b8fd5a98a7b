"""Draws the pictures of README and of the benchmarks page from stored results: make plots."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report import RESULTS
from sbert_fast.bench import pictures
from sbert_fast.bench.names import OURS
from sbert_fast.bench.pictures import Point

# Their texts differ in length alone.
CORPORA = ("short", "mixed", "passages")


def draw(folder: Path) -> Path | None:
    """Throughput over the mean length of the corpora that `folder` has results of; None where they
    are fewer than two."""
    files = [path for name in CORPORA if (path := folder / f"{name}.json").is_file()]
    if len(files) < 2:
        return None
    rates: dict[str, dict[str, list[Point]]] = {}
    limits: dict[str, float] = {}
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    for document in documents:
        length = document["corpus"]["lengths"]["mean"]
        for precision, limit in document["linear_layers_alone"].items():
            limits[precision] = max(limit, limits.get(precision, 0.0))
        for row in document["rows"]:
            if row["status"] == "measured":
                systems = rates.setdefault(row["precision"], {})
                systems.setdefault(row["system"], []).append((length, row["tokens_per_s"]))
    # What was measured on one corpus alone shows nothing over lengths.
    rates = {p: systems for p, systems in rates.items() if len(systems[OURS]) > 1}
    title = f"{documents[0]['model']['name']}, {documents[0]['device']['name']}"
    return pictures.throughput(rates, limits, title, folder / "throughput.svg")


def main() -> int:
    """Draw every device whose results allow it."""
    for folder in sorted(RESULTS.iterdir()):
        if (path := draw(folder)) is not None:
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
