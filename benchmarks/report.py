"""Results of the benchmarks: where they come from, how they are stored, how they are shown.

    python benchmarks/report.py benchmarks/results/cpu-2core/*.json
    python benchmarks/report.py --readme

print the tables of stored results, and put them into README.md (one sentence, one table) and into
benchmarks/README.md (all of them), between their marks. Both say where the sources have changed
since.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu_report
import headline
from provenance import ROOT, source_hash
from tables import markdown

RESULTS = ROOT / "benchmarks" / "results"
# Between which marks of a page stand which figures.
MARKS = {
    name: (f"<!-- {name} -->", f"<!-- end of {name} -->")
    for name in ("headline", "table", "figures")
}
OLDER = "Older code: sources have changed since this run."
# Names as they stand in results.
OURS, OURS_CUDA = gpu_report.OURS, gpu_report.OURS_CUDA
REFERENCE = "sentence-transformers"
PEERS = (REFERENCE, "onnxruntime", "openvino", "zentorch", "torch-compile")
UNPADDED = "st-unpadded"
PRECISIONS = ("float32", "bfloat16")


def say(text: str) -> None:
    """Tell what is going on, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def render(document: dict[str, Any]) -> str:
    """The document as text: Markdown tables and the lines a reader needs to judge them."""
    if _is_breakdown(document):
        return _render_breakdown(document)
    if "gates" not in document:
        return gpu_report.render(document)
    corpus = document["corpus"]
    lines = [
        f"{document['device']['name']} | {document['model']['name']} | {document['date']}",
        f"{corpus['name']}: {corpus['texts']:,} texts, {corpus['lengths']['mean']:.1f} tokens each "
        f"(p5 {corpus['lengths']['p5']:.0f}, p95 {corpus['lengths']['p95']:.0f}); "
        f"{document['scope']}; median of {document['settings']['rounds']} interleaved rounds",
        "",
        *_throughput(document["rows"]),
        "",
        *(_gate_line(precision, gate) for precision, gate in document["gates"].items()),
    ]
    if reached := _limit(document):
        lines.append(f"The linear layers alone, {reached}.")
    if document.get("latency"):
        lines += ["", *_latency(document["latency"])]
    if document.get("memory"):
        lines += ["", *_memory(document["memory"])]
    return "\n".join(lines)


def _is_breakdown(document: dict[str, Any]) -> bool:
    return bool(document.get("benchmark") == "breakdown")


def _render_breakdown(document: dict[str, Any]) -> str:
    corpus, rows = document["corpus"], document["rows"]
    header = ("share of the time", *(row["precision"] for row in rows))
    parts = list(rows[0]["shares"])
    table = [(part, *(f"{row['shares'][part]:.1%}" for row in rows)) for part in parts]
    lines = [
        f"{document['device']['name']} | {document['model']['name']} | {document['date']}",
        f"{corpus['name']}: {corpus['texts']:,} texts, {corpus['lengths']['mean']:.1f} tokens each"
        f"; {OURS} under a profiler, median of {document['settings']['rounds']} passes",
        "",
        *markdown(header, table),
        "",
    ]
    for row in rows:
        line = (
            f"{row['precision']}: {row['tokens_per_s']:,.0f} tokens/s; "
            f"linear layers at {row['linear_gflops']:,.0f} GFLOP/s"
        )
        if row["fma_peak_gflops"] is not None:
            line += (
                f", {row['linear_gflops'] / row['fma_peak_gflops']:.0%} of the "
                f"{row['fma_peak_gflops']:,.0f} that the vector units reach in registers: "
                f"{row['fma_peak_tokens_per_s']:,.0f} tokens/s if nothing else were to do"
            )
        lines.append(line)
    return "\n".join(lines)


def _breakdown_line(document: dict[str, Any]) -> str:
    """Where the time goes, as the benchmarks page says it."""
    told = []
    for row in document["rows"]:
        shares = ", ".join(
            f"{part} {share:.0%}"
            for part, share in sorted(row["shares"].items(), key=lambda item: -item[1])
            if share >= 0.01
        )
        peak = row["fma_peak_gflops"]
        if peak is not None:
            shares += (
                f"; linear layers at {row['linear_gflops'] / peak:.0%} of the vector units' peak, "
                f"which is {row['fma_peak_tokens_per_s']:,.0f} tokens/s"
            )
        told.append(f"{row['precision']}: {shares}")
    return f"Where the time goes, {document['corpus']['name']}: {'. '.join(told)}."


