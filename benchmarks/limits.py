"""What the machine allows: the linear layers of a model alone, which every system must compute."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from roofline import layer_shapes

# Rows of a product: large enough that oneDNN is at its best.
ROWS = 2048


class LinearLayers:
    """The linear layers of one forward pass, by oneDNN through torch with weights prepacked.

    Args:
        config: config.json of a BERT-family model.
        precision: "float32" or "bfloat16".
    """

    def __init__(self, config: dict[str, Any], precision: str) -> None:
        dtype = getattr(torch, precision)
        self._layers = config["num_hidden_layers"]
        self._products = []
        shapes = layer_shapes(config["hidden_size"], config["intermediate_size"])
        for outputs, inputs in shapes.values():
            weight = torch.randn(outputs, inputs).to(dtype)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            self._products.append((torch.randn(ROWS, inputs).to(dtype), packed))
        self.rates: list[float] = []

    def measure(self) -> None:
        """Add one figure, in tokens/s, to `rates`."""
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(self._layers):
                for x, weight in self._products:
                    torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            self.rates.append(ROWS / (time.perf_counter() - start))

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(self.rates)


def available(precision: str) -> bool:
    """Whether torch has what `LinearLayers` needs."""
    mkldnn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(mkldnn, "_linear_pointwise"):
        return False
    return precision == "float32" or bool(mkldnn._is_mkldnn_bf16_supported())
