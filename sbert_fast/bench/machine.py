"""The machine that a run is made on: its threads, its load, what is installed on it."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sbert_fast.bench.names import say

SCHEMA = 1
PACKAGES = (
    *("sbert-fast", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy"),
    *("onnx", "onnxruntime", "openvino", "nncf", "zentorch", "triton", "flash-attn"),
)
# Load average per CPU above which figures are doubtful.
BUSY = 0.1
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def pin(threads: int) -> None:
    """Give every thread pool of this process and its children `threads` CPUs and threads.

    Comes before libraries are imported, which read the variables once. Progress bars are off, too.

    Raises:
        ValueError: this process may not use that many CPUs.
    """
    available = sorted(os.sched_getaffinity(0))
    if threads > len(available):
        raise ValueError(f"threads must be at most {len(available)} here, got {threads}")
    os.sched_setaffinity(0, available[:threads])
    os.environ |= {name: str(threads) for name in _VARIABLES}
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "TQDM_DISABLE": "1"}


def origin(device: dict[str, Any]) -> dict[str, Any]:
    """When, on what `device`, and with which packages a run is made."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "load_average_before": list(os.getloadavg()),
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in PACKAGES},
    }


def warn_if_busy(document: dict[str, Any], threads: int) -> None:
    """Say so where the machine had other work before the run."""
    load = document["load_average_before"][0]
    if load > BUSY * threads:
        say(f"this machine is busy (load average {load:.2f}): the figures will be doubtful")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_cpu(threads: int) -> dict[str, Any]:
    """The CPU, of which `threads` are used."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    fields = dict(re.findall(r"^(\S[^\t:]*?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    flags = set(fields.get("flags", "").split())
    model = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        model += f" (family {fields['cpu family']}, model {fields['model']})"
    return {
        "name": f"{model}, {threads} thread{'s' if threads > 1 else ''}",
        "kind": "cpu",
        "threads": threads,
        "cpus": os.cpu_count(),
        "mhz": fields.get("cpu MHz"),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
    }