def _throughput(rows: list[dict[str, Any]]) -> list[str]:
    header = (
        *("system", "precision", "batch", "sentences/s", "tokens/s", "IQR", "real tokens"),
        *("worst cosine", "peak RSS MB", "ours is faster by"),
    )
    table = []
    for row in rows:
        if row["status"] != "measured":
            table.append((row["system"], row["precision"], row["status"]))
            continue
        low, high = row["iqr_tokens_per_s"]
        share = row["real_token_share"]
        table.append(
            (
                row["system"],
                row["precision"],
                row["batch"],
                f"{row['sentences_per_s']:,.0f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{(high - low) / row['tokens_per_s']:.1%}",
                "no padding" if share is None else f"{share:.0%}",
                f"{row['worst_cosine']:.8f}",
                f"{row['peak_rss_mb']:,.0f}" if row["peak_rss_mb"] else "",
                ", ".join(f"{ratio:.2f}x ({p})" for p, ratio in row["ratios"].items()),
            )
        )
    return markdown(header, table)


def _gate_line(precision: str, gate: dict[str, Any]) -> str:
    state = "green" if gate["green"] else "RED, so no ratios"
    return (
        f"correctness {precision}: {state}: worst 1 - cosine {gate['loss']:.2e}, "
        f"limit {gate['limit']:.2e} ({gate['rule']})"
    )


def _latency(latency: dict[str, Any]) -> list[str]:
    header = (f"one text of {latency['tokens']} tokens", "precision", "p50 ms", "p95 ms")
    rows = [
        (row["system"], row["precision"], f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}")
        for row in latency["rows"]
    ]
    return markdown(header, rows)


def _memory(memory: dict[str, Any]) -> list[str]:
    header = (
        *(f"{memory['texts']:,} texts of {memory['corpus']!r}", "precision"),
        *("RSS loaded MB", "peak RSS MB", f"growth MB ({memory['output_mb']:.0f} are the result)"),
    )
    rows = [
        (
            row["system"],
            row["precision"],
            f"{row['loaded_rss_mb']:,.0f}",
            f"{row['peak_rss_mb']:,.0f}",
            f"{row['peak_rss_mb'] - row['loaded_rss_mb']:,.0f}",
        )
        for row in memory["rows"]
    ]
    return markdown(header, rows)


def readme_section(
    folder: str, documents: list[dict[str, Any]], breakdowns: list[dict[str, Any]]
) -> str:
    """The results of one device as the benchmarks page quotes them: a row a system, a column for
    each corpus and precision.

    Args:
        folder: name of the device's folder in benchmarks/results.
        documents: one a corpus.
        breakdowns: what says where the time goes.
    """
    columns = [
        (document, precision)
        for document in documents
        for precision in dict.fromkeys(row["precision"] for row in document["rows"])
    ]
    header = (
        "sentences/s",
        *(
            f"{d['corpus']['name']} ({d['corpus']['lengths']['mean']:.0f} tokens), {p}"
            for d, p in columns
        ),
    )
    systems = dict.fromkeys(row["system"] for document in documents for row in document["rows"])
    rows = [(system, *(_cell(d, system, p) for d, p in columns)) for system in systems]
    first = documents[0]
    torch, date = first["versions"]["torch"], first["date"][:10]
    commits = ", ".join(dict.fromkeys(str(d["commit"])[:9] for d in (*documents, *breakdowns)))
    lines = [
        f"{first['device']['name']}; {first['model']['name']}; torch {torch}; {date}; "
        f"commit {commits} (benchmarks/results/{folder})",
        "",
        *markdown(header, rows),
    ]
    asides = [*_asides(documents), *map(_breakdown_line, breakdowns)]
    return "\n".join([*lines, *([""] if asides else []), *asides])


