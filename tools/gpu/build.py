"""Builds the native libraries in place, the CUDA ops for the GPU of this machine alone.

Where TORCH_CUDA_ARCH_LIST is set it is obeyed.
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks import ROOT


def main() -> int:
    import torch

    if torch.cuda.is_available():
        target = ".".join(map(str, torch.cuda.get_device_capability()))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", target)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=ROOT, check=False)
    if built.returncode:
        return built.returncode
    told = "from sbert_fast.ops.extension import CUDA; print('CUDA ops:', CUDA.reason or CUDA.path)"
    return subprocess.run([sys.executable, "-c", told], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
