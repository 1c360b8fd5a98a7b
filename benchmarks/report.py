"""Results of the benchmarks: where they come from, how they are stored, how they are shown.

    python benchmarks/report.py benchmarks/results/cpu-2core/*.json

prints the tables of stored results and says where the sources have changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
# Names as they stand in results.
OURS = "sbert-fast"
REFERENCE = "sentence-transformers"
PEERS = (REFERENCE, "onnxruntime", "openvino", "zentorch", "torch-compile")
PRECISIONS = ("float32", "bfloat16")
PACKAGES = (
    *("sbert-fast", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy"),
    *("onnx", "onnxruntime", "openvino", "zentorch"),
)
_SOURCES = ("sbert_fast/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h")
_WRITTEN_BY_THE_BUILD = "sbert_fast/_build_info.py"
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def source_hash(root: Path = ROOT) -> str:
    """SHA-256 over the names and contents of the sources that the benchmarks time."""
    files = {path.relative_to(root).as_posix() for p in _SOURCES for path in root.glob(p)}
    digest = hashlib.sha256()
    for name in sorted(files - {_WRITTEN_BY_THE_BUILD}):
        content = root.joinpath(name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def provenance(threads: int) -> dict[str, Any]:
    """When, on what, and from which sources a run is made."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "source_sha256": source_hash(),
        "device": _cpu(threads),
        "load_average_before": list(os.getloadavg()),
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the sources, with "+" behind it where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    fields = dict(re.findall(r"^(\S[^\t:]*?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    flags = set(fields.get("flags", "").split())
    model = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        model += f" (family {fields['cpu family']}, model {fields['model']})"
    return {
        "name": f"{model}, {threads} threads",
        "kind": "cpu",
        "threads": threads,
        "cpus": os.cpu_count(),
        "mhz": fields.get("cpu MHz"),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def say(text: str) -> None:
    """Tell what is going on, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a document so that `path` holds either all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=1, allow_nan=False)
            stream.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def render(document: dict[str, Any]) -> str:
    """The document as text: Markdown tables and the lines a reader needs to judge them."""
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
    if document.get("latency"):
        lines += ["", *_latency(document["latency"])]
    if document.get("memory"):
        lines += ["", *_memory(document["memory"])]
    return "\n".join(lines)


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
                str(row["batch"]),
                f"{row['sentences_per_s']:,.0f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{(high - low) / row['tokens_per_s']:.1%}",
                "no padding" if share is None else f"{share:.0%}",
                f"{row['worst_cosine']:.8f}",
                f"{row['peak_rss_mb']:,.0f}" if row["peak_rss_mb"] else "",
                ", ".join(f"{ratio:.2f}x ({p})" for p, ratio in row["ratios"].items()),
            )
        )
    return _markdown(header, table)


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
    return _markdown(header, rows)


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
    return _markdown(header, rows)


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
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


def main(paths: list[str]) -> int:
    """Print stored results."""
    if not paths:
        print("usage: report.py RESULT.json ...", file=sys.stderr)
        return 2
    current = source_hash()
    for path in paths:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        print(f"## {Path(path).stem}\n\n{render(document)}")
        if document["source_sha256"] != current:
            print("\nolder code: the sources have changed since this run")
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
