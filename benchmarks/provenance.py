"""Where a result comes from: date, commit, sources, machine, versions; and how it is stored."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
PACKAGES = (
    *("sbert-fast", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy"),
    *("onnx", "onnxruntime", "openvino", "zentorch"),
)
_SOURCES = ("sbert_fast/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h")
_WRITTEN_BY_THE_BUILD = "sbert_fast/_build_info.py"
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def source_hash(root: Path = ROOT) -> str:
    """SHA-256 over the names and contents of the sources that the benchmarks time."""
    files = {path.relative_to(root).as_posix() for p in _SOURCES for path in root.glob(p)}
    digest = hashlib.sha256()
    for name in sorted(files - {_WRITTEN_BY_THE_BUILD}):
        content = root.joinpath(name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def provenance(threads: int) -> dict[str, Any]:
    """When, on what, and from which sources a run is made."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "source_sha256": source_hash(),
        "device": _cpu(threads),
        "load_average_before": list(os.getloadavg()),
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the sources, with "+" behind it where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu(threads: int) -> dict[str, Any]:
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


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a document so that `path` holds either all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=1, allow_nan=False)
            stream.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
