"""What the README says of stored results: one sentence, and one table of one corpus.

All figures are on the benchmarks page, which `benchmarks.report` writes, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.text import markdown

CORPUS = "mixed"
OURS, REFERENCE = "sbert-fast", "sentence-transformers"
NOT_MEASURED = "«not measured yet»"


def runs(results: Path) -> dict[str, dict[str, Any]]:
    """The stored runs of the corpus on CPUs, by the folder of the device."""
    found = {}
    for path in sorted(results.glob(f"*/{CORPUS}.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["device"].get("kind", "cpu") == "cpu":
            found[path.parent.name] = document
    return found


def sentence(results: Path) -> str:
    """The figure that stands first: of the first device, in all its precisions."""
    for document in runs(results).values():
        rows = {(row["system"], row["precision"]): row for row in document["rows"]}
        told = []
        for precision in dict.fromkeys(precision for _, precision in rows):
            ratio = rows[REFERENCE, precision].get("ratios", {}).get(precision)
            if ratio is not None:
                ours = rows[OURS, precision]["sentences_per_s"]
                theirs = rows[REFERENCE, precision]["sentences_per_s"]
                told.append(f"{ours:,.0f} sentences/s against {theirs:,.0f} in {precision}")
                told[-1] += f" (**{ratio:.2f}x**)"
        if told:
            return (
                f"{' and '.join(told)}: all-MiniLM-L6-v2 on {document['device']['name']}, beside "
                "sentence-transformers in the same precision at its best batch size."
            )
    return NOT_MEASURED


def table(results: Path) -> str:
    """Sentences a second of every system on every device, and where that was measured."""
    found = runs(results)
    if not found:
        return NOT_MEASURED
    columns = [
        (document, precision)
        for document in found.values()
        for precision in dict.fromkeys(row["precision"] for row in document["rows"])
    ]
    names = {id(document): f"({number})" for number, document in enumerate(found.values(), 1)}
    header = ("sentences/s", *(f"{p} {names[id(d)]}" for d, p in columns))
    systems = dict.fromkeys(row["system"] for d in found.values() for row in d["rows"])
    rows = [(system, *(_cell(d, system, p) for d, p in columns)) for system in systems]
    notes = [
        f"{names[id(document)]} {document['device']['name']}; torch {document['versions']['torch']}"
        f"; {document['date'][:10]}; commit {str(document['commit'])[:9]}"
        for document in found.values()
    ]
    return "\n".join([*markdown(header, rows), "", ".\n".join(notes) + "."])


def _cell(document: dict[str, Any], system: str, precision: str) -> str:
    """Sentences a second, and how many times as fast ours is in the same precision."""
    for row in document["rows"]:
        if (row["system"], row["precision"]) == (system, precision):
            if row["status"] != "measured":
                return "not measured"
            ratio = row["ratios"].get(precision)
            rate = f"{row['sentences_per_s']:,.0f}"
            return rate if ratio is None else f"{rate} ({ratio:.2f}x)"
    return "not measured"
