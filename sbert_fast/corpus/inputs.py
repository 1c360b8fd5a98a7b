"""Arguments -> input files -> shards: a row group of a Parquet file, or a range of bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO

from sbert_fast.cli.readers import FORMATS
from sbert_fast.cli.rows import open_parquet
from sbert_fast.cli.streams import naming
from sbert_fast.errors import SbertFastError

COMPRESSIONS = ("gz", "zst")
_BLOCK_BYTES = 1 << 16
# What is hashed of a large file: this many blocks, evenly spread, the first and the last included.
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


class CorpusError(SbertFastError, ValueError):
    """What stopped a run over a corpus, or kept it from starting."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the corpus.

    Attributes:
        path: absolute.
        format: a key of :data:`FORMATS`.
        compression: one of :data:`COMPRESSIONS`, or None.
        size: bytes.
        mtime_ns: when it was last written to.
        digest: SHA-256 of its size and of samples of its content; of all of it up to 1 MiB.
    """

    path: str
    format: str
    compression: str | None
    size: int
    mtime_ns: int
    digest: str


@dataclass(frozen=True, slots=True)
class Shard:
    """What becomes one output file.

    Attributes:
        number: its place in the order of all rows, from 0.
        file: index of the input file.
        start, end: bytes of the file, or row groups of a Parquet file.
        weight: bytes, for progress: of the text column of a Parquet file, compressed where it is.
    """

    number: int
    file: int
    start: int
    end: int
    weight: int


def find_files(
    arguments: Sequence[str], file_format: str | None, output: str | os.PathLike[str]
) -> tuple[list[tuple[str, str, str | None]], int]:
    """The files that arguments stand for, in order: files as they are named, those of a folder and
    its subfolders, or of a pattern, sorted.

    Names that begin with "." or "_" are left out of folders. What lies in the output folder is left
    out of folders and patterns around it.

    Args:
        arguments: files, folders and patterns.
        file_format: a key of :data:`FORMATS` for all files; None goes by the extensions, and
            leaves files with other ones out of folders.
        output: folder that the run writes to.

    Returns:
        Absolute path, format and compression of each file; how many files with other extensions
        were left out.

    Raises:
        CorpusError: an argument stands for nothing, lies in the output folder, is named twice or
            has no known extension.
    """
    found: dict[str, tuple[str, str, str | None]] = {}
    ignored = 0
    folder = os.path.realpath(output)
    for argument in arguments:
        paths = [argument]
        is_folder = os.path.isdir(argument)
        if is_folder:
            paths = list(_walk(argument))
        elif has_magic(argument) and not os.path.exists(argument):
            paths = sorted(path for path in glob(argument, recursive=True) if os.path.isfile(path))
        if _lies_in(os.path.realpath(argument), folder):
            raise CorpusError(f"-o {output} must be apart from the inputs, got {argument}")
        kept = 0
        for path in paths:
            name = os.path.realpath(path)
            if _lies_in(name, folder):
                continue
            kind = file_format or _extension(path)[0]
            if kind is None and is_folder:
                ignored += 1
                continue
            if kind is None:
                raise CorpusError(f"{path}: expected {_known()}, or --input-format")
            if name in found:
                raise CorpusError(f"{path} is among the inputs twice")
            found[name] = (os.path.abspath(path), kind, _extension(path)[1])
            kept += 1
        if not kept:
            raise CorpusError(f"{argument}: expected files with {_known()}, got none")
    return list(found.values()), ignored


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _walk(folder: str) -> Iterator[str]:
    for path, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        yield from (os.path.join(path, name) for name in sorted(names) if name[0] not in "._")


def _raise(error: OSError) -> None:
    raise error


def _extension(path: str) -> tuple[str | None, str | None]:
    """The format and the compression that a file's name tells."""
    suffixes = [suffix.lower().removeprefix(".") for suffix in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    kind = suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None
    if kind == "parquet" and compression:
        kind = None  # its pages are compressed already, and it must be read from anywhere
    return kind, compression


def _known() -> str:
    names = ", ".join(f".{name}" for name in FORMATS)
    return f"one of {names} (all but Parquet also with .gz or .zst)"


def describe(path: str, file_format: str, compression: str | None) -> InputFile:
    """A file as it is now."""
    if not os.path.isfile(path):
        raise CorpusError(f"{path}: expected a regular file")
    with open(path, "rb") as stream, naming(path):
        status = os.fstat(stream.fileno())
        digest = hashlib.sha256(str(status.st_size).encode())
        if status.st_size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            last = status.st_size - _SAMPLE_BYTES
            for sample in range(_SAMPLES):
                stream.seek(last * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return InputFile(
        path, file_format, compression, status.st_size, status.st_mtime_ns, digest.hexdigest()
    )


def cut(files: Sequence[InputFile], field: str, step: int) -> list[Shard]:
    """All shards of a corpus; every file has at least one.

    Args:
        files: in order.
        field: name of the field or column that holds the text.
        step: bytes of a shard, rounded up to whole rows.

    Raises:
        RowError: a Parquet or CSV file is not one, or has no such column.
    """
    shards: list[Shard] = []
    for index, file in enumerate(files):
        for start, end, weight in _cut_file(file, field, step):
            shards.append(Shard(len(shards), index, start, end, weight))
    return shards


def _cut_file(file: InputFile, field: str, step: int) -> Iterator[tuple[int, int, int]]:
    if file.format == "parquet":
        yield from _row_groups(file, field)
        return
    if file.compression is not None:
        yield 0, file.size, file.size
        return
    ends = _row_ends(file, field, step) if "sv" in file.format else _line_ends(file, step)
    start = 0
    for end in ends:
        yield start, end, end - start
        start = end
    if start < file.size or start == 0:
        yield start, file.size, file.size - start


def _row_groups(file: InputFile, field: str) -> Iterator[tuple[int, int, int]]:
    with open(file.path, "rb") as stream:
        metadata = open_parquet(stream, file.path, field).metadata
        for group in range(metadata.num_row_groups):
            columns = (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
            weight = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
            yield group, group + 1, weight
        if metadata.num_row_groups == 0:
            yield 0, 0, 0


def _row_ends(file: InputFile, field: str, step: int) -> Iterator[int]:
    """Where rows of a CSV or TSV file end that begin at least `step` bytes after the last such row:
    a quoted value may hold line ends, so all of the file is read."""
    with open(file.path, "rb") as stream:
        reader = FORMATS[file.format](stream, file.path, field)
        last = 0
        for _ in reader.items():
            if reader.bytes_read - last >= step and reader.bytes_read < file.size:
                last = reader.bytes_read
                yield last


def _line_ends(file: InputFile, step: int) -> Iterator[int]:
    with open(file.path, "rb") as stream, naming(file.path):
        end = 0
        while (end := _line_end(stream, end + step, file.size)) < file.size:
            yield end


def _line_end(stream: BinaryIO, position: int, size: int) -> int:
    r"""The first line end at or behind `position`: `\n`, `\r\n` or `\r`."""
    position -= 1
    stream.seek(position)
    while position < size and (block := stream.read(_BLOCK_BYTES)):
        places = [place for place in (block.find(b"\n"), block.find(b"\r")) if place >= 0]
        if not places:
            position += len(block)
            continue
        where = min(places)
        position += where + 1
        if block[where : where + 1] == b"\r":
            stream.seek(position)
            position += stream.read(1) == b"\n"
        return position
    return size
