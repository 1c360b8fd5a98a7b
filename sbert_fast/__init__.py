"""Sentence embeddings faster, by changing one line.

from sbert_fast import FastEncoder        # instead of SentenceTransformer
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "FastCrossEncoder",
    "FastEncoder",
    "PackedCollator",
    "accelerate",
    "counts",
    "explain",
    "restore",
]

if TYPE_CHECKING:
    from sbert_fast.explanation import explain
    from sbert_fast.patching import accelerate, counts, restore
    from sbert_fast.sentence_transformers.collator import PackedCollator
    from sbert_fast.sentence_transformers.cross_encoder import FastCrossEncoder
    from sbert_fast.sentence_transformers.encoder import FastEncoder

# Imported on first use, so that `import sbert_fast` alone stays cheap.
_HOMES = {
    "FastCrossEncoder": "sentence_transformers.cross_encoder",
    "FastEncoder": "sentence_transformers.encoder",
    "PackedCollator": "sentence_transformers.collator",
    "accelerate": "patching",
    "restore": "patching",
    "counts": "patching",
    "explain": "explanation",
    "ops": "ops",
    "errors": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sbert_fast' has no attribute {name!r}")
    module = importlib.import_module(f"sbert_fast.{_HOMES[name]}")
    return module if name in ("ops", "errors") else getattr(module, name)
