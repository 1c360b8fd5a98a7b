"""Results as tables and lines: pages of CPUs, encoding on a GPU, ops, what hardware does alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.common.storage import Record, latest
from sbert_fast.bench.names import OURS, OURS_CUDA, REFERENCE
from sbert_fast.bench.tables import Document, head, markdown, names

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Where a row has the ratios of each of ours.
RATIOS = {OURS: "ratios", OURS_CUDA: "ratios_cuda"}
COPY = "copy of as many bytes"


def systems(
    documents: Sequence[Document], label: Callable[[Document, str], str], brief: bool = False
) -> list[str]:
    """Sentences a second on CPUs. A row is a system; a column, titled by `label`, is a document and
    a precision. `brief` leaves out why a system was not measured."""

    def cell(document: Document, system: str, precision: str) -> str:
        row = next((r for r in document["rows"] if names(r) == (system, precision)), None)
        if row is None or row["status"] != "measured":
            return "not measured" if brief or row is None else row["status"]
        ratio = row["ratios"].get(precision)
        rate = f"{row['sentences_per_s']:,.0f}"
        return rate if ratio is None else f"{rate} ({ratio:.2f}x)"

    every = [(document, *names(row)) for document in documents for row in document["rows"]]
    columns = {(id(d), precision): (d, precision) for d, _, precision in every}.values()
    header = ("sentences/s", *(label(*column) for column in columns))
    found = dict.fromkeys(system for _, system, _ in every)
    return markdown(header, [(s, *(cell(d, s, p) for d, p in columns)) for s in found])


def shares(row: Record) -> str:
    """Where the time of sbert-fast goes in one precision."""
    told = ", ".join(
        f"{part} {share:.0%}"
        for part, share in sorted(row["shares"].items(), key=lambda item: -item[1])
        if share >= 0.01
    )
    if (peak := row["fma_peak_gflops"]) is not None:
        told += (
            f"; linear layers at {row['linear_gflops'] / peak:.0%} of the multiply-add peak, "
            f"which is {row['fma_peak_tokens_per_s']:,.0f} tokens/s"
        )
    return f"{row['precision']}: {told}"


def breakdown(document: Document) -> str:
    """Where the time of sbert-fast goes on a CPU."""
    rounds = document["settings"]["rounds"]
    lines = head(document, f"; {OURS} under a profiler, median of {rounds} passes")
    for row in document["rows"]:
        rates = f"{row['tokens_per_s']:,.0f} tokens/s, {row['linear_gflops']:,.0f} GFLOP/s"
        lines.append(f"{shares(row)}; it reaches {rates}")
    return "\n".join(lines)


def reranking(row: Record) -> str:
    """How fast a cross-encoder scores in one precision, ours or that of sentence-transformers."""
    told = f"{row['pairs_per_s']:,.0f} pairs/s, {row['short_ms']:.1f} ms a short call"
    for precision, ratio in row.get("ratios", {}).items():
        told += f", {ratio['all']:.2f}x and {ratio['short']:.2f}x {REFERENCE} {precision}"
    return f"{row['system']} {row['precision']}: {told}"


def rerank(document: Document) -> str:
    """How fast cross-encoders score on a CPU."""
    lines = head(document, f"; median of {document['settings']['rounds']} rounds")
    lines += [f"{reranking(row)}; worst error {row['loss']:.1e}" for row in document["rows"]]
    return "\n".join(lines)


def training(row: Record) -> str:
    """How fast a model is fine-tuned in one precision, ours or that of sentence-transformers."""
    told = f"{row['steps_per_s']:.2f} steps/s, {row['peak_rss_mb']:,.0f} MB at most"
    if "ratio" in row:
        told += f", {row['ratio']:.2f}x as fast as {REFERENCE} in {row['memory_ratio']:.0%} of it"
    return f"{row['system']} {row['precision']}: {told}"


def trainings(document: Document) -> str:
    """How fast a model is fine-tuned on a CPU."""
    pairs, rounds = document["batch_pairs"], document["settings"]["rounds"]
    lines = head(document, f"; batches of {pairs} pairs, median of {rounds} rounds")
    lines += [f"{training(row)}; gradients differ by {row['loss']:.1e}" for row in document["rows"]]
    return "\n".join(lines)


def comparison(document: Document) -> str:
    """What it costs to compare a model with what was derived from it."""
    one, corpus = document["one_text"], document["corpus"]
    whole = one["difference"] * corpus["comparisons"]
    return (
        f"{OURS}, {document['device']['name']}: {one['difference'] * 1e6:.0f} us, "
        f"{one['difference'] / one['unchecked']:.1%} of a call of one text; "
        f"{whole / corpus['seconds']:.2%} of one of {document['settings']['texts']:,} texts"
    )


def encode_on_gpu(rows: list[Record]) -> list[str]:
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


def _us(figures: Record) -> str:
    """Microseconds, marked where they are wrong or those of launches; or that there are none."""
    if "us" not in figures:
        return "error" if "error" in figures else ""
    us, bound = figures["us"], " (launches)" if figures["launch_bound"] else ""
    return f"{us:.{0 if us >= 1000 else 1}f}" + (" !" if figures.get("wrong") else "") + bound


def _op_cells(row: Record, ours: tuple[str, ...], peers: list[str]) -> tuple[str, ...]:
    """Of ours microseconds and the fraction of the floor; of peers also how many times faster each
    of `ours` is."""
    systems = row.get("systems", {})
    found = [systems.get(name, {}) for name in ours]
    if not any("us" in figures for figures in found):
        return (f"ERROR {found[0].get('error', row.get('error', 'no figures'))[:60]}",)
    cells = ["yes" if row["ok"] else "NO"]
    for figures in found:
        cells += [_us(figures), f"{figures['floor_fraction']:.0%}" if "us" in figures else ""]
    if OURS_CUDA in ours:
        ratio = row.get(RATIOS[OURS_CUDA], {}).get(OURS)
        cells.append("" if ratio is None else f"{ratio:.2f}x")
    for name in peers:
        ratios = [row.get(RATIOS[each], {}).get(name) for each in ours]
        told = " ".join("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)
        bare = name == COPY or not any(ratios)
        cells.append(_us(systems.get(name, {})) + ("" if bare else f" ({told})"))
    return tuple(cells)


def _op_table(rows: list[Record]) -> list[str]:
    """A table of ops with the same peers, and what there is to say of it."""
    every = [(n, figures) for row in rows for n, figures in row.get("systems", {}).items()]
    ran = dict.fromkeys(name for name, figures in every if "us" in figures)
    tried = {name for name, figures in every if "missing" not in figures}
    ours = (OURS, OURS_CUDA) if OURS_CUDA in tried else (OURS,)
    peers = [name for name in ran if name not in ours]
    header = ("op", "lengths", "state", "dtype", "size", "correct", "us", "of floor")
    header += ("cuda us", "of floor", "cuda is") if OURS_CUDA in ours else ()
    header += tuple("copy" if name == COPY else name for name in peers)
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
    return [*markdown(header, table), "", *legend, *told]


def _op(row: Record) -> str:
    return row.get("op", "varlen_attention")


def ops(rows: list[Record], short: bool = False) -> list[str]:
    """A row an op and input: microseconds, the fraction of the floor, and ratios to the peers, of
    ours and, where it was measured, of ours in CUDA C++; attention has a table of its own. Where
    `short`, float16 on cold inputs only."""
    if short:
        rows = [r for r in rows if r["state"] == "cold" and r["dtype"] == "float16"]
    attention = [row for row in rows if _op(row) == "varlen_attention"]
    others = [row for row in rows if _op(row) != "varlen_attention"]
    tables = [_op_table(each) for each in (attention, others) if each]
    return [line for i, table in enumerate(tables) for line in ([""] if i else []) + table]


def ground(rows: list[Record]) -> list[str]:
    """What the hardware and the peers do alone."""
    table = [
        (row["what"], row["which"], f"{row['value']:,.4g}", row["unit"])
        if "value" in row
        else (row.get("what", ""), "", f"error: {row.get('error', '')[:80]}")
        for row in rows
    ]
    return markdown(("what", "which", "figure", "unit"), table) if table else []
