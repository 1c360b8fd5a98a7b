"""What the hardware does alone: the ground that floors and fractions stand on.

    python benchmarks/ground.py --rows ground.jsonl [--model folder] [--only copy,gemm]

Bandwidth of a copy within the device's memory; matrix products at the shapes of BERT layers;
attention by torch's kernel for packed sequences; what a launch and a node of a CUDA graph cost; and
sentence-transformers over batch sizes. Every figure is a row, stored at once; one that fails is
stored as an error. Runs on a CPU too, with small sizes, as a check.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_report
import roofline
import rows
import stopwatch
import torch
from op_peers import VARLEN
from op_systems import attention_case, lengths_of
from provenance import provenance, write_json
from report import say

HIDDEN = (384, 768, 1024)
HALVES = (torch.float16, torch.bfloat16)
Figure = tuple[str, str, float, str]


class Ground:
    """Measures on one device.

    Args:
        device: where.
        model: folder of a model for sentence-transformers, or None.
        small: sizes for a check.
    """

    def __init__(self, device: torch.device, model: Path | None, small: bool) -> None:
        self.device, self.model, self.small = device, model, small

    def copy(self) -> Iterator[Callable[[], Figure]]:
        """Copies of several sizes."""
        for size in (1 << 20,) if self.small else (1 << 24, 1 << 26, 1 << 28, 1 << 30, 1 << 32):

            def run(size: int = size) -> Figure:
                rate = stopwatch.copy_bandwidth(self.device, size)
                return "copy", f"{size >> 20} MiB", rate / 1e12, "TB/s"

            yield run

    def gemm(self) -> Iterator[Callable[[], Figure]]:
        """The four products of a layer, by hidden size and tokens; and a large square."""
        token_counts = (64,) if self.small else (4096, 16_384, 65_536, 131_072)
        square = 64 if self.small else 8192
        for dtype in HALVES:
            yield lambda dtype=dtype: self._product("square", square, square, square, dtype)
            for hidden in (32,) if self.small else HIDDEN:
                for name, (n, k) in roofline.layer_shapes(hidden, 4 * hidden).items():
                    for tokens in token_counts:
                        case = (f"{name} h={hidden}", tokens, n, k, dtype)
                        yield lambda case=case: self._product(*case)

    def _product(self, name: str, m: int, n: int, k: int, dtype: torch.dtype) -> Figure:
        found = roofline.product(m, n, k, dtype, self.device)
        which = f"{name} M={m} N={n} K={k} {str(dtype)[6:]} ({found['way']})"
        return "gemm", which, 2 * m * n * k / found["seconds"] / 1e12, "TFLOP/s"

    def varlen(self) -> Iterator[Callable[[], Figure]]:
        """torch's attention for packed sequences, cold; the share of the copy's bandwidth."""
        rate = stopwatch.copy_bandwidth(self.device, 1 << 20 if self.small else 1 << 30)
        tokens = 256 if self.small else 65_536
        for dim in (32, 64):
            for length in ("16", "64") if self.small else ("16", "32", "64", "128", "256", "512"):
                for dtype in HALVES:

                    def run(
                        dim: int = dim, length: str = length, dtype: torch.dtype = dtype
                    ) -> Figure:
                        sets = stopwatch.cold_sets(self.device, tokens * 48 * dim * dtype.itemsize)
                        drawn = lengths_of(length, tokens)
                        case = attention_case(self.device, dtype, drawn, dim, sets, (VARLEN,))
                        calls = {VARLEN: case.systems[VARLEN]}
                        timing = stopwatch.take_turns(calls, sets, self.device)[VARLEN]
                        if timing.error:
                            raise RuntimeError(timing.error)
                        share = case.moved_bytes / rate / timing.median
                        which = f"L={length} D={dim} {str(dtype)[6:]} ({share:.0%} of floor)"
                        return "varlen_attn", which, timing.median * 1e6, "us"

                    yield run

    def launches(self) -> Iterator[Callable[[], Figure]]:
        """Host microseconds of a launch, device microseconds of a node of a graph."""
        yield lambda: self._host("torch add_", lambda x: x.add_(1))
        yield lambda: self._host("Triton add_norm", self._triton_add_norm())
        if self.device.type == "cuda":
            yield lambda: self._node(200)
            yield lambda: self._node(1000)

    def _triton_add_norm(self) -> Callable[[torch.Tensor], Any]:
        from sbert_fast import ops

        impl = "triton" if self.device.type == "cuda" else "auto"
        kernel = ops.bind("add_norm", self.device, torch.float32, impl)
        ones = torch.ones(64, device=self.device)
        return lambda x: kernel(x, ones, None, ones, ones, 1e-5)

    def _host(self, name: str, call: Callable[[torch.Tensor], Any]) -> Figure:
        x, count = torch.ones(4, 64, device=self.device), 20 if self.small else 500
        for _ in range(10):
            call(x)
        stopwatch.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            call(x)
        launched = time.perf_counter() - start
        stopwatch.synchronize(self.device)
        return "launch", name, launched / count * 1e6, "us on the host"

    def _node(self, nodes: int) -> Figure:
        x = torch.ones(64, device=self.device)
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            x.add_(1)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(nodes):
                x.add_(1)
        timing = stopwatch.take_turns({"graph": lambda _: graph.replay()}, 1, self.device)["graph"]
        if timing.error:
            raise RuntimeError(timing.error)
        return "graph", f"{nodes} nodes", timing.median / nodes * 1e6, "us a node"

    def sentence_transformers(self) -> Iterator[Callable[[], Figure]]:
        """Prepared ids to embeddings, padded and not, over batch sizes."""
        if self.model is None:
            raise ValueError("--model is needed")
        import gpu_encode
        from corpora import load_corpus
        from gpu_systems import SYSTEMS, Tokens
        from padded import ModelFolder
        from report import REFERENCE, UNPADDED

        folder = ModelFolder(self.model, torch.get_num_threads())

        def count(texts: list[str]) -> list[int]:
            return [len(e.ids) for e in folder.tokenizer.encode_batch_fast(texts)]

        texts = load_corpus("short", 64 if self.small else 16_384, 0, count)
        tokens = Tokens(*folder.tokenize(texts))
        dtype = torch.float32 if self.small else torch.bfloat16
        for name in (REFERENCE, UNPADDED):
            system = None
            for size in (16, 64) if self.small else (32, 128, 512, 1024, 2048, 4096, 8192, 16_384):

                def run(name: str = name, size: int = size) -> Figure:
                    nonlocal system
                    system = system or SYSTEMS[name](folder, self.device, dtype)
                    staged = system.stage(tokens, size)
                    staged.run()
                    seconds = min(gpu_encode.seconds_of(staged.run, self.device) for _ in range(3))
                    rate = tokens.lengths.sum() / seconds / 1e6
                    share = tokens.lengths.sum() / sum(staged.batch_tokens)
                    which = f"{name} s3 short batch {size} ({share:.0%} real tokens)"
                    return "encode", which, float(rate), "Mtok/s"

                yield run


PARTS = ("copy", "gemm", "varlen", "launches", "sentence_transformers")


def measure(
    ground: Ground, parts: Sequence[str], store: Callable[[str, dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Every figure of the parts; what fails is stored as an error, and the next one is measured."""
    kept: list[dict[str, Any]] = []

    def keep(kind: str, row: dict[str, Any]) -> None:
        kept.append(row)
        store(kind, row)

    for part in parts:
        say(f"measuring {part}")
        try:
            for run in getattr(ground, part)():
                try:
                    what, which, value, unit = run()
                except Exception as error:
                    keep("error", {"what": part, "error": stopwatch.message(error)})
                else:
                    keep("row", {"what": what, "which": which, "value": value, "unit": unit})
        except Exception as error:
            keep("error", {"what": part, "error": stopwatch.message(error)})
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, metavar="FILE", help="append each row at once")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there")
    parser.add_argument("--model", type=Path, help="model folder for sentence-transformers")
    parser.add_argument("--only", default=",".join(PARTS), help="some of %(default)s")
    args = parser.parse_args(argv)
    parts = [part for part in args.only.split(",") if part]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = provenance(torch.get_num_threads(), device.type) | {"benchmark": "ground"}
    rows.append(args.rows, "run", run)

    def store(kind: str, row: dict[str, Any]) -> None:
        rows.append(args.rows, kind, {"benchmark": "ground"} | row)

    ground = Ground(device, args.model, small=device.type == "cpu")
    kept = measure(ground, parts, store)
    if args.json:
        write_json(run | {"rows": kept}, args.json)
    print("\n".join(gpu_report.ground(kept)))
    return int(any("error" in row for row in kept))


if __name__ == "__main__":
    raise SystemExit(main())