def _cell(document: dict[str, Any], system: str, precision: str) -> str:
    """Sentences a second, and by how much ours is faster in the same precision."""
    for row in document["rows"]:
        if (row["system"], row["precision"]) == (system, precision):
            if row["status"] != "measured":
                return row["status"]
            ratio = row["ratios"].get(precision)
            rate = f"{row['sentences_per_s']:,.0f}"
            return rate if ratio is None else f"{rate} ({ratio:.2f}x)"
    return "not measured"


def _limit(document: dict[str, Any]) -> str | None:
    """How near ours comes to the speed of the linear layers alone."""
    ours = (row for row in document["rows"] if row["system"] == OURS)
    rates = {row["precision"]: row.get("tokens_per_s") for row in ours}
    reached = [
        f"{limit:,.0f} tokens/s in {precision} ({OURS}: {rates[precision]:,.0f}, "
        f"{rates[precision] / limit:.0%})"
        for precision, limit in document.get("linear_layers_alone", {}).items()
        if rates.get(precision)
    ]
    return f"{document['corpus']['name']}: {', '.join(reached)}" if reached else None


def _asides(documents: list[dict[str, Any]]) -> list[str]:
    """A line on limits, on latency and on memory, each where a document has something to say."""
    limits = [reached for document in documents if (reached := _limit(document))]
    lines = [f"The linear layers alone, {'; '.join(limits)}."] if limits else []
    calls = [
        ", ".join(f"{r['p50_ms']:.2f} ms {r['system']} {r['precision']}" for r in found["rows"])
        for document in documents
        if (found := document.get("latency"))
    ]
    if calls:
        tokens = next(d["latency"]["tokens"] for d in documents if d.get("latency"))
        lines.append(f"One text of {tokens} tokens, median call: {'; another run: '.join(calls)}.")
    for held in (document["memory"] for document in documents if document.get("memory")):
        each = (f"{r['peak_rss_mb']:,.0f} MB {r['system']} {r['precision']}" for r in held["rows"])
        lines.append(
            f"Peak memory over {held['texts']:,} {held['corpus']} texts: {', '.join(each)}."
        )
    return lines


def readme_figures(results: Path = RESULTS) -> str:
    """What the benchmarks page shows: every stored result, or that there is none."""
    sections = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        documents = [
            json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))
        ]
        breakdowns = [document for document in documents if _is_breakdown(document)]
        runs = [document for document in documents if not _is_breakdown(document)]
        if any("gates" not in document for document in runs):
            sections.append(gpu_report.readme_section(folder.name, runs))
        elif runs:
            sections.append(readme_section(folder.name, runs, breakdowns))
    return "\n\n".join(sections) or "«not measured yet»"


def write_pages(root: Path = ROOT) -> None:
    """Put the stored results between the marks of the pages that show them.

    Raises:
        ValueError: a mark is missing.
    """
    results = root / "benchmarks" / "results"
    stale = "" if _current(results) else f"\n\n{OLDER}"
    readme, page = root / "README.md", root / "benchmarks" / "README.md"
    _write(readme, "headline", headline.sentence(results))
    _write(readme, "table", headline.table(results) + stale)
    _write(page, "figures", readme_figures(results) + stale)


def _write(path: Path, name: str, shown: str) -> None:
    begin, end = MARKS[name]
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path.name} must hold the marks {begin} and {end}")
    path.write_text(f"{before}{begin}\n{shown}\n{end}{after}", encoding="utf-8")


def _current(results: Path) -> bool:
    """Whether every stored result was measured from the sources as they are."""
    stored = (json.loads(p.read_text(encoding="utf-8")) for p in results.glob("*/*.json"))
    return all(d["source_sha256"] == source_hash(kind=d["device"]["kind"]) for d in stored)


def main(paths: list[str]) -> int:
    """Print stored results, or put them into the pages that show them."""
    if not paths:
        print("usage: report.py --readme | RESULT.json ...", file=sys.stderr)
        return 2
    if paths == ["--readme"]:
        write_pages()
        return 0
    for path in paths:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        print(f"## {Path(path).stem}\n\n{render(document)}")
        if document["source_sha256"] != source_hash(kind=document["device"]["kind"]):
            print(f"\n{OLDER}")
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
