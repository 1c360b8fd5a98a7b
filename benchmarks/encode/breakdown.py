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

from benchmarks.common import arguments
from benchmarks.common.names import PRECISIONS
from benchmarks.common.process import pin
from benchmarks.common.provenance import provenance
from benchmarks.common.text import say

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


class FmaPeak:
    """Multiply-adds of all threads at once, in registers alone, by a program put into `folder`.

    Attributes:
        reason: why there is no program; None where there is one.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._program, self._threads = folder / "fma_peak", threads
        self.reason = self._build()

    def _build(self) -> str | None:
        if platform.machine() not in ("x86_64", "AMD64"):
            return f"it is written for x86, not for {platform.machine()}"
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            return "there is no C++ compiler"
        source = Path(__file__).with_name("fma_peak.cpp")
        flags = ("-std=c++20", "-O3", "-march=native", "-pthread")
        command = [compiler, *flags, str(source), "-o", str(self._program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else f"{compiler} refused it:\n{done.stderr}"

    def measure(self, precision: str) -> float | None:
        """GFLOP/s in `precision`; None where the CPU has no instructions for it."""
        if self.reason is not None:
            return None
        command = [str(self._program), precision, str(self._threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == _NO_INSTRUCTIONS:
            return None
        done.check_returncode()
        return float(done.stdout)


def profile(encoder: Any, texts: list[str]) -> dict[str, float]:  # noqa: ANN401
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

    def recorded(self: TextTokenizer, window: Sequence[str]) -> Any:  # noqa: ANN401
        with record_function("tokenising"):
            return tokenise(self, window)

    TextTokenizer.__call__ = recorded  # type: ignore[method-assign]
    try:
        with torch_profile(activities=[ProfilerActivity.CPU]) as found, record_function("all"):
            encoder.encode(texts)
    finally:
        TextTokenizer.__call__ = tokenise  # type: ignore[method-assign]
    seconds = {event.key: event.cpu_time_total / 1e6 for event in found.key_averages()}
    missing = [part for part, names in PARTS.items() if seconds.keys().isdisjoint(names)]
    if missing:
        raise RuntimeError(f"the profile has no {', '.join(missing)}: the model did not run packed")
    parts = {part: sum(seconds.get(n, 0.0) for n in names) for part, names in PARTS.items()}
    total = seconds["all"]
    return parts | {REST: total - sum(parts.values()), "all": total}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything the arguments ask for, as the document that report.py shows."""
    from benchmarks.common.corpora import describe, load_corpus
    from benchmarks.common.folders import ModelFolder
    from benchmarks.common.products import flops_per_token
    from sbert_fast import FastEncoder

    document = provenance(args.threads)
    model = ModelFolder(args.model, args.threads)
    texts = load_corpus(args.corpus, args.texts, args.seed, model.count)
    lengths = model.tokenize(texts).lengths
    peak = FmaPeak(folder, args.threads)
    if peak.reason is not None:
        say(f"the multiply-add peak is not measured: {peak.reason}")
    encoders = {p: FastEncoder(str(args.model), device="cpu", dtype=p) for p in args.dtype}
    passes: dict[str, list[dict[str, float]]] = {p: [] for p in args.dtype}
    peaks: dict[str, list[float]] = {p: [] for p in args.dtype}
    for encoder in encoders.values():
        profile(encoder, texts)
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        for precision, encoder in encoders.items():
            reached = peak.measure(precision)
            if reached is not None:
                peaks[precision].append(reached)
            passes[precision].append(profile(encoder, texts))
    tokens, flops = int(lengths.sum()), flops_per_token(model.config)
    return document | {
        "benchmark": "breakdown",
        "model": {"name": args.model_name, "sha256": model.weights_sha256()},
        "corpus": describe(args.corpus, lengths),
        "settings": {name: getattr(args, name) for name in ("threads", "rounds", "seed")},
        "linear_flops_per_token": flops,
        "rows": [_row(p, passes[p], peaks[p], tokens, flops) for p in args.dtype],
    }


def _row(
    precision: str,
    passes: list[dict[str, float]],
    peaks: list[float],
    tokens: int,
    flops: int,
) -> dict[str, Any]:
    def median_share(part: str) -> float:
        return statistics.median(times[part] / times["all"] for times in passes)

    peak = statistics.median(peaks) if peaks else None
    rate = statistics.median(tokens / times["all"] for times in passes)
    linear = statistics.median(tokens * flops / times["linear layers"] for times in passes)
    return {
        "precision": precision,
        "tokens_per_s": rate,
        "shares": {part: median_share(part) for part in (*PARTS, REST)},
        "linear_gflops": linear / 1e9,
        "fma_peak_gflops": peak,
        "fma_peak_tokens_per_s": None if peak is None else peak * 1e9 / flops,
        "passes": passes,
        "peaks": peaks,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, store and print."""
    parser = arguments.make_parser(__doc__, *PRECISIONS)
    args = parser.parse_args(argv)
    arguments.finish(args, parser)
    pin(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        document = measure(args, Path(folder))
    arguments.conclude(document, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
