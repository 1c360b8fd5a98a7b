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

OURS = "sbert-fast"
Row = dict[str, Any]


def _cell(figures: Row | None, ratio: float | None) -> str:
    if figures is None:
        return ""
    if "error" in figures:
        return "error"
    text = f"{figures['us']:.1f}" + (" !" if figures.get("wrong") else "")
    return text + (f" ({ratio:.2f}x)" if ratio is not None else "")


def ops(rows: list[Row], short: bool = False) -> list[str]:
    """A row an op and input: microseconds, the fraction of the floor, and ratios to the peers.

    Args:
        rows: measured, or with an `error`.
        short: float16 on cold inputs only.
    """
    names = dict.fromkeys(n for r in rows for n in r.get("systems", ()) if n != OURS)
    header = ("op", "lengths", "state", "dtype", "size", "correct", "us", "of floor", "Mtok/s")
    table = []
    for row in rows:
        if short and (row["state"] != "cold" or row["dtype"] != "float16"):
            continue
        size = f"D={row['dim']}" if "dim" in row else f"E={row.get('width')}"
        op = row.get("op", "varlen_attention")
        left = (op, row["lengths"], row["state"], row["dtype"], size)
        ours = row.get("systems", {}).get(OURS, {"error": row.get("error", "no figures")})
        if "error" in ours:
            table.append((*left, f"ERROR {ours['error'][:60]}"))
            continue
        cells = [_cell(row["systems"].get(n), row["ratios"].get(n)) for n in names]
        bound = " (launches)" if ours["launch_bound"] else ""
        table.append(
            (
                *(*left, "yes" if row["ok"] else "NO", f"{ours['us']:.1f}{bound}"),
                *(f"{ours['floor_fraction']:.0%}", f"{ours['tokens_per_s'] / 1e6:.0f}", *cells),
            )
        )
    return markdown((*header, *names), table) if table else []


def encode(rows: list[Row]) -> list[str]:
    """A row a scope and system: rates, the fraction of the GEMM roofline, and ratios."""
    header = (
        *("model", "corpus", "scope", "system", "precision", "batch", "sentences/s", "Mtok/s"),
        *("of GEMM", "worst 1-cos", "ours is faster by"),
    )
    table = []
    for row in rows:
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
                ", ".join(f"{r:.2f}x ({p})" for p, r in row.get("ratios", {}).items()),
            )
        )
    return markdown(header, table) if table else []


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
