"""Tables of what was measured on a GPU, and its way from files of rows to stored results.

    python benchmarks/gpu_report.py results-tmp/gpu benchmarks/results/h200

makes one JSON document a benchmark (and model and corpus) of the rows that a check has left.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import provenance
import rows as row_files
from tables import markdown

# Ours: what it chooses (on a GPU, ops in Triton), and its ops in CUDA C++.
OURS, OURS_CUDA = "sbert-fast", "sbert-fast cuda"
COPY = "copy of as many bytes"
# Where a row has the ratios of each of ours.
_RATIOS = {OURS: "ratios", OURS_CUDA: "ratios_cuda"}
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
Row = dict[str, Any]


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
    ratios = [row.get(_RATIOS[each], {}).get(name) for each in ours]
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
        ratio = row.get(_RATIOS[OURS_CUDA], {}).get(OURS)
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
        left += (_SHORT.get(row["dtype"], row["dtype"]), size)
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


def ops(rows: list[Row], short: bool = False) -> list[str]:
    """A row an op and input: microseconds, the fraction of the floor, and ratios to the peers, of
    ours and, where it was measured, of ours in CUDA C++; attention has a table of its own.

    Args:
        rows: measured, or with an `error`.
        short: float16 on cold inputs only.
    """
    if short:
        rows = [r for r in rows if r["state"] == "cold" and r["dtype"] == "float16"]
    attention = [row for row in rows if _op(row) == "varlen_attention"]
    others = [row for row in rows if _op(row) != "varlen_attention"]
    tables = [_op_table(each) for each in (attention, others) if each]
    return [line for i, table in enumerate(tables) for line in ([""] if i else []) + table]


def encode(rows: list[Row]) -> list[str]:
    """A row a scope and system, the last one: rates, the fraction of the GEMM roofline, and
    ratios."""
    header = (
        *("model", "corpus", "scope", "system", "precision", "batch", "sentences/s", "Mtok/s"),
        *("of GEMM", "worst 1-cos"),
    )
    has_cuda = any(_RATIOS[OURS_CUDA] in row for row in rows)
    ours = (OURS, OURS_CUDA) if has_cuda else (OURS,)
    table = []
    for row in row_files.latest(rows):
        left = tuple(str(row.get(k, "")) for k in ("model", "corpus", "scope", "system"))
        left += (row.get("precision", ""),)
        if "tokens_per_s" not in row:
            table.append((*left, row.get("status", row.get("error", ""))[:100]))
            continue
        fraction, loss = row.get("gemm_fraction"), row.get("loss")
        table.append(
            (
                *(*left, str(row["batch"]), f"{row['sentences_per_s']:,.0f}"),
                f"{row['tokens_per_s'] / 1e6:.2f}",
                "" if fraction is None else f"{fraction:.0%}",
                "" if loss is None else f"{loss:.1e}",
                *(", ".join(_encode_ratios(row, each)) for each in ours),
            )
        )
    faster = tuple(f"{name} is faster by" for name in ours)
    return markdown((*header, *faster), table) if table else []


def _encode_ratios(row: Row, ours: str) -> list[str]:
    ratios = row.get(_RATIOS[ours], {})
    return [f"{ratio:.2f}x {_SHORT.get(p, p)}" for p, ratio in ratios.items()]


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


TABLES = {"ops": ops, "encode": encode, "ground": ground}


def render(document: dict[str, Any]) -> str:
    """A stored document as text."""
    versions = ", ".join(f"{n} {v}" for n, v in document["versions"].items() if v)
    lines = [f"{document['device']['name']} | {document['date']} | {versions}", ""]
    return "\n".join([*lines, *TABLES[document["benchmark"]](document["rows"])])


def readme_section(folder: str, documents: list[dict[str, Any]]) -> str:
    """The results of one GPU as README quotes them: encoding, then attention and the other ops.

    Args:
        folder: name of the device's folder in benchmarks/results.
        documents: as :func:`collect` makes them.
    """
    first = documents[0]
    torch, date = first["versions"]["torch"], first["date"][:10]
    commits = ", ".join(dict.fromkeys(str(d["commit"])[:9] for d in documents))
    parts = [
        f"{first['device']['name']}; torch {torch}; {date}; commit {commits} "
        f"(benchmarks/results/{folder})"
    ]
    measured = [r for d in documents if d["benchmark"] == "encode" for r in d["rows"]]
    parts.append("\n".join(encode(measured)))
    measured = [r for d in documents if d["benchmark"] == "ops" for r in d["rows"]]
    parts.append("\n".join(ops(measured, short=True)))
    return "\n\n".join(filter(None, parts))


def collect(folder: Path) -> dict[str, dict[str, Any]]:
    """Documents, by name, of the rows in a folder: those that the newest sources have made."""
    documents: dict[str, dict[str, Any]] = {}
    for benchmark in TABLES:
        lines = row_files.read(folder / f"{benchmark}.jsonl")
        runs = [line for line in lines if line["kind"] == "run"]
        run: dict[str, Any] = {}
        for line in lines:
            if line["kind"] == "run":
                run = line
            elif run.get("source_sha256") == runs[-1]["source_sha256"]:
                name = benchmark
                if benchmark == "encode":
                    name = f"encode-{line['model']}-{line['corpus']}"
                document = documents.setdefault(name, _head(run, benchmark))
                document["rows"].append({k: v for k, v in line.items() if k != "kind"})
                if benchmark == "encode":
                    document["rows"] = row_files.latest(document["rows"])
    return documents


def _head(run: dict[str, Any], benchmark: str) -> dict[str, Any]:
    head = {k: v for k, v in run.items() if k != "kind"}
    # A tree without its repository does not know its commit; the same sources have the same.
    if head["commit"] is None and head["source_sha256"] == provenance.source_hash(
        kind=head["device"]["kind"]
    ):
        head["commit"] = provenance.commit()
    return head | {"benchmark": benchmark, "rows": []}


def main(arguments: list[str]) -> int:
    """Store the rows of a check as results."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    documents = collect(Path(arguments[0]))
    for name, document in documents.items():
        path = Path(arguments[1], f"{name}.json")
        provenance.write_json(document, path)
        print(f"{path}: {len(document['rows'])} rows")
    return 0 if documents else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
