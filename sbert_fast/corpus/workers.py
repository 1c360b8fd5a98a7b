"""Shards through one process or several; a process that dies is noticed and named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from sbert_fast.cli.streams import described
from sbert_fast.corpus.inputs import Shard
from sbert_fast.corpus.task import Part, Progress, Task
from sbert_fast.errors import SbertFastError

Check = Callable[[dict[str, str]], None]
Events = Generator[Progress | Part, None, None]


class WorkerError(SbertFastError, RuntimeError):
    """A process that has died, or what stopped it."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """What stopped a worker: exceptions do not always survive the way to another process."""

    message: str


def in_this_process(task: Task, shards: Sequence[Shard], check: Check) -> Events:
    """Embed shards, one after the other.

    Args:
        task: what to do.
        shards: in the order in which they are embedded.
        check: called with the identity of the model before anything is embedded; may raise.

    Yields:
        What :meth:`Worker.run` does, for every shard.
    """
    from sbert_fast.corpus.worker import Worker

    worker = Worker(task)
    check(worker.identity)
    for shard in shards:
        yield from worker.run(shard)


def in_processes(task: Task, shards: Sequence[Shard], check: Check, count: int) -> Events:
    """The same in `count` processes of their own, in the order in which they finish.

    Raises:
        WorkerError: a process has died, or failed; all others have been ended, too.
    """
    context = multiprocessing.get_context("spawn")
    left = deque(shards)
    children: dict[Connection, tuple[SpawnProcess, Shard | None]] = {}
    try:
        for _ in range(max(1, min(count, len(left)))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(task, theirs), daemon=True)
            process.start()
            theirs.close()
            children[ours] = process, None
        while children:
            for connection in wait(list(children)):
                assert isinstance(connection, Connection)
                process, shard = children[connection]
                message = _receive(connection, process, task, shard)
                if isinstance(message, Progress):
                    yield message
                    continue
                if isinstance(message, Part):
                    yield message
                else:
                    check(message)
                shard = left.popleft() if left else None
                children[connection] = process, shard
                # If it has died meanwhile, the next message tells.
                with suppress(BrokenPipeError):
                    connection.send(shard)
                if shard is None:
                    del children[connection]
                    process.join()
    finally:
        for process, _ in children.values():
            process.kill()
        for process, _ in children.values():
            process.join()


def _receive(connection: Connection, process: SpawnProcess, task: Task, shard: Shard | None) -> Any:
    """The next message of a worker that is still alive."""
    try:
        message = connection.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        end = f"ended with code {code}"
        if code < 0:
            end = f"was killed by {signal.Signals(-code).name}"
        place = "while it was loading the model"
        if shard is not None:
            place = f"in {task.files[shard.file].path}, shard {shard.number}"
        raise WorkerError(
            f"a worker (process {process.pid}) {end} {place}: --resume goes on with the rest"
        ) from None
    if isinstance(message, _Failure):
        raise WorkerError(message.message)
    return message


def _serve(task: Task, connection: Connection) -> None:
    """What a worker process runs."""
    # Ctrl-C goes to the whole group of processes; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with redirect_stdout(sys.stderr):
            from sbert_fast.corpus.worker import Worker

            worker = Worker(task)
            connection.send(worker.identity)
            while (shard := connection.recv()) is not None:
                for message in worker.run(shard):
                    connection.send(message)
    except Exception as error:
        if os.environ.get("SBERT_FAST_DEBUG") == "1":
            traceback.print_exc()
        connection.send(_Failure(described(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
