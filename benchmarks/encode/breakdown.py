"""Where the time of sbert-fast goes on a CPU, beside what its arithmetic units can do at most.

    python -m benchmarks.encode.breakdown --corpus mixed --dtype float32,bfloat16 --json result.json

The corpus is encoded several times under torch's profiler; between two passes `fma_peak.cpp`, which
is compiled here, measures the multiply-adds of the same threads. A share is the median over passes.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import options
from sbert_fast.bench.names import PRECISIONS, say
from sbert_fast.bench.systems import NotAvailable

# By what torch's profiler calls them: linear layers in panels, in oneDNN, in plain torch.
PARTS = {
    "linear layers": (
        *("sbert_fast::linear", "sbert_fast::linear_norm"),
        *("mkldnn::_linear_pointwise", "aten::linear"),
    ),
    "attention": ("sbert_fast::varlen_attention",),
    "embeddings": ("sbert_fast::embed_norm",),
    "pooling": ("sbert_fast::segment_pool_out",),
    "tokenising": ("tokenising",),
}
REST = "everything else"
_NO_INSTRUCTIONS = 3


def build_fma_peak(folder: Path) -> Path:
    """The program that multiplies and adds in registers alone, put into `folder`.

    Raises:
        NotAvailable: it cannot be compiled here.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NotAvailable(f"it is written for x86, not for {platform.machine()}")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotAvailable("there is no C++ compiler")
    source, program = Path(__file__).with_name("fma_peak.cpp"), folder / "fma_peak"
    flags = ("-std=c++20", "-O3", "-march=native", "-pthread")
    command = [compiler, *flags, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotAvailable(f"{compiler} refused it:\n{done.stderr}")
    return program


def fma_peak(program: Path, precision: str, threads: int) -> float | None:
    """GFLOP/s of all threads at once; None where the CPU has no instructions for `precision`."""
    command = [str(program), precision, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == _NO_INSTRUCTIONS:
        return None
    done.check_returncode()
    return float(done.stdout)


def profile(encoder: Any, texts: list[str]) -> dict[str, float]:
    """Seconds of one pass: of the parts, of the rest, and in total.

    Args:
        encoder: a FastEncoder on a CPU, warmed up.
        texts: what it encodes.

    Raises:
        RuntimeError: a part is missing from the profile.
    """
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as torch_profile

    from sbert_fast.tokenization import TextTokenizer

    tokenise = TextTokenizer.__call__

    def recorded(self: TextTokenizer, texts: Sequence[str]) -> Any:
        with record_function("tokenising"):
            return tokenise(self, texts)

    with (
        mock.patch.object(TextTokenizer, "__call__", recorded),
        torch_profile(activities=[ProfilerActivity.CPU]) as found,
        record_function("all"),
    ):
        encoder.encode(texts)
    seconds = {event.key: event.cpu_time_total / 1e6 for event in found.key_averages()}
    missing = [part for part, names in PARTS.items() if seconds.keys().isdisjoint(names)]
    if missing:
        raise RuntimeError(f"the profile has no {', '.join(missing)}: the model did not run packed")
    parts = {part: sum(seconds.get(n, 0.0) for n in names) for part, names in PARTS.items()}
    total = seconds["all"]
    return parts | {REST: total - sum(parts.values()), "all": total}


def measure(args: argparse.Namespace, checkpoint: Any, corpus: Any) -> dict[str, Any]:
    """Seconds of the parts, and what the arithmetic units can do, in every precision."""
    from benchmarks.common.products import flops_per_token
    from sbert_fast import FastEncoder

    encoders = {p: FastEncoder(str(args.model), device="cpu", dtype=p) for p in args.dtype}
    passes: dict[str, list[dict[str, float]]] = {p: [] for p in args.dtype}
    peaks: dict[str, list[float]] = {p: [] for p in args.dtype}
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = build_fma_peak(Path(folder))
        except NotAvailable as reason:
            say(f"the multiply-add peak is not measured: {reason}")
            program = None
        for encoder in encoders.values():
            profile(encoder, corpus.texts)
        for number in range(args.rounds):
            say(f"round {number + 1} of {args.rounds}")
            for precision, encoder in encoders.items():
                reached = program and fma_peak(program, precision, args.threads)
                peaks[precision] += [reached] if reached else []
                passes[precision].append(profile(encoder, corpus.texts))
    tokens, flops = int(corpus.tokens.lengths.sum()), flops_per_token(checkpoint.config)
    rows = [_row(p, passes[p], peaks[p], tokens, flops) for p in args.dtype]
    return {"linear_flops_per_token": flops, "rows": rows}


def _row(
    precision: str, passes: list[dict[str, float]], peaks: list[float], tokens: int, flops: int
) -> dict[str, Any]:
    def median_share(part: str) -> float:
        return statistics.median(times[part] / times["all"] for times in passes)

    def median_rate(part: str) -> float:
        return statistics.median(tokens / times[part] for times in passes)

    peak = statistics.median(peaks) if peaks else None
    return {
        "precision": precision,
        "tokens_per_s": median_rate("all"),
        "shares": {part: median_share(part) for part in (*PARTS, REST)},
        "linear_gflops": median_rate("linear layers") * flops / 1e9,
        "fma_peak_gflops": peak,
        "fma_peak_tokens_per_s": None if peak is None else peak * 1e9 / flops,
        "passes": passes,
        "peaks": peaks,
    }


if __name__ == "__main__":
    raise SystemExit(options.run(__doc__, PRECISIONS, "breakdown", measure))
