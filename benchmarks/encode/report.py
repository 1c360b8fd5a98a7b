"""Encoding as tables and lines: what was measured on a CPU, where its time goes, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.names import OURS, OURS_CUDA, RATIOS, SHORT
from benchmarks.common.results import Row, latest
from benchmarks.common.text import markdown

Document = dict[str, Any]


def _head(document: Document, told: str) -> list[str]:
    corpus = document["corpus"]
    lengths = corpus["lengths"]
    return [
        f"{document['device']['name']} | {document['model']['name']} | {document['date']}",
        f"{corpus['name']}: {corpus['texts']:,} texts, {lengths['mean']:.1f} tokens each{told}",
        "",
    ]


def render(document: Document) -> str:
    """A run on a CPU: tables, and the lines a reader needs to judge them."""
    lengths, rounds = document["corpus"]["lengths"], document["settings"]["rounds"]
    told = f" (p5 {lengths['p5']:.0f}, p95 {lengths['p95']:.0f}); {document['scope']}; "
    lines = _head(document, f"{told}median of {rounds} interleaved rounds")
    header = (
        *("system", "precision", "batch", "sentences/s", "tokens/s", "IQR", "real tokens"),
        *("worst cosine", "peak RSS MB", "ours is faster by"),
    )
    table = [(*_names(row), *_throughput_cells(row)) for row in document["rows"]]
    lines += [*markdown(header, table), ""]
    for precision, gate in document["gates"].items():
        lines.append(
            f"correctness {precision}: {'green' if gate['green'] else 'RED, so no ratios'}: "
            f"worst 1 - cosine {gate['loss']:.2e}, limit {gate['limit']:.2e} ({gate['rule']})"
        )
    if reached := _limit(document):
        lines.append(f"The linear layers alone, {reached}.")
    if latency := document.get("latency"):
        header = (f"one text of {latency['tokens']} tokens", "precision", "p50 ms", "p95 ms")
        cells = [(*_names(r), f"{r['p50_ms']:.2f}", f"{r['p95_ms']:.2f}") for r in latency["rows"]]
        lines += ["", *markdown(header, cells)]
    if memory := document.get("memory"):
        lines += ["", *_memory(memory)]
    return "\n".join(lines)


def _names(row: Row) -> tuple[str, str]:
    return row["system"], row["precision"]


def _throughput_cells(row: Row) -> tuple[str, ...]:
    if row["status"] != "measured":
        return (row["status"],)
    low, high = row["iqr_tokens_per_s"]
    share = row["real_token_share"]
    return (
        row["batch"],
        f"{row['sentences_per_s']:,.0f}",
        f"{row['tokens_per_s']:,.0f}",
        f"{(high - low) / row['tokens_per_s']:.1%}",
        "no padding" if share is None else f"{share:.0%}",
        f"{row['worst_cosine']:.8f}",
        f"{row['peak_rss_mb']:,.0f}" if row["peak_rss_mb"] else "",
        ", ".join(f"{ratio:.2f}x ({p})" for p, ratio in row["ratios"].items()),
    )


def _memory(memory: Row) -> list[str]:
    header = (
        *(f"{memory['texts']:,} texts of {memory['corpus']!r}", "precision"),
        *("RSS loaded MB", "peak RSS MB", f"growth MB ({memory['output_mb']:.0f} are the result)"),
    )
    table = []
    for row in memory["rows"]:
        loaded, peak = row["loaded_rss_mb"], row["peak_rss_mb"]
        table.append((*_names(row), *(f"{mb:,.0f}" for mb in (loaded, peak, peak - loaded))))
    return markdown(header, table)


def render_breakdown(document: Document) -> str:
    """Where the time of sbert-fast goes on a CPU."""
    rows, rounds = document["rows"], document["settings"]["rounds"]
    header = ("share of the time", *(row["precision"] for row in rows))
    parts = list(rows[0]["shares"])
    table = [(part, *(f"{row['shares'][part]:.1%}" for row in rows)) for part in parts]
    lines = _head(document, f"; {OURS} under a profiler, median of {rounds} passes")
    lines += [*markdown(header, table), ""]
    for row in rows:
        line = (
            f"{row['precision']}: {row['tokens_per_s']:,.0f} tokens/s; "
            f"linear layers at {row['linear_gflops']:,.0f} GFLOP/s"
        )
        if row["fma_peak_gflops"] is not None:
            line += (
                f", {row['linear_gflops'] / row['fma_peak_gflops']:.0%} of the "
                f"{row['fma_peak_gflops']:,.0f} that it reaches in registers: "
                f"{row['fma_peak_tokens_per_s']:,.0f} tokens/s if nothing else were to do"
            )
        lines.append(line)
    return "\n".join(lines)


def render_comparison(document: Document) -> str:
    """What it costs to compare a model with what was derived from it."""
    rows = {name: document[name] for name in ("one_text", "corpus")}
    return "\n".join(
        f"{name}: {row['checked'] * 1e3:.3f} ms, of which the comparison takes "
        f"{row['difference'] * 1e6:.0f} us ({row['difference'] / row['unchecked']:.2%})"
        for name, row in rows.items()
    )


def _breakdown_line(document: Document) -> str:
    """Where the time goes, as README says it."""
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
                f"; linear layers at {row['linear_gflops'] / peak:.0%} of the multiply-add peak, "
                f"which is {row['fma_peak_tokens_per_s']:,.0f} tokens/s"
            )
        told.append(f"{row['precision']}: {shares}")
    return f"Where the time goes, {document['corpus']['name']}: {'. '.join(told)}."


def origin(documents: Sequence[Document], of: str = "") -> str:
    """The device, what the figures are `of`, and torch, date and commits of some results."""
    first = documents[0]
    told = (first["device"]["name"], of, f"torch {first['versions']['torch']}", first["date"][:10])
    commits = ", ".join(dict.fromkeys(str(d["commit"])[:9] for d in documents))
    return "; ".join((*filter(None, told), f"commit {commits}"))


def systems_table(
    documents: Sequence[Document], label: Callable[[Document, str], str], brief: bool = False
) -> list[str]:
    """Sentences a second on CPUs. A row is a system; a column, titled by `label`, is a document and
    a precision. `brief` leaves out why a system was not measured."""

    def cell(document: Document, system: str, precision: str) -> str:
        for row in document["rows"]:
            if _names(row) == (system, precision):
                if row["status"] != "measured":
                    return "not measured" if brief else row["status"]
                ratio = row["ratios"].get(precision)
                rate = f"{row['sentences_per_s']:,.0f}"
                return rate if ratio is None else f"{rate} ({ratio:.2f}x)"
        return "not measured"

    every = [(document, *_names(row)) for document in documents for row in document["rows"]]
    columns = {(id(d), precision): (d, precision) for d, _, precision in every}.values()
    header = ("sentences/s", *(label(*column) for column in columns))
    systems = dict.fromkeys(system for _, system, _ in every)
    return markdown(header, [(s, *(cell(d, s, p) for d, p in columns)) for s in systems])


def readme_section(folder: str, documents: list[Document], breakdowns: list[Document]) -> str:
    """The results of one CPU, stored in `folder` of benchmarks/results, as README quotes them."""

    def label(document: Document, precision: str) -> str:
        corpus = document["corpus"]
        return f"{corpus['name']} ({corpus['lengths']['mean']:.0f} tokens), {precision}"

    told = origin([*documents, *breakdowns], documents[0]["model"]["name"])
    lines = [f"{told} (benchmarks/results/{folder})", "", *systems_table(documents, label)]
    asides = [*_asides(documents), *map(_breakdown_line, breakdowns)]
    return "\n".join([*lines, *([""] if asides else []), *asides])


def _limit(document: Document) -> str | None:
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


def _asides(documents: list[Document]) -> list[str]:
    """A line on limits, on latency and on memory, each where a document has something to say."""
    limits = [reached for document in documents if (reached := _limit(document))]
    lines = [f"The linear layers alone, {'; '.join(limits)}."] if limits else []
    latencies = [found for document in documents if (found := document.get("latency"))]
    if latencies:
        calls = [
            ", ".join(f"{r['p50_ms']:.2f} ms {' '.join(_names(r))}" for r in found["rows"])
            for found in latencies
        ]
        tokens = latencies[0]["tokens"]
        lines.append(f"One text of {tokens} tokens, median call: {'; another run: '.join(calls)}.")
    for held in (document["memory"] for document in documents if document.get("memory")):
        each = (f"{r['peak_rss_mb']:,.0f} MB {' '.join(_names(r))}" for r in held["rows"])
        lines.append(
            f"Peak memory over {held['texts']:,} {held['corpus']} texts: {', '.join(each)}."
        )
    return lines


def gpu_table(rows: list[Row]) -> list[str]:
    """A row a scope and system on a GPU, the last one: rates, the fraction of the GEMM roofline,
    and ratios."""
    has_cuda = any(RATIOS[OURS_CUDA] in row for row in rows)
    ours = (OURS, OURS_CUDA) if has_cuda else (OURS,)
    header = (
        *("model", "corpus", "scope", "system", "precision", "batch", "sentences/s", "Mtok/s"),
        *("of GEMM", "worst 1-cos", *(f"{name} is faster by" for name in ours)),
    )
    table = []
    for row in latest(rows):
        left = [str(row.get(name, "")) for name in header[:5]]
        if "tokens_per_s" not in row:
            table.append((*left, row.get("status", row.get("error", ""))[:100]))
            continue
        fraction, loss = row.get("gemm_fraction"), row.get("loss")
        ratios = [row.get(RATIOS[name], {}).items() for name in ours]
        table.append(
            (
                *(*left, str(row["batch"]), f"{row['sentences_per_s']:,.0f}"),
                f"{row['tokens_per_s'] / 1e6:.2f}",
                "" if fraction is None else f"{fraction:.0%}",
                "" if loss is None else f"{loss:.1e}",
                *(", ".join(f"{ratio:.2f}x {SHORT.get(p, p)}" for p, ratio in r) for r in ratios),
            )
        )
    return markdown(header, table) if table else []
