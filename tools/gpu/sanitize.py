"""compute-sanitizer over the CUDA ops: `python -m tools.gpu.sanitize memcheck`.

First over a small program with a mistake that the tool must find, then over a few tests of the ops,
in which it must find none. Exit code: 0 clean, 1 an error, 2 the tool cannot be used here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import ROOT

sys.path.insert(0, str(ROOT / "csrc"))
import nvcc  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND = 86  # exit code that stands for errors found
TESTS = ["tests/test_gpu_ops.py", "-k", "every_implementation and cuda or every_cuda_kernel"]
# One mistake for each tool.
_PROGRAM = """
#include <cstdio>
__global__ void beyond(int* x) { x[threadIdx.x + (1 << 20)] = 1; }
__global__ void race(int* x) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  x[threadIdx.x] = shared[63 - threadIdx.x];
}
__global__ void unwritten(int* x) { x[threadIdx.x] = x[threadIdx.x + 64] + 1; }
int main() {
  int* x = nullptr;
  if (cudaMalloc(&x, 128 * sizeof(int)) != cudaSuccess) return 3;
  PLANTED<<<1, 64>>>(x);
  cudaDeviceSynchronize();
  return 0;
}
"""
PLANTED = {"memcheck": "beyond", "racecheck": "race", "initcheck": "unwritten"}


def plant(compiler: Path, tool: str, folder: Path) -> Path:
    """A program with a mistake for `tool`, compiled for the GPU of this machine."""
    source, program = folder / "planted.cu", folder / "planted"
    source.write_text(_PROGRAM)
    command = [str(compiler), f"-DPLANTED={PLANTED[tool]}", "-arch=native", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def unusable(tool: str, reason: str) -> int:
    print(f"{tool}: not run: {reason}")
    return 2


def main(tool: str) -> int:
    if tool not in TOOLS:
        return unusable(tool, f"the tool must be one of {', '.join(TOOLS)}, got {tool!r}")
    try:
        compiler = nvcc.find_nvcc(["g++"]).path
    except nvcc.Unavailable as reason:
        return unusable(tool, str(reason))
    name = "compute-sanitizer"
    program = shutil.which(name) or shutil.which(name, path=compiler.parent)
    if program is None:
        return unusable(tool, f"there is no compute-sanitizer on the PATH or beside {compiler}")
    checked = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
    with tempfile.TemporaryDirectory() as folder:
        planted = subprocess.run([*checked, str(plant(compiler, tool, Path(folder)))], check=False)
    if planted.returncode != FOUND:
        return unusable(tool, "it does not find the planted mistake on this machine")
    # Torch asks the driver for what it may not have. Its kernels are looked at only where the tool
    # has to know what they write.
    ours = ["--target-processes=all"]
    ours += ["--report-api-errors", "no"] if tool == "memcheck" else []
    ours += ["--kernel-name", "kernel_substring=sbert_fast"] if tool != "initcheck" else []
    # torch's allocator hands out parts of larger blocks, whose ends the tool cannot see.
    without_cache = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    tests = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(
        [*without_cache, *checked, *ours, *tests],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    # Tests that were skipped have shown nothing.
    if done.returncode == 0 and ("skipped" in done.stdout or " passed" not in done.stdout):
        return unusable(tool, "the CUDA ops do not run here, see above")
    print(f"{tool}: {'clean' if done.returncode == 0 else 'errors'}")
    return int(done.returncode != 0)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:2] or ["memcheck"]))
