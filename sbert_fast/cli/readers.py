"""Rows of text from files of several formats, one at a time and in order."""

from __future__ import annotations

import csv
import itertools
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from typing import Any, ClassVar

from sbert_fast.cli.rows import Row, RowError, column_names, open_parquet
from sbert_fast.cli.streams import STDIN, naming, standard_input
from sbert_fast.values import lone_surrogate

# Whichever comes first closes a chunk. Half a million tokens are plenty to sort and batch, and few
# enough to show progress often and to keep memory flat.
CHUNK_TEXTS = 8192
CHUNK_BYTES = 2 << 20

_BLOCK_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
# Otherwise a quote that is never closed would collect the rest of the file in one field.
_CSV_FIELD_CHARACTERS = 1 << 26
_PARQUET_ROWS = 512


class Reader(ABC):
    """The rows of one input, to be iterated over once.

    Args:
        stream: the input, open in binary mode.
        name: what errors call it.
        field: name of the field or column that holds the text.

    Attributes:
        bytes_read: bytes of the input, or of text in a Parquet file, that have been read so far.
        begins_file: whether the stream is at the begin of a file, which may have a byte order mark.

    Raises:
        RowError: while iterating, at the first row that is not what the format promises.
    """

    unit: ClassVar[str] = "line"
    begins_file = True

    def __init__(self, stream: BufferedIOBase, name: str, field: str) -> None:
        self.stream = stream
        self.name = name
        self.field = field
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Row]:
        for row in self.items():
            if isinstance(row, RowError):
                raise row
            yield row

    @abstractmethod
    def items(self) -> Iterator[Row | RowError]:
        """All rows, and in the places of bad ones what is wrong with them.

        Raises:
            RowError: nothing can be read from this row on.
        """

    def fraction(self) -> float | None:
        """How much of the input has been read, from 0 to 1; None if nobody can know."""
        try:
            status = os.fstat(self.stream.fileno())
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            return None
        return min(1.0, self.bytes_read / status.st_size)

    def error(self, number: int, reason: str) -> RowError:
        return RowError(f"{self.name}: {self.unit} {number}: {reason}", number, reason)

    def _lines(self) -> Iterator[tuple[int, str, RowError | None]]:
        r"""Numbered lines with their ends: `\n`, `\r\n` or `\r`. U+2028 and the like are text.

        With a line that is not UTF-8 comes the error that says so.
        """
        for number, line in enumerate(self._byte_lines(), 1):
            self.bytes_read += len(line)
            if number == 1 and self.begins_file:
                line = line.removeprefix(_BOM)
                if not line:
                    return
            try:
                yield number, line.decode(), None
            except UnicodeDecodeError as error:
                reason = (
                    f"expected UTF-8, got the invalid byte 0x{line[error.start]:02x} "
                    f"at byte {error.start + 1} of the line"
                )
                yield number, line.decode(errors="replace"), self.error(number, reason)

    def _byte_lines(self) -> Iterator[bytes]:
        held = bytearray()
        while block := self._read_block():
            held += block
            if b"\n" in block or b"\r" in block:
                lines = bytes(held).splitlines(keepends=True)
                # The last line may go on, or a `\n` may follow its `\r`.
                held = bytearray() if block.endswith(b"\n") else bytearray(lines.pop())
                yield from lines
        yield from bytes(held).splitlines(keepends=True)

    def _read_block(self) -> bytes:
        with naming(self.name):
            return self.stream.read1(_BLOCK_BYTES)

    def _row(self, number: int, text: Any, record: dict[str, Any] | None = None) -> Row | RowError:
        """The row, if `text` is one."""
        if not isinstance(text, str):
            got = "null" if text is None else type(text).__name__
            return self.error(number, f"field {self.field!r} must be a string, got {got}")
        where = lone_surrogate(text)
        if where is not None:
            return self.error(
                number,
                f"field {self.field!r} must be valid Unicode, got the lone surrogate "
                f"{text[where]!a} at character {where + 1}",
            )
        return Row(text, number, record)


class TxtReader(Reader):
    """One text per line. An empty line is an empty text and keeps its row."""

    def items(self) -> Iterator[Row | RowError]:
        for number, line, error in self._lines():
            yield error or Row(line.rstrip("\r\n"), number)


