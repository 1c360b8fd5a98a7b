"""Calls that wait in a queue: what each is, and the future that its caller has."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from sbert_fast.values import shown

Priority = Literal["query", "bulk"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


@dataclass(slots=True, eq=False)
class Work:
    """A call that can run.

    Attributes:
        inputs: what :meth:`Runner.run` takes; sliceable unless `key` is None.
        sizes: tokens of each input.
        key: calls with equal keys may share a batch; a call without one runs alone and whole.
        options: of the call, for the runner.
        room: most tokens of a batch; an input that is longer is a batch.
        truncated: inputs that were cut.
        is_single: whether the caller passed one input, not a list.
        owner: kept alive until the call has run.
    """

    inputs: Any
    sizes: list[int]
    key: Hashable
    options: dict[str, Any]
    room: int = 0
    truncated: int = 0
    is_single: bool = False
    owner: Any = None


class Runner(Protocol):
    """What a queue runs work with, on its thread."""

    def join(self, parts: list[Any]) -> Any:
        """The inputs of some calls, one after the other."""

    def run(self, inputs: Any, options: dict[str, Any]) -> Any:
        """The results of inputs; sliceable unless the call has no key."""

    def finish(self, work: Work, parts: list[Any]) -> Any:
        """The result of a call, given slices of the results of its batches."""


class Pending(Future[Any]):
    """The future of a call.

    `cancel` succeeds until the result is there: what has not begun to run is then dropped.

    Attributes:
        tokens: of all inputs, special tokens included.
        truncated: inputs that were cut.
        waited: seconds until the first of its batches began; 0 before that.
        computed: seconds that its batches took so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.truncated = 0, 0
        self.waited, self.computed = 0.0, 0.0


@dataclass(slots=True)
class Held:
    """What a queue counts of a call as waiting."""

    tokens: int = 0
    texts: int = 0


@dataclass(slots=True, eq=False)
class Waiting:
    """A call in a queue.

    Attributes:
        deadline: of its last batch, by `time.monotonic`.
        next: the first of its inputs that no batch has.
        parts: results of its batches.
    """

    work: Work
    pending: Pending
    deadline: float | None
    submitted: float
    next: int = 0
    is_settled: bool = False
    parts: list[Any] = field(default_factory=list)
    held: Held = field(default_factory=Held)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def is_over(self) -> bool:
        """Whether nothing of it is to run any more; if it was cancelled, who waits is told."""
        if self.pending.cancelled():
            self._settle()
        return self.is_settled

    def succeed(self, result: Any) -> None:
        if self._settle():
            self.pending.set_result(result)

    def fail(self, error: BaseException) -> None:
        if self._settle():
            self.pending.set_exception(error)

    def _settle(self) -> bool:
        """Whether it is for the caller to set the result: for the first, unless it is cancelled."""
        with self.lock:
            if self.is_settled:
                return False
            self.is_settled = True
            return self.pending.set_running_or_notify_cancel()


def check_turn(priority: object, deadline: object) -> None:
    """Refuse what says neither when nor how long a call waits.

    Raises:
        ValueError: names the argument.
    """
    if priority not in PRIORITIES:
        raise ValueError(f"priority must be one of {PRIORITIES}, got {shown(priority)}")
    if deadline is not None and (
        isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not deadline >= 0
    ):
        raise ValueError(f"deadline must be None or seconds from now, got {shown(deadline)}")
