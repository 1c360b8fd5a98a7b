"""Thread limits of a benchmark process."""

from __future__ import annotations

import os

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
