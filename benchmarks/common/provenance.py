"""Where a result comes from: date, commit, sources, machine, versions."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from sbert_fast.bench.machine import describe_cpu, origin

# What is timed, by kind of device.
_SOURCES = {
    "cpu": ("sbert_fast/**/*.py", "csrc/common/*.*", "csrc/cpu/*.*", "csrc/host/*.*"),
    "cuda": (
        *("sbert_fast/**/*.py", "kernels/**/*.py"),
        *(f"csrc/{room}/**/*.*" for room in ("common", "cuda", "host")),
    ),
    # What sbert_fast/ops/choices.py goes by.
    "cuda kernels": ("csrc/cuda/**/*.*",),
}
_WRITTEN_BY_THE_BUILD = "sbert_fast/_build_info.py"


def source_hash(root: Path = ROOT, kind: str = "cpu") -> str:
    """SHA-256 over the names and contents of the sources that benchmarks on a `kind` of device
    time."""
    found = (path for pattern in _SOURCES[kind] for path in root.glob(pattern) if path.is_file())
    files = {path.relative_to(root).as_posix() for path in found}
    digest = hashlib.sha256()
    for name in sorted(files - {_WRITTEN_BY_THE_BUILD}):
        content = root.joinpath(name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def provenance(threads: int, kind: str = "cpu") -> dict[str, Any]:
    """When, on what, and from which sources a run is made."""
    return {
        **origin(_gpu(threads) if kind == "cuda" else describe_cpu(threads)),
        "commit": commit(),
        "source_sha256": source_hash(kind=kind),
        **({"kernels_sha256": source_hash(kind="cuda kernels")} if kind == "cuda" else {}),
    }


def commit() -> str | None:
    """The commit of the sources, with "+" behind it where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.check_output([*command, "--dirty=+"], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.decode().strip()


def _gpu(threads: int) -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    asked = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        told = [part.strip() for part in done.stdout.split(",")]
    except (OSError, subprocess.TimeoutExpired):
        told = []
    return {
        "name": found.name,
        "kind": "cuda",
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda,
        "smi": dict(zip(asked, told, strict=False)),
        "cpu": describe_cpu(threads),
    }
