"""Forks of a process that has a model: the child waits for no lost thread and no held lock."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("sbert_fast")

# omp_pause_hard of OpenMP 5.0: give back the threads, and start them again when they are needed.
_PAUSE_HARD = 2


class Lock:
    """A lock that is free in a forked child, even if another thread held it during the fork.

    Args:
        make: of which kind it is.
    """

    def __init__(self, make: Callable[[], Any] = threading.Lock) -> None:
        self._make = make
        self._lock = make()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def reset(self) -> None:
        self._lock = self._make()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _openmp() -> Any:
    """torch's OpenMP library if it is GNU's: LLVM's and Intel's know of forks."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*")):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None


class _Forks:
    """Hooks of `os.fork`: the parent's OpenMP threads end before it and start again after it."""

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
        # tokenizers waits for the lost threads if it is told to use threads.
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
                "thread here; spawn processes instead of forking them to have more"
            )
            torch.set_num_threads(1)


_forks = _Forks()
settle = _forks.settle
os.register_at_fork(before=_forks.before, after_in_child=_forks.in_child)
