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
from typing import TYPE_CHECKING, Any

from sbert_fast.bench.machine import pin
from sbert_fast.bench.systems import Setting

if TYPE_CHECKING:
    from sbert_fast.bench.contenders import Contender


def memory_of(each: Contender, **what: Any) -> dict[str, float]:
    """Encode a corpus in a new process.

    Args:
        each: the system, at its setting.
        what: `model`: its folder; `corpus`: name or path; `texts`: how many; `seed`: of the corpus;
            `threads`: CPU threads; `onnx`: the ONNX export, if the system needs it; `low_memory`:
            of ours.

    Returns:
        `loaded_rss_mb` before the first text, `peak_rss_mb` of the whole process, `seconds`.

    Raises:
        RuntimeError: the process failed.
    """
    asked = json.dumps(what | each.named | {"setting": each.setting}, default=str)
    # -P: a folder `kernels` where the user happens to be is not Hugging Face's package.
    command = [sys.executable, "-P", "-m", "sbert_fast.bench.memory", asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{each}: its process ended with {done.returncode}")
    held: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return held


def resident_mb(field: str) -> float:
    # Not getrusage: its maximum starts from that of the process which forked this one.
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1000 if found else float("nan")


def _main(asked: dict[str, Any]) -> None:
    pin(asked["threads"])
    from sbert_fast.bench import runtimes
    from sbert_fast.bench.checkpoint import Checkpoint
    from sbert_fast.bench.corpora import load_corpus

    folder = Checkpoint(Path(asked["model"]), asked["threads"])
    built = runtimes.build(
        asked["system"],
        asked["precision"],
        folder,
        Path(asked["onnx"]),
        asked.get("low_memory", False),
    )
    # By a tokenizer of its own, so that no system finds one that is loaded already.
    count = Checkpoint(folder.path, asked["threads"]).count
    lines = load_corpus(asked["corpus"], asked["texts"], asked["seed"], count)
    loaded = resident_mb("VmRSS")
    start = time.perf_counter()
    built.encode(lines, Setting(*asked["setting"]))
    result = {
        "loaded_rss_mb": loaded,
        "peak_rss_mb": resident_mb("VmHWM"),
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
