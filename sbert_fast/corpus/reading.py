"""Shards -> chunks of texts, with what is wrong with bad rows, and the columns that are kept."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple, cast

from sbert_fast.cli import readers
from sbert_fast.cli.readers import CsvReader, Reader
from sbert_fast.cli.rows import Row, RowError, import_pyarrow, open_parquet
from sbert_fast.corpus.columns import Columns
from sbert_fast.corpus.inputs import CorpusError, InputFile, Shard
from sbert_fast.corpus.streams import (
    Part,
    check_unchanged,
    consumed,
    header_of,
    lines_before,
    make_reader,
    opened,
)

_PARQUET_ROWS = 512


@dataclass(slots=True)
class Chunk:
    """Consecutive rows of a shard.

    Attributes:
        texts: None where the row is bad.
        numbers: of the rows, for :meth:`ShardReader.place`.
        bad: what is wrong with the rows that are bad, by their index.
        table: the pyarrow table of what is stored beside embeddings; None where nothing is.
        weight: of the shard's, how much lies before the end of this chunk.
    """

    texts: list[str | None]
    numbers: list[int]
    bad: dict[int, str] = field(default_factory=dict)
    table: Any = None
    weight: int = 0


class ShardReader:
    """The chunks of one shard, to be iterated over once.

    Args:
        file: the file that the shard lies in.
        shard: which part of it.
        text_field: name of the field or column that holds the text.
        columns: what is stored beside embeddings; None for nothing.

    Raises:
        RowError: while iterating, where the rest of the shard cannot be read.
        CorpusError: while iterating, if the file is not the one that the run began with.
    """

    def __init__(
        self, file: InputFile, shard: Shard, text_field: str, columns: Columns | None
    ) -> None:
        self.file, self.shard = file, shard
        self._field, self._columns = text_field, columns
        self.unit = "row" if file.format == "parquet" else "line"

    def __iter__(self) -> Iterator[Chunk]:
        with opened(self.file) as stream:
            try:
                parquet = self.file.format == "parquet"
                yield from self._row_group(stream) if parquet else self._lines(stream)
            except RowError as error:
                raise self.error(error.number, error.reason) if error.number else error from None
        check_unchanged(self.file, os.stat(self.file.path))

    @cached_property
    def _before(self) -> int:
        """Rows of the file before those of the shard, or lines."""
        if self.file.compression or self.shard.start == 0:
            return 0
        with open(self.file.path, "rb") as stream:
            if self.file.format != "parquet":
                return lines_before(stream, self.shard.start)
            metadata = open_parquet(stream, self.file.path, self._field).metadata
            return sum(metadata.row_group(group).num_rows for group in range(self.shard.start))

    def place(self, number: int) -> int:
        """The line or row of the file that a number of a chunk stands for, counted from 1."""
        return self._before + number

    def error(self, number: int, reason: str) -> RowError:
        """What stops a run at a row."""
        place = self.place(number)
        return RowError(f"{self.file.path}: {self.unit} {place}: {reason}", place, reason)

    def _lines(self, stream: BinaryIO) -> Iterator[Chunk]:
        start, length = self.shard.start, self.shard.end - self.shard.start
        source: Any = stream
        if not self.file.compression:
            stream.seek(start)
            source = Part(stream, length)
        reader = make_reader(self.file, source, self._field)
        reader.begins_file = start == 0
        if start and isinstance(reader, CsvReader):
            reader.header = header_of(self.file, self._field)
        for rows in _grouped(reader):
            chunk = Chunk([], [])
            for index, row in enumerate(rows):
                chunk.numbers.append(row.number)
                chunk.texts.append(None if isinstance(row, RowError) else row.text)
                if isinstance(row, RowError):
                    chunk.bad[index] = row.reason
            if self._columns is not None:
                good = [None if isinstance(row, RowError) else row for row in rows]
                header = getattr(reader, "header", None) or ()
                chunk.table = self._columns.of_rows(good, header)
            chunk.weight = reader.bytes_read
            if self.file.compression:
                chunk.weight = consumed(stream)
            yield chunk

    def _row_group(self, stream: BinaryIO) -> Iterator[Chunk]:
        pyarrow = import_pyarrow()
        file = open_parquet(cast(io.BufferedIOBase, stream), self.file.path, self._field)
        groups = list(range(self.shard.start, self.shard.end))
        total = sum(file.metadata.row_group(group).num_rows for group in groups)
        names = [self._field] if self._columns is None else self._columns.names
        read = size = 0
        held: list[Any] = []
        texts: list[str | None] = []
        bad: dict[int, str] = {}
        try:
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=names):
                found = _texts_of(batch.column(batch.schema.get_field_index(self._field)))
                for index, text in enumerate(found, len(texts)):
                    if not isinstance(text, str):
                        bad[index] = f"field {self._field!r} must be a string, got {text.got}"
                held.append(batch)
                texts += [text if isinstance(text, str) else None for text in found]
                size += sum(len(text) for text in found if isinstance(text, str))
                read += len(found)
                full = len(texts) >= readers.CHUNK_TEXTS or size >= readers.CHUNK_BYTES
                if full or read == total:
                    chunk = Chunk(texts, list(range(read - len(texts) + 1, read + 1)), bad)
                    if self._columns is not None:
                        table = pyarrow.Table.from_batches(held)
                        chunk.table = self._columns.of_table(table, texts)
                    chunk.weight = self.shard.weight * read // total
                    yield chunk
                    held, texts, bad, size = [], [], {}, 0
        except pyarrow.ArrowException as error:
            raise CorpusError(f"{self.file.path}: row group {groups[0]}: {error}") from None


class _NoText(NamedTuple):
    """What stands in the place of a text."""

    got: str


def _texts_of(column: Any) -> list[str | _NoText]:
    """The values of a column of strings."""
    try:
        return [_NoText("null") if text is None else text for text in column.to_pylist()]
    except UnicodeDecodeError:
        pass
    texts: list[str | _NoText] = []
    for value in column.cast("string").cast("binary").to_pylist():
        try:
            texts.append(_NoText("null") if value is None else value.decode())
        except UnicodeDecodeError:
            texts.append(_NoText("bytes that are not UTF-8"))
    return texts


def _grouped(reader: Reader) -> Iterator[list[Row | RowError]]:
    """All rows in chunks of the same sizes as :func:`readers.read_chunks` makes."""
    rows: list[Row | RowError] = []
    start = reader.bytes_read
    for row in reader.items():
        rows.append(row)
        full = reader.bytes_read - start >= readers.CHUNK_BYTES
        if full or len(rows) >= readers.CHUNK_TEXTS:
            yield rows
            rows, start = [], reader.bytes_read
    if rows:
        yield rows
