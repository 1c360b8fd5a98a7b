"""Tables in Markdown."""

from __future__ import annotations


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table with aligned columns; short rows are filled up with empty cells."""
    full = [row + ("",) * (len(header) - len(row)) for row in rows]
    # A status may run past its column: only complete rows decide the widths.
    complete = [header, *(row for row in rows if len(row) == len(header))]
    widths = [max(len(row[i]) for row in complete) for i in range(len(header))]
    rule = tuple("-" * width for width in widths)
    return [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in (header, rule, *full)
    ]
