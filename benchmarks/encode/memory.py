"""The memory of one system, in a process of its own.

As a program, which `memory_of` runs, it encodes a corpus once and prints, as JSON, what it held.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common.options import pin
from benchmarks.encode.runtimes import Setting


def memory_of(name: str, precision: str, setting: Setting, **what: Any) -> dict[str, float]:
    """Encode a corpus in a new process.

    Args:
        name, precision, setting: of the system.
        what: `model`: its folder; `corpus`: name or path; `texts`: how many; `seed`: of the corpus;
            `threads`: CPU threads; `onnx`: the ONNX export, if the system needs it.

    Returns:
        `loaded_rss_mb` before the first text, `peak_rss_mb` of the whole process, `seconds`.

    Raises:
        RuntimeError: the process failed.
    """
    what |= {"name": name, "precision": precision, "setting": setting}
    asked = json.dumps(what, default=str)
    # Like this process from the root of the source tree.
    command = [sys.executable, "-m", "benchmarks.encode.memory", asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {precision}: its process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident_mb(field: str) -> float:
    # Not getrusage: its maximum starts from that of the process which forked this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) / 1000


def _main(asked: dict[str, Any]) -> None:
    pin(asked["threads"])
    from benchmarks.common.checkpoints import Checkpoint
    from benchmarks.common.corpora import load_corpus
    from benchmarks.encode import runtimes

    folder = Checkpoint(Path(asked["model"]), asked["threads"])
    built = runtimes.build(asked["name"], asked["precision"], folder, Path(asked["onnx"]))
    # By a tokenizer of its own, so that no system finds one that is loaded already.
    count = Checkpoint(folder.path, asked["threads"]).count
    lines = load_corpus(asked["corpus"], asked["texts"], asked["seed"], count)
    loaded = _resident_mb("VmRSS")
    start = time.perf_counter()
    built.encode(lines, Setting(*asked["setting"]))
    result = {
        "loaded_rss_mb": loaded,
        "peak_rss_mb": _resident_mb("VmHWM"),
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