class JsonlReader(Reader):
    """One JSON object per line; blank lines are skipped."""

    def items(self) -> Iterator[Row | RowError]:
        for number, line, error in self._lines():
            if error is not None:
                yield error
            elif not line.isspace():
                yield self._parse(number, line)

    def _parse(self, number: int, line: str) -> Row | RowError:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            return self.error(
                number,
                f"expected a JSON object, got bad JSON: {error.msg} (column {error.colno})",
            )
        except (ValueError, RecursionError) as error:
            return self.error(number, f"expected a JSON object, got: {error}")
        if not isinstance(record, dict):
            got = type(record).__name__
            return self.error(number, f"expected a JSON object, got a JSON {got}")
        if self.field not in record:
            return self.error(
                number, f"expected a field {self.field!r}, got {column_names(record)}"
            )
        return self._row(number, record[self.field], record)


class CsvReader(Reader):
    """Comma-separated values after a header line; blank lines are skipped.

    Attributes:
        header: names of the columns; read from the stream unless they are set before.
    """

    separator: ClassVar[str] = ","
    kind: ClassVar[str] = "comma-separated"
    header: list[str] | None = None
    _bad_line: RowError | None = None

    def items(self) -> Iterator[Row | RowError]:
        csv.field_size_limit(_CSV_FIELD_CHARACTERS)
        table = csv.reader(self._decoded(), delimiter=self.separator, strict=True)
        if self.header is None:
            self.header = self._next(table, 1)
            if self._bad_line is not None:
                raise self._bad_line
        header = self.header
        if header is None:
            return
        if header.count(self.field) != 1:
            raise self.error(1, f"expected one column {self.field!r}, got {column_names(header)}")
        column = header.index(self.field)
        while True:
            number = table.line_num + 1
            values = self._next(table, number)
            bad, self._bad_line = self._bad_line, None
            if bad is not None:
                yield bad
            elif values is None:
                return
            elif values and len(values) != len(header):
                yield self.error(
                    number, f"expected {len(header)} values as in the header, got {len(values)}"
                )
            elif values:
                yield Row(values[column], number, values=values)

    def _decoded(self) -> Iterator[str]:
        """Lines for the parser; what is wrong with one is known when its row is complete."""
        for _, line, error in self._lines():
            self._bad_line = self._bad_line or error
            yield line

    def _next(self, table: Iterator[list[str]], number: int) -> list[str] | None:
        try:
            return next(table, None)
        except csv.Error as error:
            raise self.error(number, f"expected {self.kind} values, got: {error}") from None


class TsvReader(CsvReader):
    """The same with tabs; quotes mean what they mean in a CSV file."""

    separator: ClassVar[str] = "\t"
    kind: ClassVar[str] = "tab-separated"


class ParquetReader(Reader):
    """A string column of a Parquet file, streamed page by page."""

    unit: ClassVar[str] = "row"

    def __init__(self, stream: BufferedIOBase, name: str, field: str) -> None:
        super().__init__(stream, name, field)
        self._file = open_parquet(stream, name, field)
        self._rows_read = 0

    def items(self) -> Iterator[Row | RowError]:
        for batch in self._file.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.field]):
            for text in batch.column(0).to_pylist():
                self._rows_read += 1
                row = self._row(self._rows_read, text)
                self.bytes_read += len(row.text) if isinstance(row, Row) else 0
                yield row

    def fraction(self) -> float | None:
        rows = self._file.metadata.num_rows
        return self._rows_read / rows if rows else None


FORMATS: dict[str, type[Reader]] = {
    "txt": TxtReader,
    "jsonl": JsonlReader,
    "csv": CsvReader,
    "tsv": TsvReader,
    "parquet": ParquetReader,
}


@contextmanager
def open_reader(source: str, file_format: str, field: str) -> Iterator[Reader]:
    """A reader of a file, or of standard input if `source` is "-".

    Args:
        source: path, or "-".
        file_format: a key of :data:`FORMATS`.
        field: name of the field or column that holds the text; a txt file has none.

    Raises:
        OSError: the file cannot be opened, or standard input is closed.
        RowError: the file is not of that format, or has no such column.
        ModuleNotFoundError: the format is Parquet and pyarrow is not installed.
    """
    if source == "-":
        yield FORMATS[file_format](standard_input(), STDIN, field)
        return
    with open(source, "rb") as stream:
        yield FORMATS[file_format](stream, source, field)


def read_chunks(reader: Reader, limit: int | None = None) -> Iterator[list[Row]]:
    """The first `limit` rows in chunks of at most :data:`CHUNK_TEXTS`, closed once they hold
    :data:`CHUNK_BYTES`."""
    rows: list[Row] = []
    start = reader.bytes_read
    for row in itertools.islice(reader, limit):
        rows.append(row)
        if len(rows) >= CHUNK_TEXTS or reader.bytes_read - start >= CHUNK_BYTES:
            yield rows
            rows, start = [], reader.bytes_read
    if rows:
        yield rows
