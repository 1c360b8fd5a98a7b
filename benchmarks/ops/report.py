"""Tables of the op benchmarks, and of what the hardware does alone."""

from __future__ import annotations

from benchmarks.common.names import COPY, OURS, OURS_CUDA, RATIOS, SHORT
from benchmarks.common.results import Row
from benchmarks.common.text import markdown


def _us(figures: Row) -> str:
    us = figures["us"]
    return f"{us:.{0 if us >= 1000 else 1}f}" + (" !" if figures.get("wrong") else "")


def _ours_cells(figures: Row) -> tuple[str, str]:
    """Microseconds and the fraction of the floor."""
    if "us" not in figures:
        return "ERROR" if "error" in figures else "", ""
    bound = " (launches)" if figures["launch_bound"] else ""
    return _us(figures) + bound, f"{figures['floor_fraction']:.0%}"


def _peer_cell(row: Row, name: str, ours: tuple[str, ...]) -> str:
    """Microseconds, and how many times faster each of `ours` is."""
    figures = row["systems"].get(name)
    if figures is None or "us" not in figures:
        return "" if figures is None else "error"
    ratios = [row.get(RATIOS[each], {}).get(name) for each in ours]
    if name == COPY or ratios == [None] * len(ratios):
        return _us(figures)
    return f"{_us(figures)} ({' '.join('-' if r is None else f'{r:.2f}x' for r in ratios)})"


def _op_cells(row: Row, ours: tuple[str, ...], peers: list[str]) -> tuple[str, ...]:
    systems = row.get("systems", {})
    found = [systems.get(name, {}) for name in ours]
    if not any("us" in figures for figures in found):
        return (f"ERROR {found[0].get('error', row.get('error', 'no figures'))[:60]}",)
    cells = [cell for figures in found for cell in _ours_cells(figures)]
    if OURS_CUDA in ours:
        ratio = row.get(RATIOS[OURS_CUDA], {}).get(OURS)
        cells.append("" if ratio is None else f"{ratio:.2f}x")
    cells += [_peer_cell(row, name, ours) for name in peers]
    return ("yes" if row["ok"] else "NO", *cells)


def _op_table(rows: list[Row]) -> list[str]:
    """A table of ops with the same peers, and what there is to say of it."""
    every = [(n, figures) for row in rows for n, figures in row.get("systems", {}).items()]
    ran = dict.fromkeys(name for name, figures in every if "us" in figures)
    tried = {name for name, figures in every if "missing" not in figures}
    ours = (OURS, OURS_CUDA) if OURS_CUDA in tried else (OURS,)
    peers = [name for name in ran if name not in ours]
    header = ("op", "lengths", "state", "dtype", "size", "correct", "us", "of floor")
    header += ("cuda us", "of floor", "cuda is") if OURS_CUDA in ours else ()
    table = []
    for row in rows:
        size = f"D={row['dim']}" if "dim" in row else f"E={row.get('width')}"
        left = (_op(row).removeprefix("varlen_"), row["lengths"], row["state"])
        left += (SHORT.get(row["dtype"], row["dtype"]), size)
        table.append((*left, *_op_cells(row, ours, peers)))
    told = {
        f"{name}: {'not measured' if 'missing' in figures else 'error'}: {why}": None
        for name, figures in every
        if (why := figures.get("missing") or figures.get("error"))
        and (name not in ran or name in ours)
    }
    legend = [f"In brackets: how many times faster {' and '.join(ours)} is."] if peers else []
    header += tuple("copy" if name == COPY else name for name in peers)
    return [*markdown(header, table), "", *legend, *told]


def _op(row: Row) -> str:
    return row.get("op", "varlen_attention")


def table(rows: list[Row], short: bool = False) -> list[str]:
    """A row an op and input: microseconds, the fraction of the floor, and ratios to the peers, of
    ours and, where it was measured, of ours in CUDA C++; attention has a table of its own. Where
    `short`, float16 on cold inputs only."""
    if short:
        rows = [r for r in rows if r["state"] == "cold" and r["dtype"] == "float16"]
    attention = [row for row in rows if _op(row) == "varlen_attention"]
    others = [row for row in rows if _op(row) != "varlen_attention"]
    tables = [_op_table(each) for each in (attention, others) if each]
    return [line for i, table in enumerate(tables) for line in ([""] if i else []) + table]


def ground(rows: list[Row]) -> list[str]:
    """What the hardware and the peers do alone."""
    header = ("what", "which", "figure", "unit")
    table = []
    for row in rows:
        if "value" in row:
            figure = f"{row['value']:,.4g}"
        else:
            figure = f"error: {row.get('error', '')[:80]}"
        table.append((row.get("what", ""), row.get("which", ""), figure, row.get("unit", "")))
    return markdown(header, table) if table else []
