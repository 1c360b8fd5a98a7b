"""Results of the benchmarks: how they are stored and shown.

    python -m benchmarks.report benchmarks/results/cpu-zen4/*.json  # their tables
    python -m benchmarks.report --readme [--check]
    python -m benchmarks.report --collect results-tmp/gpu benchmarks/results/h200

--readme puts them between the marks of README.md (a sentence, a table) and of benchmarks/README.md
(all of them), or fails where that would change a page; --collect makes documents of the rows that a
check on a GPU has left. What was measured on other sources is said to be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.common import pages, storage
from benchmarks.common.options import plain_parser
from benchmarks.common.provenance import commit, source_hash
from sbert_fast.bench.names import OURS, REFERENCE
from sbert_fast.bench.tables import Document, asides, encode_on_cpu

RESULTS = ROOT / "benchmarks" / "results"
HEADLINE_CORPUS = "mixed"
NOT_MEASURED = "not measured yet"
OLDER = "Measured on an older commit."
# Benchmarks on a GPU, whose documents are rows.
TABLES = {"ops": pages.ops, "encode": pages.encode_on_gpu, "ground": pages.ground}
ON_CPU = {
    "breakdown": pages.breakdown,
    "checks": pages.comparison,
    "rerank": pages.rerank,
    "training": pages.trainings,
}


def load(path: Path) -> Document:
    return json.loads(path.read_text(encoding="utf-8"))


def render(document: Document) -> str:
    """The document as text."""
    if document["benchmark"] in ON_CPU:
        return ON_CPU[document["benchmark"]](document)
    if "gates" in document:
        return encode_on_cpu(document)
    versions = ", ".join(f"{n} {v}" for n, v in document["versions"].items() if v)
    head = f"{document['device']['name']} | {document['date']} | {versions}"
    return "\n".join([head, "", *TABLES[document["benchmark"]](document["rows"])])


def is_current(document: Document) -> bool:
    """Whether it was measured from the sources as they are."""
    return document["source_sha256"] == source_hash(kind=document["device"]["kind"])


def _origin(documents: Sequence[Document], of: str = "") -> str:
    """The device, what the figures are `of`, and torch, date and commits of some results."""
    first = documents[0]
    told = (first["device"]["name"], of, f"torch {first['versions']['torch']}", first["date"][:10])
    commits = ", ".join(dict.fromkeys(_short(d["commit"]) for d in documents))
    return "; ".join((*filter(None, told), f"commit {commits}"))


def _short(commit: object) -> str:
    """A commit in nine digits; "+" where the tree held more than that."""
    return str(commit)[:9] + "+" * str(commit).endswith("+")


def _aside(document: Document) -> str:
    """What the page tells of a run that has no table."""
    kind = document["benchmark"]
    if kind == "checks":
        return f"What the comparison of every call costs: {pages.comparison(document)}."
    rows, name = document["rows"], document["corpus"]["name"]
    if kind == "breakdown":
        return f"Where the time goes, {name}: {'. '.join(map(pages.shares, rows))}."
    if kind == "training":
        batch = f"{document['batch_pairs']} pairs of {name} text"
        of = "a cross-encoder, " if document.get("task") == "scores" else ""
        return f"Fine-tuning, {of}batches of {batch}: {'; '.join(map(pages.training, rows))}."
    pairs = document["settings"]["texts"]
    return f"Reranking {pairs} {name} of one query: {'; '.join(map(pages.reranking, rows))}."


def _cpu_section(folder: str, documents: list[Document], others: list[Document]) -> str:
    """The results of one CPU, stored in `folder` of benchmarks/results, as README quotes them."""

    def label(document: Document, precision: str) -> str:
        corpus = document["corpus"]
        return f"{corpus['name']} ({corpus['lengths']['mean']:.0f} tokens), {precision}"

    told = _origin([*documents, *others], documents[0]["model"]["name"])
    told_beside = [*asides(documents), *map(_aside, others)]
    first = f"{told} (benchmarks/results/{folder})"
    parts = (first, "\n".join(pages.systems(documents, label)), "\n".join(told_beside))
    return "\n\n".join(filter(None, parts))


def _gpu_section(folder: str, documents: list[Document]) -> str:
    """The results of one GPU as README quotes them: encoding, then attention and the other ops."""

    def rows(benchmark: str) -> list[storage.Record]:
        return [r for d in documents if d["benchmark"] == benchmark for r in d["rows"]]

    parts = [
        f"{_origin(documents)} (benchmarks/results/{folder})",
        "\n".join(pages.encode_on_gpu(rows("encode"))),
        "\n".join(pages.ops(rows("ops"), short=True)),
    ]
    return "\n\n".join(filter(None, parts))


def _headline_runs(stored: Path) -> list[Document]:
    """The runs of the corpus that README shows, on CPUs."""
    documents = map(load, sorted(stored.glob(f"*/{HEADLINE_CORPUS}.json")))
    return [d for d in documents if d["device"].get("kind", "cpu") == "cpu"]


def headline(stored: Path) -> str:
    """The sentence that stands first in README: a figure of the first device and precision."""
    for document in _headline_runs(stored):
        rows = {(row["system"], row["precision"]): row for row in document["rows"]}
        for precision in dict.fromkeys(precision for _, precision in rows):
            ours, peer = rows[OURS, precision], rows[REFERENCE, precision]
            if (ratio := peer.get("ratios", {}).get(precision)) is not None:
                return (
                    f"{ours['sentences_per_s']:,.0f} sentences/s against "
                    f"{peer['sentences_per_s']:,.0f} in {precision} (**{ratio:.2f}x**): "
                    f"all-MiniLM-L6-v2 on {document['device']['name']}, beside "
                    "sentence-transformers at its best batch size."
                )
    return NOT_MEASURED


def headline_table(stored: Path) -> str:
    """README's table: every system on every CPU, and below it where that was measured."""
    documents = _headline_runs(stored)
    if not documents:
        return NOT_MEASURED

    def label(document: Document, precision: str) -> str:
        return f"{precision} ({documents.index(document) + 1})"

    notes = [f"({i}) {_origin([d])}" for i, d in enumerate(documents, 1)]
    table = pages.systems(documents, label, brief=True)
    return "\n".join([*table, "", ".\n".join(notes) + "."])


