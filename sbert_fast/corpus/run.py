"""A run over a corpus: what is asked for, what is there, what is left."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sbert_fast.cli.streams import note
from sbert_fast.corpus.columns import plan_columns
from sbert_fast.corpus.folder import VERSION, Finished, Folder
from sbert_fast.corpus.inputs import CorpusError, InputFile, Shard, cut, describe, find_files
from sbert_fast.corpus.task import Options, Part, Progress, Task
from sbert_fast.corpus.workers import in_processes, in_this_process

# Where a manifest says how the encoder was loaded; the number of threads may matter to its bits.
THREADS = "threads"


@dataclass(frozen=True, slots=True)
class Request:
    """What a run is asked to do.

    Attributes:
        inputs: files, folders and patterns.
        input_format: of all files; None goes by their names.
        output: folder to write to.
        options: how to embed.
        loading: how to load the encoder, compared with that of an earlier run; "threads" is filled
            in where it is None.
        load: loads the encoder, given the number of threads.
        shard_bytes: bytes of a shard, rounded up to whole rows.
        workers: processes.
        resume: go on with an earlier run.
        overwrite: remove an earlier run.
    """

    inputs: Sequence[str]
    input_format: str | None
    output: Path
    options: Options
    loading: dict[str, Any]
    load: Callable[[int], Callable[[], Any]]
    shard_bytes: int
    workers: int
    resume: bool
    overwrite: bool


class Meter(Protocol):
    """Is told how far a run is."""

    def begin(self, total: int, done: int) -> None:
        """`done` bytes of `total` were embedded by earlier runs."""

    def advance(self, texts: int, weight: int) -> None:
        """Texts have been embedded, with so many bytes."""


def run(request: Request, meter: Meter) -> list[Finished]:
    """Embed a corpus into a folder, or what is left of it.

    Args:
        request: what to do.
        meter: told how far it is.

    Returns:
        All shards, in order.

    Raises:
        CorpusError: the folder or the inputs are not fit for this, or not those of the earlier run.
        RowError: a row is bad, and that stops the run.
        WorkerError: a worker process failed.
        OSError: a file cannot be read or written.
    """
    found, ignored = find_files(request.inputs, request.input_format, request.output)
    if ignored:
        note(f"{ignored} files with other extensions are left out")
    with Folder(request.output) as folder:
        if folder.manifest is None or request.overwrite:
            return _Run(request, folder, _plan(request, found), []).go(meter)
        if not request.resume:
            raise CorpusError(
                f"{request.output} holds an earlier run: --resume goes on with it, --overwrite "
                "starts again"
            )
        _check_same(folder, request, found)
        return _Run(request, folder, folder.manifest, folder.finished()).go(meter)


def _plan(request: Request, found: Sequence[tuple[str, str, str | None]]) -> dict[str, Any]:
    """The manifest of a new run, but for the identity of its model."""
    options = request.options
    files = [describe(*file) for file in found]
    return {
        "version": VERSION,
        "options": _described(request, _threads(request)),
        "inputs": [asdict(file) for file in files],
        "json_types": plan_columns(files, options.field, options.keep_columns),
        "shards": [asdict(shard) for shard in cut(files, options.field, request.shard_bytes)],
    }


def _threads(request: Request) -> int:
    share = len(os.sched_getaffinity(0)) // request.workers
    return request.loading[THREADS] or max(1, share)


def _described(request: Request, threads: int) -> dict[str, Any]:
    """The options as the manifest has them."""
    options = asdict(request.options) | request.loading | {THREADS: threads}
    options |= options.pop("encode")
    if request.options.ranges is not None:
        with open(request.options.ranges, "rb") as stream:
            options["ranges"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return options | {"shard_bytes": request.shard_bytes}


def _check_same(
    folder: Folder, request: Request, found: Sequence[tuple[str, str, str | None]]
) -> None:
    """Refuse to go on with a run that had other options or inputs."""
    assert folder.manifest is not None
    then = folder.manifest["options"]
    now = _described(request, request.loading[THREADS] or then[THREADS])
    differing = [name for name in now if now[name] != then.get(name)]
    if differing:
        told = "; ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in differing)
        raise CorpusError(f"{folder.path} holds a run with other options: {told}")
    earlier = [InputFile(**file) for file in folder.manifest["inputs"]]
    names = [(file.path, file.format, file.compression) for file in earlier]
    for path, _, _ in sorted(set(names) ^ set(found), key=str):
        kind = "is no longer among them" if path in {n[0] for n in names} else "is new"
        raise CorpusError(f"{folder.path} holds a run with other inputs: {path} {kind}")
    if names != found:
        raise CorpusError(f"{folder.path} holds a run with these inputs in another order")
    for file, name in zip(earlier, found, strict=True):
        if describe(*name) != file:
            raise CorpusError(
                f"{file.path} is not what it was when the run in {folder.path} began: start "
                "again, in another folder or with --overwrite"
            )


class _Run:
    """The shards that are left, and what has to be kept of them."""

    def __init__(
        self,
        request: Request,
        folder: Folder,
        manifest: dict[str, Any],
        finished: Sequence[Finished],
    ) -> None:
        self._request, self._folder, self._manifest = request, folder, manifest
        self._files = [InputFile(**file) for file in manifest["inputs"]]
        self._shards = [Shard(**shard) for shard in manifest["shards"]]
        self._finished = {shard.shard: shard for shard in finished}

    def go(self, meter: Meter) -> list[Finished]:
        request = self._request
        threads = self._manifest["options"][THREADS]
        task = Task(
            request.load(threads),
            request.options,
            self._files,
            self._manifest["json_types"],
            request.output,
        )
        left = [shard for shard in self._shards if shard.number not in self._finished]
        total = sum(shard.weight for shard in self._shards)
        started = False

        def check(identity: dict[str, str]) -> None:
            nonlocal started
            self._check_identity(identity)
            if not started:
                self._begin()
                meter.begin(total, total - sum(shard.weight for shard in left))
            started = True

        if request.workers == 1:
            events = in_this_process(task, left, check)
        else:
            events = in_processes(task, left, check, request.workers)
        with closing(events):
            for event in events:
                if isinstance(event, Progress):
                    meter.advance(event.texts, event.weight)
                elif isinstance(event, Part):
                    self._folder.add(event.temporary, event.finished)
                    self._finished[event.finished.shard] = event.finished
        finished = [self._finished[shard.number] for shard in self._shards]
        if "finished" not in self._manifest:
            self._folder.finish(finished, self._report(finished))
        return finished

    def _check_identity(self, identity: dict[str, str]) -> None:
        """Refuse to go on with another model than that of the run, which a new one gets here."""
        then = self._manifest.setdefault("identity", identity)
        if then != identity:
            told = "; ".join(
                f"{name} was {then.get(name)}, is {identity[name]}"
                for name in identity
                if identity[name] != then.get(name)
            )
            raise CorpusError(f"{self._folder.path} holds a run of another model or system: {told}")

    def _begin(self) -> None:
        """Nothing in the folder has changed before the model is known to be the right one."""
        if self._folder.manifest is self._manifest:
            self._folder.resume(list(self._finished.values()))
        else:
            self._folder.begin(self._manifest)

    def _report(self, finished: Sequence[Finished]) -> list[dict[str, Any]] | None:
        """Every bad row, if they do not stop a run."""
        if self._request.options.on_error == "stop":
            return None
        report = []
        for shard in finished:
            file = self._files[self._shards[shard.shard].file]
            unit = "row" if file.format == "parquet" else "line"
            for place, reason in shard.bad:
                report.append({"file": file.path, unit: place, "reason": reason})
        return report
