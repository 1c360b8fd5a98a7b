"""Thread limits of a benchmark process, and the memory of one system in a process of its own.

As a program, which `memory_of` runs, it encodes a corpus once and prints, as JSON, what it held.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


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


def memory_of(
    system: str,
    precision: str,
    setting: tuple[int, int],
    *,
    model: Path,
    corpus: str,
    texts: int,
    seed: int,
    threads: int,
    onnx: Path,
) -> dict[str, float]:
    """Encode a corpus in a new process.

    Args:
        system: its name.
        precision: its precision.
        setting: rows of a batch, and batches at the same time.
        model: folder of the model.
        corpus: name or path.
        texts: how many.
        seed: of the corpus.
        threads: CPU threads.
        onnx: the ONNX export, if the system needs it.

    Returns:
        `loaded_rss_mb` before the first text, `peak_rss_mb` of the whole process, `seconds`.

    Raises:
        RuntimeError: the process failed.
    """
    arguments = (system, precision, *setting, model, corpus, texts, seed, threads, onnx)
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{system} {precision}: its process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident_mb(field: str) -> float:
    # Not getrusage: its maximum starts from that of the process which forked this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) / 1000


def _main(arguments: list[str]) -> None:
    system, precision, batch_size, workers, model, corpus, texts, seed, threads, onnx = arguments
    pin(int(threads))
    import peers
    from corpora import load_corpus
    from padded import ModelFolder, Setting

    folder = ModelFolder(Path(model), int(threads))
    built = peers.build(system, precision, folder, Path(onnx))
    lines = load_corpus(corpus, int(texts), int(seed))
    loaded = _resident_mb("VmRSS")
    start = time.perf_counter()
    built.encode(lines, Setting(int(batch_size), int(workers)))
    result = {
        "loaded_rss_mb": loaded,
        "peak_rss_mb": _resident_mb("VmHWM"),
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    _main(sys.argv[1:])
