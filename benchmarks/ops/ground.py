"""What the hardware does alone: the ground that floors and fractions stand on.

    python -m benchmarks.ops.ground --rows ground.jsonl

Bandwidth of a copy within the device's memory; matrix products at the shapes of BERT layers; and
what a launch and a node of a CUDA graph cost. Every figure is a row, stored at once; one that fails
is stored as an error. Runs on a CPU too, with small sizes, as a check.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import pages, products, stopwatch, storage
from benchmarks.common.options import plain_parser
from benchmarks.common.provenance import provenance
from sbert_fast.bench.contenders import synchronize
from sbert_fast.bench.names import message, say

HIDDEN = (384, 768, 1024)
HALVES = (torch.float16, torch.bfloat16)
Figure = tuple[str, str, float, str]


class Ground:
    """Measures on one device; sizes for a check where `small`."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device, self.small = device, small

    def figures(self) -> Iterator[tuple[str, Callable[[], Figure]]]:
        """What there is to measure: its part, and a call that makes the figure."""
        small = self.small
        for size in (1 << 20,) if small else (1 << 24, 1 << 26, 1 << 28, 1 << 30, 1 << 32):
            yield "copy", partial(self._copy, size)
        # The four products of a layer, by hidden size and tokens; and a large square.
        square, token_counts = (64, (64,)) if small else (8192, (4096, 16_384, 65_536, 131_072))
        for dtype in HALVES:
            yield "gemm", partial(self._product, "square", square, square, square, dtype)
            for hidden in (32,) if small else HIDDEN:
                for name, (n, k) in products.layer_shapes(hidden, 4 * hidden).items():
                    for tokens in token_counts:
                        what = (f"{name} h={hidden}", tokens, n, k, dtype)
                        yield "gemm", partial(self._product, *what)
        yield "launches", lambda: self._host("torch add_", lambda x: x.add_(1))
        yield "launches", lambda: self._host("Triton add_norm", self._triton_add_norm())
        if self.device.type == "cuda":
            yield "launches", partial(self._node, 200)
            yield "launches", partial(self._node, 1000)

    def _copy(self, size: int) -> Figure:
        rate = stopwatch.copy_bandwidth(self.device, size)
        return "copy", f"{size >> 20} MiB", rate / 1e12, "TB/s"

    def _product(self, name: str, m: int, n: int, k: int, dtype: torch.dtype) -> Figure:
        found = products.product(m, n, k, dtype, self.device)
        which = f"{name} M={m} N={n} K={k} {str(dtype)[6:]} ({found['way']})"
        return "gemm", which, 2 * m * n * k / found["seconds"] / 1e12, "TFLOP/s"

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
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            call(x)
        launched = time.perf_counter() - start
        synchronize(self.device)
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
        median = stopwatch.median_seconds(lambda _: graph.replay(), 1, self.device)
        return "graph", f"{nodes} nodes", median / nodes * 1e6, "us a node"


def main(argv: Sequence[str] | None = None) -> int:
    parser = plain_parser(__doc__)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="append each row at once")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = []

    def store(kind: str, row: dict[str, Any]) -> None:
        storage.append(args.rows, kind, {"benchmark": "ground"} | row)

    store("run", provenance(torch.get_num_threads(), device.type))
    for part, figure in Ground(device, small=device.type == "cpu").figures():
        try:
            row = dict(zip(("what", "which", "value", "unit"), figure(), strict=True))
        except Exception as error:
            row = {"what": part, "error": message(error)}
        say(f"{part}: {row.get('which', row.get('error'))}")
        kept.append(row)
        store("error" if "error" in row else "row", row)
    print("\n".join(pages.ground(kept)))
    return int(any("error" in row for row in kept))


if __name__ == "__main__":
    raise SystemExit(main())
