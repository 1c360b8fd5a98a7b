"""The folder of a run: its lock, its manifest, the journal of finished shards, and their files.

A shard is finished when a line of the journal says so. The line is written after the file of the
shard has its name and its bytes are on the disk, so a run may die anywhere: what has no line is
embedded again, into the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sbert_fast.cli.files import atomic_file
from sbert_fast.cli.streams import naming, note
from sbert_fast.corpus.inputs import CorpusError

VERSION = 1
MANIFEST = "_manifest.json"
JOURNAL = "_journal.jsonl"
REPORT = "_errors.jsonl"
LOCK = ".lock"
_TEMPORARY = (".[0-9]*.part", "._*.part")


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard that has been embedded.

    Attributes:
        shard: its number.
        rows: of its file.
        size: bytes of its file.
        sha256: of its file.
        bad: line or row and what is wrong with it, of every bad row.
    """

    shard: int
    rows: int
    size: int
    sha256: str
    bad: list[tuple[int, str]]


class Folder:
    """The folder of a run, locked against other runs until it is left.

    Args:
        path: of the folder; it is made if only it is missing.

    Attributes:
        manifest: what the run that is there is about; None if there is none.

    Raises:
        CorpusError: another run is at work there, or something else lies there.
        OSError: it cannot be made or written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] | None = None
        self._journal: Any = None
        self._is_new = False

    def __enter__(self) -> Folder:
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path}: the folder {self.path.parent} does not exist")
        if not self.path.is_dir():
            self.path.mkdir()
            self._is_new = True
        self._refuse_others()
        self._lock = open(self.path / LOCK, "a+")
        try:
            self._hold_lock()
            self._read_manifest()
        except BaseException:
            self._lock.close()
            raise
        self._remove_temporary()
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal is not None:
            self._journal.close()
        self._remove_temporary()
        if self.manifest is None:
            (self.path / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            self._lock.truncate(0)
        self._lock.close()
        if self.manifest is None and self._is_new:
            self.path.rmdir()

    def _refuse_others(self) -> None:
        names = sorted(name for name in os.listdir(self.path) if name[0] != ".")
        if names and MANIFEST not in names:
            raise CorpusError(
                f"{self.path} must be empty or hold an earlier run, got {names[0]!r} and no "
                f"{MANIFEST}"
            )

    def _hold_lock(self) -> None:
        """Linux frees the lock when the process ends, however it does."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK)):
                raise BlockingIOError  # its owner was about to remove it
        except (BlockingIOError, FileNotFoundError):
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            raise CorpusError(f"{self.path} is in use by {owner}: wait until it ends") from None
        with naming(str(self.path / LOCK)):
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._lock.flush()

    def _read_manifest(self) -> None:
        path = self.path / MANIFEST
        if not path.exists():
            return
        try:
            manifest = json.loads(path.read_bytes())
            version = manifest["version"]
        except (ValueError, TypeError, KeyError):
            raise CorpusError(f"{path} is not the manifest of a run") from None
        if version != VERSION:
            raise CorpusError(f"{path} has version {version}: this release reads {VERSION}")
        self.manifest = manifest

    def part(self, shard: int) -> Path:
        """The file of a shard."""
        assert self.manifest is not None
        digits = max(5, len(str(len(self.manifest["shards"]) - 1)))
        return self.path / f"part-{shard:0{digits}}.{self.manifest['options']['output_format']}"

    def _clear(self) -> None:
        """Remove an earlier run, its manifest last."""
        if self.manifest is None:
            return
        for shard in range(len(self.manifest["shards"])):
            self.part(shard).unlink(missing_ok=True)
        for name in (REPORT, JOURNAL, MANIFEST):
            (self.path / name).unlink(missing_ok=True)
        self._sync()
        self.manifest = None

    def begin(self, manifest: dict[str, Any]) -> None:
        """Start a run in the place of an earlier one: only its manifest is there."""
        self._clear()
        self._write(MANIFEST, [manifest], indent=1)
        self.manifest = manifest
        self._open_journal([])

    def finished(self) -> list[Finished]:
        """The shards that are finished and whose files are as they were then, in order."""
        assert self.manifest is not None
        records = self.manifest.get("finished")
        if records is None:
            records = _read_journal(self.path / JOURNAL)
        last = {record["shard"]: Finished(**record) for record in records}
        return [last[shard] for shard in sorted(last) if self._is_whole(last[shard])]

    def resume(self, finished: list[Finished]) -> None:
        """Go on with the run that is there, of which :meth:`finished` gave these shards."""
        assert self.manifest is not None
        complete = self.manifest.get("finished")
        if complete is not None and len(complete) == len(finished):
            (self.path / JOURNAL).unlink(missing_ok=True)
            return
        self._open_journal(finished)
        if self.manifest.pop("finished", None) is not None:
            self._write(MANIFEST, [self.manifest], indent=1)

    def _is_whole(self, finished: Finished) -> bool:
        path = self.part(finished.shard)
        try:
            with open(path, "rb") as stream:
                whole = os.fstat(stream.fileno()).st_size == finished.size
                whole = whole and hashlib.file_digest(stream, "sha256").hexdigest() == (
                    finished.sha256
                )
        except FileNotFoundError:
            whole = False
        if not whole:
            note(f"warning: {path} is missing or damaged: its texts are embedded again")
        return whole

    def add(self, temporary: Path, finished: Finished) -> None:
        """Take in the file of a shard, whose bytes are on the disk under a temporary name."""
        os.replace(temporary, self.part(finished.shard))
        self._sync()
        with naming(str(self.path / JOURNAL)):
            self._journal.write(_line(asdict(finished)))
            self._journal.flush()
            os.fsync(self._journal.fileno())

    def finish(self, finished: Iterable[Finished], report: list[dict[str, Any]] | None) -> None:
        """Say that the run is complete.

        Args:
            finished: all shards, in order.
            report: the bad rows, if they do not stop a run.
        """
        assert self.manifest is not None
        if report is not None:
            self._write(REPORT, report)
        self.manifest["finished"] = [asdict(shard) for shard in finished]
        self._write(MANIFEST, [self.manifest], indent=1)
        self._journal.close()
        (self.path / JOURNAL).unlink()
        self._sync()

    def _open_journal(self, finished: list[Finished]) -> None:
        """A journal that says this much, which may be less than it said."""
        self._write(JOURNAL, [asdict(shard) for shard in finished])
        self._journal = open(self.path / JOURNAL, "ab")

    def _write(self, name: str, records: list[dict[str, Any]], indent: int | None = None) -> None:
        with atomic_file(self.path / name, overwrite=True) as stream:
            for record in records:
                stream.write(_line(record, indent))
        self._sync()

    def _sync(self) -> None:
        """Names in the folder are on the disk."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _remove_temporary(self) -> None:
        for pattern in _TEMPORARY:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)


def _line(record: dict[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(record, indent=indent).encode() + b"\n"


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a journal; its last line may have been cut off."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]
