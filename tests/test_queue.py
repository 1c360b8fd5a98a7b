"""The queue: which calls share a batch, whose turn it is, what is dropped."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest

from sbert_fast.errors import (
    DeadlineError,
    QueueClosedError,
    QueueFullError,
)
from sbert_fast.pending import Work
from sbert_fast.queueing import BatchQueue

ROOM = 10


class Recorder:
    """A runner that notes every batch, and doubles numbers; the first batch waits for `gate`."""

    def __init__(self) -> None:
        self.gate, self.batches = threading.Event(), list[list[Any]]()
        self.began = threading.Event()

    def join(self, parts: list[Any]) -> Any:
        return [each for part in parts for each in part]

    def run(self, inputs: Any, options: dict[str, Any]) -> Any:
        self.batches.append(list(inputs))
        self.began.set()
        assert self.gate.wait(30)
        if "poison" in inputs:
            raise ValueError("poison")
        return [each * 2 for each in inputs]

    def finish(self, work: Work, parts: list[Any]) -> Any:
        return self.join(parts)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def queue(recorder: Recorder) -> Iterator[BatchQueue]:
    """A queue whose thread is in a batch of its own until the gate opens."""
    queue = BatchQueue(recorder)
    queue.put(work(["first"], key="first"))
    assert recorder.began.wait(30)
    recorder.batches.clear()
    yield queue
    recorder.gate.set()
    queue.close()


def work(inputs: list[Any], key: Any = "key", sizes: list[int] | None = None) -> Work:
    return Work(inputs, sizes or [1] * len(inputs), key, {}, room=ROOM)


def test_equal_calls_share_batches(queue: BatchQueue, recorder: Recorder) -> None:
    calls = [queue.put(work([n], sizes=[4])) for n in range(5)]
    other = queue.put(work([7], key="other"))
    alone = [queue.put(work([n], key=None)) for n in (8, 9)]
    assert (queue.waiting_texts, queue.waiting_tokens) == (8, 23)
    recorder.gate.set()
    assert [call.result(30) for call in calls] == [[0], [2], [4], [6], [8]]
    # What runs alone is passed back as the runner gives it.
    assert [call.result(30) for call in (other, *alone)] == [[14], [16], [18]]
    assert recorder.batches == [[0, 1], [2, 3], [4], [7], [8], [9]]
    assert (queue.waiting_texts, queue.waiting_tokens) == (0, 0)


def test_a_thread_that_cannot_start_leaves_nothing_behind(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    queue = BatchQueue(recorder)
    recorder.gate.set()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="can't start"):
            queue.put(work([1]))
    assert queue.waiting_texts == 0
    assert queue.put(work([2])).result(30) == [4]
    queue.close()


def test_cancelled_while_it_is_settled(queue: BatchQueue, recorder: Recorder) -> None:
    """A cancellation between the look at a call and its failure."""
    call = queue.put(work(["poison", 1], sizes=[ROOM, ROOM]))
    begin = call.set_running_or_notify_cancel

    def cancelled_first() -> bool:
        call.cancel()
        return begin()

    call.set_running_or_notify_cancel = cancelled_first  # type: ignore[method-assign]
    recorder.gate.set()
    with pytest.raises(CancelledError):
        call.result(30)
    assert queue.put(work([2])).result(30) == [4]


def test_an_error_of_the_queue_ends_no_call_that_waits(
    queue: BatchQueue, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    run, failed = BatchQueue._run, list[Any]()

    def broken(self: BatchQueue, parts: Any) -> None:
        if not failed:
            failed.append(parts)
            raise RuntimeError("of the queue")
        run(self, parts)

    monkeypatch.setattr(BatchQueue, "_run", broken)
    queue.put(work([1], key="other"))
    waits = queue.put(work([2]))
    recorder.gate.set()
    assert waits.result(30) == [4]


def test_a_call_keeps_nothing_alive(queue: BatchQueue, recorder: Recorder) -> None:
    class Input:
        def __mul__(self, other: int) -> int:
            return other

    given = Input()
    alive = weakref.ref(given)
    recorder.gate.set()
    call = queue.put(work([given]))
    assert call.result(30) == [2]
    recorder.batches.clear()
    del given
    # The thread lets go of it after it has told.
    assert queue.put(work([1])).result(30) == [2]
    gc.disable()
    try:
        assert alive() is None
    finally:
        gc.enable()


def test_calls_are_cut_to_batches(queue: BatchQueue, recorder: Recorder) -> None:
    call = queue.put(work([1, 2, 3, 4, 5], sizes=[6, 6, 3, 99, 1]))
    recorder.gate.set()
    assert call.result(30) == [2, 4, 6, 8, 10]
    assert recorder.batches == [[1], [2, 3], [4], [5]]
    assert call.tokens == 115
    assert call.computed > 0


def test_queries_come_first_but_bulk_is_not_starved(queue: BatchQueue, recorder: Recorder) -> None:
    bulk = queue.put(work([f"b{n}" for n in range(4)], sizes=[ROOM] * 4), "bulk")
    queries = [queue.put(work([f"q{n}"], sizes=[ROOM])) for n in range(9)]
    recorder.gate.set()
    wait([bulk, *queries], 30)
    order = [batch[0] for batch in recorder.batches]
    assert order == "q0 q1 q2 q3 b0 q4 q5 q6 q7 b1 q8 b2 b3".split()


def test_a_query_waits_for_two_batches_at_most(queue: BatchQueue, recorder: Recorder) -> None:
    """The one that runs when it comes, and one of bulk work whose turn it is."""
    recorder.gate.set()
    bulk = queue.put(work(list(range(400)), sizes=[ROOM] * 400), "bulk")
    for _ in range(20):
        before = len(recorder.batches)
        queue.put(work(["query"])).result(30)
        between = recorder.batches[before:].index(["query"])
        assert between <= 2
    bulk.cancel()


def test_cancelled_work_is_dropped(queue: BatchQueue, recorder: Recorder) -> None:
    kept, gone = queue.put(work([1])), queue.put(work([2]))
    assert gone.cancel()
    assert queue.waiting_texts == 1
    recorder.gate.set()
    assert kept.result(30) == [2]
    assert recorder.batches == [[1]]
    assert wait([gone], 30).not_done == set()


def test_a_call_is_cancelled_between_its_batches(queue: BatchQueue, recorder: Recorder) -> None:
    call = queue.put(work(list(range(100)), sizes=[ROOM] * 100))
    queue.on_batch = lambda *_: call.cancel()
    recorder.gate.set()
    with pytest.raises(CancelledError):
        call.result(30)
    assert queue.put(work([5])).result(30) == [10]
    assert len(recorder.batches) <= 2
    assert queue.waiting_texts == 0


def test_deadlines(queue: BatchQueue, recorder: Recorder) -> None:
    late = queue.put(work([1]), deadline=0.0)
    cut = queue.put(work([2, 3], sizes=[ROOM] * 2), deadline=0.05)
    early = queue.put(work([4]), deadline=30)
    time.sleep(0.06)
    recorder.gate.set()
    for call in (late, cut):
        with pytest.raises(DeadlineError, match=r"waited 0\.\d+ s"):
            call.result(30)
    assert isinstance(late.exception(), TimeoutError)
    assert early.result(30) == [8]
    assert recorder.batches == [[4]]


def test_poison_fails_its_own_call(queue: BatchQueue, recorder: Recorder) -> None:
    calls = [queue.put(work([each])) for each in (1, "poison", 2)]
    recorder.gate.set()
    assert calls[0].result(30) == [2]
    assert calls[2].result(30) == [4]
    with pytest.raises(ValueError, match="poison"):
        calls[1].result(30)
    assert recorder.batches == [[1, "poison", 2], [1], ["poison"], [2]]


def test_limits(queue: BatchQueue, recorder: Recorder) -> None:
    queue.max_texts, queue.max_tokens = 3, 20
    queue.put(work([1, 2], sizes=[9, 9]))
    for inputs, sizes in (([3], [5]), ([3, 4], [1, 1])):
        with pytest.raises(QueueFullError, match="2 texts with 18 tokens wait already"):
            queue.put(work(inputs, sizes=sizes))
    queue.put(work([5], sizes=[5]), is_counted=False)
    assert (queue.waiting_texts, queue.waiting_tokens) == (2, 18)
    recorder.gate.set()
    # More than may wait is taken where nothing waits.
    queue.put(work([5])).result(30)
    assert len(queue.put(work([1] * 9, sizes=[5] * 9)).result(30)) == 9


def test_a_closed_queue(queue: BatchQueue, recorder: Recorder) -> None:
    call = queue.put(work([1]))
    closing = threading.Thread(target=queue.close)
    closing.start()
    with pytest.raises(QueueClosedError):
        call.result(30)
    recorder.gate.set()
    closing.join(30)
    with pytest.raises(QueueClosedError):
        queue.put(work([1]))
