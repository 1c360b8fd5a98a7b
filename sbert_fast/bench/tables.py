"""Results on a CPU as tables and lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sbert_fast.bench.names import ALONE, OURS, REFERENCE

Document = dict[str, Any]
Row = dict[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns; short rows are filled up with empty cells."""
    # A status may run past its column: only complete rows decide the widths.
    complete = [header, *(row for row in rows if len(row) == len(header))]
    widths = [max(map(len, column)) for column in zip(*complete, strict=True)]
    full = (header, ["-" * width for width in widths], *rows)
    padded = ([*row, *[""] * (len(header) - len(row))] for row in full)
    return [
        f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in padded
    ]


def head(document: Document, told: str) -> list[str]:
    """What was measured, and where: the lines before its figures."""
    corpus = document["corpus"]
    mean = corpus["lengths"]["mean"]
    return [
        f"{document['device']['name']} | {document['model']['name']} | {document['date']}",
        f"{corpus['name']}: {corpus['texts']:,} texts, {mean:.1f} tokens each{told}",
        "",
    ]


def encode_on_cpu(document: Document) -> str:
    """A run on a CPU: a table, and the lines a reader needs to judge it."""
    lengths, rounds = document["corpus"]["lengths"], document["settings"]["rounds"]
    told = f" (p5 {lengths['p5']:.0f}, p95 {lengths['p95']:.0f}); {document['scope']}; "
    lines = head(document, f"{told}median of {rounds} interleaved rounds")
    header = (
        *("system", "precision", "batch", "sentences/s", "tokens/s", "IQR", "real tokens"),
        *("worst cosine", "peak RSS MB", "ours is faster by"),
    )
    table = [(*names(row), *_throughput_cells(row)) for row in document["rows"]]
    lines += [*markdown(header, table), ""]
    for precision, gate in document["gates"].items():
        lines.append(
            f"correctness {precision}: {'green' if gate['green'] else 'RED, so no ratios'}: "
            f"worst 1 - cosine {gate['loss']:.2e}, limit {gate['limit']:.2e} ({gate['rule']})"
        )
    lines += ["", *by_length(document), ""] if document.get("by_length") else []
    return "\n".join([*lines, *asides([document], full=True)])


def by_length(document: Document) -> list[str]:
    """Tokens a second on texts of one length each; the last row is the linear layers alone."""
    found = document["by_length"]
    lengths = found["lengths"]
    rates = [(names(row), row["tokens_per_s"]) for row in found["rows"]]
    rates += [((ALONE, p), [r] * len(lengths)) for p, r in document["linear_layers_alone"].items()]
    rows = [(*name, *(f"{rate:,.0f}" for rate in each)) for name, each in rates]
    return markdown(("tokens/s", "precision", *(f"{n} tokens" for n in lengths)), rows)


def names(row: Row) -> tuple[str, str]:
    """The system and the precision of a row."""
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


def _accuracy(document: Document) -> str | None:
    """How far embeddings in int8 are from those in float32."""
    told = [
        f"{row['worst_cosine']:.4f} and {row['mean_cosine']:.4f} {row['system']}"
        for row in document["rows"]
        if row["precision"] == "int8" and row["status"] == "measured"
    ]
    return f"{document['corpus']['name']}: {', '.join(told)}" if told else None


def _memory(document: Document) -> str | None:
    """The peak memory of ours, with and without low_memory, and of the reference."""
    told = []
    for row in document["rows"]:
        if row["system"] in (OURS, REFERENCE) and row.get("peak_rss_mb"):
            low = row.get("low_memory")
            less = f" ({low['peak_rss_mb']:,.0f} with low_memory=True)" if low else ""
            told.append(f"{row['peak_rss_mb']:,.0f} MB{less} {' '.join(names(row))}")
    return f"{document['corpus']['name']}: {', '.join(told)}" if told else None


def asides(documents: Sequence[Document], full: bool = False) -> list[str]:
    """A line on limits, on int8, on latency and on memory, each where a document has something to
    say."""

    def call(row: Row) -> str:
        told = f"{row['p50_ms']:.2f} ms {' '.join(names(row))}"
        return f"{told} (p95 {row['p95_ms']:.2f})" if full else told

    def held(row: Row) -> str:
        told = f"{row['peak_rss_mb']:,.0f} MB {' '.join(names(row))}"
        return f"{told} ({row['loaded_rss_mb']:,.0f} before the first text)" if full else told

    limits = [reached for document in documents if (reached := _limit(document))]
    lines = [f"The linear layers alone, {'; '.join(limits)}."] if limits else []
    if losses := [told for document in documents if (told := _accuracy(document))]:
        lines.append(f"Worst and mean cosine of int8 with float32, {'; '.join(losses)}.")
    if peaks := [told for document in documents if (told := _memory(document))]:
        lines.append(f"Peak memory, {'; '.join(peaks)}.")
    if latencies := [found for document in documents if (found := document.get("latency"))]:
        calls = "; another run: ".join(", ".join(map(call, found["rows"])) for found in latencies)
        lines.append(f"One text of {latencies[0]['tokens']} tokens, median call: {calls}.")
    for memory in (document["memory"] for document in documents if document.get("memory")):
        result = f" ({memory['output_mb']:.0f} MB are the result)" if full else ""
        lines.append(
            f"Peak memory over {memory['texts']:,} {memory['corpus']} texts{result}: "
            f"{', '.join(map(held, memory['rows']))}."
        )
    return lines
