"""Benchmarks of sbert_fast, run from the root of the source tree: `python -m benchmarks.encode`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# `python -m` puts the root on the path, where the folder kernels would pass for Hugging Face's
# package of that name.
if Path(sys.path[0]).resolve() == ROOT:
    del sys.path[0]
