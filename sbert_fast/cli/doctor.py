"""Show what this installation runs on: versions, CPU, GPUs, native libraries, which op runs where.

Include the output in a bug report. Of your files, it names only the folder of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from sbert_fast.cli.streams import standard_output

PACKAGES = (
    "sbert-fast",
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "numpy",
    "triton",
    "pyarrow",
)
VARIABLES = (
    "SBERT_FAST_IMPL",
    "SBERT_FAST_DEBUG",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "RAYON_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "TORCH_CUDA_ARCH_LIST",
)
# Of the hundred flags that Linux lists, the ones that decide how fast an encoder runs.
_CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
_CPUINFO = Path("/proc/cpuinfo")
_NO_TILES = "Linux refuses this process the use of tiles, or the CPU has none for int8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 1 if a part of it could not be made, which the report explains."""
    with standard_output() as stream:
        report = examine()
        text = json.dumps(report, indent=2) if args.json else _render(report)
        # A path may hold what the console cannot show.
        stream.write(f"{text}\n".encode(sys.stdout.encoding, "backslashreplace"))
    return int(any("error" in section for section in report.values() if isinstance(section, dict)))


def examine() -> dict[str, Any]:
    """Everything there is to report, ready for JSON.

    A section that cannot be made is `{"error": reason}`: a broken installation is what this is for.
    """
    sections: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "environment": lambda: {n: os.environ[n] for n in VARIABLES if n in os.environ},
        "cpu": _cpu,
        "threads": _threads,
        "cuda": _cuda,
        "libraries": _libraries,
        "build": _build,
        "linear layers": _linears,
        "ops": _ops,
    }
    report = {}
    for name, section in sections.items():
        try:
            report[name] = section()
        except Exception as error:
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    return report


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _cpu() -> dict[str, Any]:
    import torch

    try:
        from sbert_fast import _host

        name = _host.cpu_name()
        features = [feature for feature, usable in _host.cpu_features().items() if usable]
    except ImportError:
        text = _CPUINFO.read_text() if _CPUINFO.is_file() else ""
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = model[1] if model else platform.processor() or "unknown"
        flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
        features = [flag for flag in _CPU_FLAGS if flags and flag in flags[1].split()]
    return {
        "name": name,
        "machine": platform.machine(),
        "features": features,
        "torch capability": torch.backends.cpu.get_cpu_capability(),
    }


def _threads() -> dict[str, int | None]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processors": os.cpu_count(),
        "usable processors": usable,
        "torch threads": torch.get_num_threads(),
        "torch interop threads": torch.get_num_interop_threads(),
    }


def _cuda() -> dict[str, Any]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory GiB": round(device.total_memory / 2**30, 1),
                "multiprocessors": device.multi_processor_count,
            }
        )
    return {"torch built for": torch.version.cuda, "devices": devices}


def _libraries() -> dict[str, Any]:
    """The path of each native library, and the reason if this machine cannot use it."""
    import torch

    from sbert_fast.ops import extension

    libraries: dict[str, dict[str, Any]] = {}
    for found in vars(extension).values():
        if isinstance(found, extension.Extension):
            path = str(found.path) if found.path else None
            reason = found.reason
            if found is extension.CUDA:
                reason = extension.cuda_refusal(torch.device("cuda"))
            libraries[found.name] = {"path": path, "reason": reason}
            if found.targets:
                targets = list(found.targets)
                libraries[found.name] |= {"CUDA": found.cuda, "compiled for": targets}
    if extension.CPU.available:
        libraries[extension.CPU.name] |= {
            "instruction set": torch.ops.sbert_fast.cpu_isa(),
            "instruction sets": torch.ops.sbert_fast.cpu_isas().split(","),
        }
    try:
        from sbert_fast import _host

        libraries["_host"] = {"path": _host.__file__, "reason": None}
        if _host.cpu_features()["amx_bf16"] and extension.CPU.available:
            granted = "amx_bf16" in libraries[extension.CPU.name]["instruction sets"]
            libraries[extension.CPU.name]["AMX"] = "available" if granted else _NO_TILES
    except ImportError as error:
        libraries["_host"] = {"path": None, "reason": str(error)}
    return libraries


def _build() -> dict[str, Any] | None:
    """What setup.py noted: what it built, with what, and why it left the rest out."""
    try:
        from sbert_fast import _build_info
    except ImportError:
        return None
    return {name.lower(): value for name, value in vars(_build_info).items() if name.isupper()}


def _linears() -> dict[str, str]:
    """What linear layers run on, and why on nothing faster: panels (the C++ ops), onednn
    (prepacked), or torch."""
    import torch

    from sbert_fast.linears import choose
    from sbert_fast.target import Target, takes_high

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    targets = [
        Target(dtype, device, high=takes_high(dtype, device))
        for device in map(torch.device, devices)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return {f"{each.device} {str(each.dtype)[6:]}": str(choose(each)) for each in targets}


def _ops() -> list[dict[str, Any]]:
    """What `auto` picks on each device in each dtype, and why it rejects the others."""
    import torch

    from sbert_fast import ops
    from sbert_fast.errors import ImplementationError

    table = []
    for device in map(torch.device, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            row: dict[str, Any] = {"device": device.type, "dtype": str(dtype)[6:]}
            try:
                row["implementation"] = ops.resolve(device, dtype)
            except (ImplementationError, ValueError) as error:
                row |= {"implementation": None, "reason": str(error)}
            reasons = {name: ops.refusal(name, device, dtype) for name in ops.IMPLEMENTATIONS}
            row["refused"] = {name: why for name, why in reasons.items() if why is not None}
            table.append(row)
    return table


def _render(report: dict[str, Any]) -> str:
    lines: list[str] = []
    for title, section in report.items():
        if title == "ops" and isinstance(section, list):
            section = {f"{row['device']} {row['dtype']}": _render_op(row) for row in section}
        lines += [title, *_render_value(section, "  "), ""]
    return "\n".join(lines[:-1])


def _render_op(row: dict[str, Any]) -> str:
    chosen = row["implementation"] or f"none: {row['reason']}"
    refused = "; ".join(f"not {name}: {why}" for name, why in row["refused"].items())
    return f"{chosen} ({refused})" if refused else chosen


def _render_value(value: Any, indent: str) -> list[str]:
    """An indented outline of nested dicts and lists."""
    if not value and not isinstance(value, bool):
        return [f"{indent}none"]
    lines: list[str] = []
    if isinstance(value, list):
        return [f"{indent}{_inline(item)}" for item in value]
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}", *_render_value(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_inline(item)}")
    return lines


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items() if item) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_inline, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
