"""Processes that are forked from one that has a model: no thread is missed, no lock stays taken."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("sbert_fast")

# omp_pause_hard of OpenMP 5.0: give back the threads, and start them again when they are needed.
_PAUSE_HARD = 2


class Lock:
    """A lock of this process: a child that is forked while another thread holds it has it free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def reset(self) -> None:
        self._lock = threading.Lock()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _openmp() -> Any:
    """torch's library of OpenMP, where that is GNU's: those of LLVM and Intel know of forks."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*")):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None


class _Forks:
    """Hooks of `os.fork`: the parent's threads of OpenMP end before it and start anew after it."""

    def __init__(self) -> None:
        self._library = _openmp()
        self._is_paused = False
        self._process = os.getpid()

    def before(self) -> None:
        self._is_paused = (
            self._library is not None and self._library.omp_pause_resource_all(_PAUSE_HARD) == 0
        )

    def in_child(self) -> None:
        for lock in list(_locks):
            lock.reset()
        # tokenizers waits for threads that are missing, where it is told to use some.
        if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("true", "on", "1"):
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self._is_paused:
            self._process = os.getpid()

    def settle(self) -> None:
        """Run on one thread in a child whose parent may have taken threads along."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        for lock in list(_locks):
            lock.reset()
        if torch.get_num_threads() > 1:
            logger.warning(
                "this process was forked from one that had threads running: torch computes on one "
                "thread here; start processes by spawning them to have more"
            )
            torch.set_num_threads(1)


_forks = _Forks()
settle = _forks.settle
os.register_at_fork(before=_forks.before, after_in_child=_forks.in_child)
