"""Input files as streams of bytes: decompressed, in parts, and the files that they were."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from sbert_fast.cli.readers import FORMATS, CsvReader, Reader
from sbert_fast.cli.rows import import_pyarrow
from sbert_fast.corpus.inputs import CorpusError, InputFile

_BLOCK_BYTES = 1 << 16


@contextmanager
def opened(file: InputFile) -> Iterator[BinaryIO]:
    """A file of the corpus, decompressed.

    Raises:
        CorpusError: it is not the file that the run began with, or its compressed data is bad.
    """
    with open(file.path, "rb") as raw:
        check_unchanged(file, os.fstat(raw.fileno()))
        if file.compression is None:
            yield raw
            return
        try:
            if file.compression == "gz":
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield cast(BinaryIO, stream)
            else:
                with import_pyarrow().CompressedInputStream(raw, "zstd") as stream:
                    yield cast(BinaryIO, _Decompressed(stream, raw))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise CorpusError(f"{file.path}: bad or incomplete gzip data: {error}") from None


class _Decompressed:
    """A zstd stream of pyarrow, whose errors name nothing."""

    def __init__(self, stream: Any, raw: BinaryIO) -> None:
        self._stream, self.raw = stream, raw

    def read1(self, size: int) -> bytes:
        try:
            return cast(bytes, self._stream.read(size))
        except OSError as error:
            if error.errno is not None:
                raise
            message = f"{self.raw.name}: bad or incomplete zstd data: {error}"
            raise CorpusError(message) from None


def consumed(stream: Any) -> int:
    """Compressed bytes that have been read."""
    raw = stream.raw if isinstance(stream, _Decompressed) else stream.fileobj
    return cast(int, raw.tell())


def check_unchanged(file: InputFile, status: os.stat_result) -> None:
    """Raise CorpusError unless a file has the size and the time that it had."""
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise CorpusError(
            f"{file.path} has changed since the run began: start again, in another folder or with "
            "--overwrite"
        )


def header_of(file: InputFile, text_field: str) -> list[str]:
    """The names of the columns of a CSV or TSV file; none in an empty one."""
    with opened(file) as stream:
        reader = make_reader(file, stream, text_field)
        assert isinstance(reader, CsvReader)
        next(reader.items(), None)
        return reader.header or []


def make_reader(file: InputFile, stream: Any, text_field: str) -> Reader:
    """A reader of what `stream` gives of a file."""
    return FORMATS[file.format](cast(io.BufferedIOBase, stream), file.path, text_field)


class Part:
    """The next `length` bytes of a stream."""

    def __init__(self, stream: BinaryIO, length: int) -> None:
        self._stream, self._left = stream, length

    def read1(self, size: int) -> bytes:
        block = self._stream.read(min(size, self._left))
        self._left -= len(block)
        return block


def lines_before(stream: BinaryIO, end: int) -> int:
    """How many lines end in the first `end` bytes."""
    lines, previous = 0, b""
    while end > 0 and (block := stream.read(min(_BLOCK_BYTES, end))):
        end -= len(block)
        lines += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
        lines -= previous == b"\r" and block.startswith(b"\n")
        previous = block[-1:]
    return lines
