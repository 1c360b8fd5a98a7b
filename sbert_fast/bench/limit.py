"""The linear layers of a model alone, with nothing between them: what a system could reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Rows of a product in oneDNN: large enough that it is at its best.
_ROWS = 2048


def linear_shapes(encode: Any) -> list[tuple[int, int]]:
    """(outputs, inputs) of every linear layer that a call runs on tokens; those that read the same
    tensor, such as queries, keys and values, count as one."""
    found: list[tuple[Tensor, int]] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(module, nn.Linear) and args and args[0].dim() == 3:
            found.append((args[0], module.out_features))

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        encode()
    finally:
        hook.remove()
    outputs: dict[int, int] = {}
    for x, features in found:
        outputs[id(x)] = outputs.get(id(x), 0) + features
    inputs = {id(x): x.shape[-1] for x, _ in found}
    return [(features, inputs[key]) for key, features in outputs.items()]


class LinearLayers:
    """Linear layers by oneDNN through torch, with weights prepacked.

    Args:
        shapes: (outputs, inputs) of each.
        precision: "float32" or "bfloat16".
        rows: of a product; by default so many that it is at its best.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], precision: str, rows: int = _ROWS
    ) -> None:
        dtype = getattr(torch, precision)
        lay_out = torch.ops.mkldnn._reorder_linear_weight
        # As in a model, no layer finds the weights of another in a cache.
        weights = [lay_out(torch.randn(shape).to(dtype), rows) for shape in shapes]
        inputs = {width: torch.randn(rows, width).to(dtype) for _, width in shapes}
        self._products = [(inputs[s[1]], w) for s, w in zip(shapes, weights, strict=True)]
        self._rows = rows
        self.rates: list[float] = []

    def measure(self) -> None:
        """Add one figure, in tokens/s, to `rates`."""
        with torch.inference_mode():
            start = time.perf_counter()
            for x, weight in self._products:
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            self.rates.append(self._rows / (time.perf_counter() - start))

    @property
    def tokens_per_s(self) -> float:
        """Median of the figures."""
        return statistics.median(self.rates)

    @staticmethod
    def available(precision: str) -> bool:
        """Whether torch has what this needs."""
        mkldnn = torch.ops.mkldnn
        if not torch.backends.mkldnn.is_available() or not hasattr(mkldnn, "_linear_pointwise"):
            return False
        if precision == "bfloat16":
            return bool(mkldnn._is_mkldnn_bf16_supported())
        return precision == "float32"
