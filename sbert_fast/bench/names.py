"""Names as they stand in results; progress, and errors in a line."""

from __future__ import annotations

import sys

OURS, OURS_CUDA = "sbert-fast", "sbert-fast cuda"
REFERENCE, UNPADDED, COMPILED = "sentence-transformers", "st-unpadded", "torch-compile"
PEERS = (REFERENCE, "onnxruntime", "openvino", "zentorch", COMPILED)
PRECISIONS = ("float32", "bfloat16", "int8")
ALONE = "linear layers alone"


def say(text: str) -> None:
    """Tell what is going on, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def message(error: BaseException) -> str:
    """An exception in one line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:160]
