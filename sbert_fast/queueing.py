"""A queue of calls in this process: one thread runs them, merged into batches."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from sbert_fast.errors import DeadlineError, QueueClosedError, QueueFullError
from sbert_fast.pending import (
    PRIORITIES,
    Held,
    Pending,
    Priority,
    Runner,
    Waiting,
    Work,
    check_turn,
)

# A call, and which of its inputs are in a batch: from, to.
_Part = tuple[Waiting, int, int]

# Batches of queries that run in a row while bulk work waits.
_QUERIES_IN_A_ROW = 4
# An idle thread ends: it would keep what OpenMP and torch keep for a thread.
_IDLE_SECONDS = 10.0
# Share of the newest batch in the measured rate.
_NEWEST = 0.2


class BatchQueue:
    """Runs calls from any thread on one thread of its own, merged into batches.

    Calls of equal keys share batches; a call that does not fit is cut. Queries run before bulk
    work, which gets every fifth batch while both wait. A call that fails in a batch with others
    runs again, as they do, apart.

    Args:
        runner: what runs a batch.

    Attributes:
        max_tokens, max_texts: what may wait. A call that finds nothing waiting is always taken.
        on_batch: called with the texts, tokens and seconds of every batch, on the queue's thread.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_tokens: int = 1 << 22,
        max_texts: int = 1 << 18,
    ) -> None:
        self.max_tokens, self.max_texts = max_tokens, max_texts
        self.on_batch: Callable[[int, int, float], None] | None = None
        self._runner, self._rate = runner, 0.0
        self._is_closed = False
        self._reset()
        _queues.add(self)

    def _reset(self) -> None:
        """Start empty, without a thread: that of a parent process is not in its forked child."""
        self._changed = threading.Condition()
        self._waiting: dict[Priority, deque[Waiting]] = {name: deque() for name in PRIORITIES}
        self._tokens = self._texts = self._queries_run = 0
        self._thread: threading.Thread | None = None

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait to run."""
        return self._tokens

    @property
    def waiting_texts(self) -> int:
        """Texts that wait to run."""
        return self._texts

    @property
    def seconds_to_wait(self) -> float:
        """How long what waits will take at the present rate; 0 before the first batch."""
        return self._tokens / self._rate if self._rate else 0.0

    def put(
        self,
        work: Work,
        priority: Priority = "query",
        deadline: float | None = None,
        *,
        is_counted: bool = True,
    ) -> Pending:
        """Have a call run.

        Args:
            work: the call.
            priority: "query" runs before "bulk".
            deadline: seconds from now until it must have begun; what of it has not is dropped.
            is_counted: whether it is refused where too much waits, and waits itself.

        Raises:
            QueueFullError: too much waits already.
            QueueClosedError: the queue was closed.
            ValueError: `priority` or `deadline` is invalid.
        """
        check_turn(priority, deadline)
        now, pending = time.monotonic(), Pending()
        pending.tokens, pending.truncated = sum(work.sizes), work.truncated
        texts = len(work.sizes)
        call = Waiting(work, pending, None if deadline is None else now + deadline, now)
        with self._changed:
            if self._is_closed:
                raise QueueClosedError("the queue was closed")
            if (
                is_counted
                and self._texts
                and (
                    self._tokens + pending.tokens > self.max_tokens
                    or self._texts + texts > self.max_texts
                )
            ):
                raise QueueFullError(
                    f"{self._texts} texts with {self._tokens} tokens wait already, of at most "
                    f"{self.max_texts} and {self.max_tokens}: {texts} texts with "
                    f"{pending.tokens} tokens do not fit",
                    self.seconds_to_wait,
                )
            if self._thread is None:
                self._start()
            if is_counted:
                self._hold(call.held, pending.tokens, texts)
            self._waiting[priority].append(call)
            self._changed.notify()
        held = call.held
        pending.add_done_callback(lambda _: self._hold(held, 0, 0))
        return pending

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="sbert_fast queue", daemon=True)
        thread.start()
        self._thread = thread

    def _hold(self, held: Held, tokens: int, texts: int) -> None:
        """Count so much of a call as waiting."""
        with self._changed:
            self._tokens += tokens - held.tokens
            self._texts += texts - held.texts
            held.tokens, held.texts = tokens, texts

    def close(self) -> None:
        """Let the batch that runs end, fail what waits, take nothing more."""
        with self._changed:
            self._is_closed = True
            left = [call for calls in self._waiting.values() for call in calls]
            for calls in self._waiting.values():
                calls.clear()
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        for call in left:
            call.fail(QueueClosedError("the queue was closed before the call ran"))
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        try:
            while (parts := self._next()) is not None:
                if parts:
                    self._run(parts)
                # Results must not stay alive while the thread waits.
                del parts
        finally:
            with self._changed:
                if self._thread is threading.current_thread():
                    self._thread = None
                    # Only an error leaves calls behind.
                    if any(self._waiting.values()):
                        self._start()

    def _next(self) -> list[_Part] | None:
        """The next batch, empty if there is none after all; None if the thread is to end."""
        with self._changed:
            while not any(self._waiting.values()):
                me = threading.current_thread()
                woken = not self._is_closed and self._changed.wait(_IDLE_SECONDS)
                if self._thread is not me or not (woken or any(self._waiting.values())):
                    self._thread = None if self._thread is me else self._thread
                    return None
            dropped = self._drop()
            parts = self._take()
        for call in dropped:
            seconds = time.monotonic() - call.submitted
            call.fail(DeadlineError(f"the deadline passed: the call waited {seconds:.3f} s"))
        return parts

    def _drop(self) -> list[Waiting]:
        """Remove calls that are cancelled or failed, and return those past their deadline."""
        now, late = time.monotonic(), []
        for name, calls in self._waiting.items():
            kept: deque[Waiting] = deque()
            for call in calls:
                if call.is_over():
                    continue
                if call.deadline is not None and call.deadline < now:
                    late.append(call)
                else:
                    kept.append(call)
            self._waiting[name] = kept
        return late

    def _take(self) -> list[_Part]:
        """The parts of calls that are the next batch, taken out of what waits."""
        queries, bulk = self._waiting["query"], self._waiting["bulk"]
        is_query = bool(queries) and not (bulk and self._queries_run >= _QUERIES_IN_A_ROW)
        self._queries_run = self._queries_run + 1 if is_query and bulk else 0
        name: Priority = "query" if is_query else "bulk"
        calls = self._waiting[name]
        if not calls:
            return []
        key, room, parts = calls[0].work.key, calls[0].work.room, list[_Part]()
        for call in calls:
            if parts and (key is None or call.work.key != key):
                continue
            sizes, first = call.work.sizes, call.next
            last = len(sizes) if key is None else first
            while last < len(sizes) and (sizes[last] <= room or not (parts or last > first)):
                room -= sizes[last]
                last += 1
            if last == first and sizes:
                break
            parts.append((call, first, last))
            call.next = last
            if call.held.texts:
                left = call.held.tokens - sum(sizes[first:last])
                self._hold(call.held, left, len(sizes) - last)
        whole = {call for call, _, last in parts if last == len(call.work.sizes)}
        self._waiting[name] = deque(call for call in calls if call not in whole)
        return parts

    def _run(self, parts: list[_Part]) -> None:
        parts = [part for part in parts if not part[0].is_over()]
        if len(parts) > 1 and self._ran(parts):
            return
        # Alone, or again: whose fault it was shows when they run one by one.
        for part in parts:
            if not part[0].is_over():
                self._ran([part])

    def _ran(self, parts: list[_Part]) -> bool:
        """Run a batch; False if it failed. A call that was alone in it is told."""
        try:
            rows = self._compute(parts)
        except BaseException as error:
            if len(parts) == 1:
                parts[0][0].fail(error)
            return False
        self._deliver(parts, rows)
        return True

    def _compute(self, parts: list[_Part]) -> Any:
        """The results of a batch, one after the other, or the result of a call without a key."""
        started = time.monotonic()
        for call, first, _ in parts:
            if not first:
                call.pending.waited = started - call.submitted
        work = parts[0][0].work
        inputs = [work.inputs] if work.key is None else [_inputs(part) for part in parts]
        joined = inputs[0] if len(inputs) == 1 else self._runner.join(inputs)
        rows = self._runner.run(joined, work.options)
        self._count(parts, time.monotonic() - started)
        return rows

    def _deliver(self, parts: list[_Part], rows: Any) -> None:
        offset = 0
        for call, first, last in parts:
            try:
                if call.work.key is None:
                    call.succeed(rows)
                    continue
                start, offset = offset, offset + last - first
                call.parts.append(rows[start:offset])
                if last == len(call.work.sizes):
                    call.succeed(self._runner.finish(call.work, call.parts))
            except BaseException as error:
                call.fail(error)

    def _count(self, parts: list[_Part], seconds: float) -> None:
        tokens = sum(sum(call.work.sizes[first:last]) for call, first, last in parts)
        rate = tokens / max(seconds, 1e-9)
        self._rate = rate if not self._rate else self._rate + _NEWEST * (rate - self._rate)
        for call, _, _ in parts:
            call.pending.computed += seconds
        if self.on_batch is not None:
            self.on_batch(sum(last - first for _, first, last in parts), tokens, seconds)


def _inputs(part: _Part) -> Any:
    call, first, last = part
    return call.work.inputs[first:last]


_queues: weakref.WeakSet[BatchQueue] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """No thread may be in a kernel while the interpreter goes away."""
    for queue in list(_queues):
        queue.close()


def _reset_all() -> None:
    for queue in list(_queues):
        queue._reset()


os.register_at_fork(after_in_child=_reset_all)