def readme_figures(stored: Path = RESULTS) -> str:
    """What the benchmarks page shows: every stored result, or that there is none."""
    sections = []
    for folder in sorted(path for path in stored.glob("*") if path.is_dir()):
        documents = [load(path) for path in sorted(folder.glob("*.json"))]
        others = [d for d in documents if d.get("benchmark") in ON_CPU]
        runs = [document for document in documents if document not in others]
        if any("gates" not in document for document in runs):
            sections.append(_gpu_section(folder.name, runs))
            continue
        for model in dict.fromkeys(d["model"]["name"] for d in runs):
            own = [[d for d in kind if d["model"]["name"] == model] for kind in (runs, others)]
            sections.append(_cpu_section(folder.name, *own))
    return "\n\n".join(sections) or NOT_MEASURED


# Between which marks of a page stand which figures.
PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"headline": headline, "table": headline_table},
    "benchmarks/README.md": {"figures": readme_figures},
}


def write_pages(root: Path = ROOT, *, check: bool = False) -> bool:
    """Put the stored results between the marks of the pages, unless told to `check` only; whether
    they were there already.

    Raises:
        ValueError: a mark is missing.
    """
    stored = root / "benchmarks" / "results"
    current = all(is_current(load(path)) for path in stored.glob("*/*.json"))
    stale = "" if current else f"\n\n{OLDER}"
    same = True
    for page, parts in PAGES.items():
        text = (root / page).read_text(encoding="utf-8")
        for name, figures in parts.items():
            marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
            if not all(text.count(mark) == 1 for mark in marks):
                raise ValueError(f"{page} must hold the marks {' and '.join(marks)}")
            before, _, rest = text.partition(marks[0])
            shown, _, after = rest.partition(marks[1])
            found = figures(stored)
            same &= shown.replace(OLDER, "").strip() == found
            note = stale.replace("\n\n", " ") if name == "headline" else stale
            text = f"{before}{marks[0]}\n{found}{note}\n{marks[1]}{after}"
        if not check:
            (root / page).write_text(text, encoding="utf-8")
    return same


def collect(folder: Path) -> dict[str, Document]:
    """Documents, by name, of the rows in a folder: those that the newest sources have made."""
    documents: dict[str, Document] = {}
    for benchmark in TABLES:
        lines = storage.read(folder / f"{benchmark}.jsonl")
        newest = [line["source_sha256"] for line in lines if line["kind"] == "run"][-1:]
        run: Document = {}
        for line in lines:
            if line.pop("kind") == "run":
                run = line
            elif [run.get("source_sha256")] == newest:
                named = benchmark == "encode"
                name = f"encode-{line['model']}-{line['corpus']}" if named else benchmark
                documents.setdefault(name, _head(run, benchmark))["rows"].append(line)
    for document in documents.values():
        if document["benchmark"] == "encode":
            document["rows"] = storage.latest(document["rows"])
    return documents


def _head(run: Document, benchmark: str) -> Document:
    # A tree without its repository does not know its commit; the same sources have the same.
    known = {"commit": commit()} if run["commit"] is None and is_current(run) else {}
    return run | known | {"benchmark": benchmark, "rows": []}


def main(argv: Sequence[str] | None = None) -> int:
    """Print stored results, put them into README, or store the rows of a check."""
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="RESULT.json")
    add("--readme", action="store_true", help="put stored results into the pages that show them")
    add("--check", action="store_true", help="with --readme: only compare them")
    add("--collect", nargs=2, type=Path, metavar=("FROM", "TO"), help="folders")
    args = parser.parse_args(argv)
    if not (args.files or args.readme or args.collect):
        parser.error("expected a file, --readme or --collect")
    if args.readme and not write_pages(check=args.check) and args.check:
        print("a page does not show the stored results", file=sys.stderr)
        return 1
    for path in args.files:
        document = load(path)
        print(f"## {path.stem}\n\n{render(document)}")
        print("" if is_current(document) else f"\n{OLDER}\n")
    if args.collect:
        documents = collect(args.collect[0])
        for name, document in documents.items():
            path = args.collect[1] / f"{name}.json"
            storage.write_json(document, path)
            print(f"{path}: {len(document['rows'])} rows")
        return 0 if documents else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
