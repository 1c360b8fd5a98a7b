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
from typing import Any, ClassVar, NamedTuple

from sbert_fast.cli.streams import STDIN, naming, standard_input
from sbert_fast.errors import SbertFastError
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
_PARQUET_BUFFER_BYTES = 1 << 20


class RowError(SbertFastError, ValueError):
    """A row that cannot be read; the message names the file, the row and what was expected."""


class Row(NamedTuple):
    """One text.

    Attributes:
        text: the text.
        number: its line, or its row in a Parquet file, counted from 1.
        record: the JSON object it comes from; None in the other formats.
    """

    text: str
    number: int
    record: dict[str, Any] | None = None


class Reader(ABC):
    """The rows of one input, to be iterated over once.

    Args:
        stream: the input, open in binary mode.
        name: what errors call it.
        field: name of the field or column that holds the text.

    Attributes:
        bytes_read: bytes of the input, or of text in a Parquet file, that have been read so far.

    Raises:
        RowError: while iterating, at the first row that is not what the format promises.
    """

    unit: ClassVar[str] = "line"

    def __init__(self, stream: BufferedIOBase, name: str, field: str) -> None:
        self.stream = stream
        self.name = name
        self.field = field
        self.bytes_read = 0

    @abstractmethod
    def __iter__(self) -> Iterator[Row]: ...

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
        return RowError(f"{self.name}: {self.unit} {number}: {reason}")

    def _lines(self) -> Iterator[tuple[int, str]]:
        r"""Numbered lines with their ends: `\n`, `\r\n` or `\r`. U+2028 and the like are text."""
        for number, line in enumerate(self._byte_lines(), 1):
            self.bytes_read += len(line)
            if number == 1:
                line = line.removeprefix(_BOM)
                if not line:
                    return
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise self.error(
                    number,
                    f"expected UTF-8, got the invalid byte 0x{line[error.start]:02x} "
                    f"at byte {error.start + 1} of the line",
                ) from None

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

    def _check_text(self, number: int, text: Any) -> str:
        if not isinstance(text, str):
            got = "null" if text is None else type(text).__name__
            raise self.error(number, f"field {self.field!r} must be a string, got {got}")
        where = lone_surrogate(text)
        if where is not None:
            raise self.error(
                number,
                f"field {self.field!r} must be valid Unicode, got the lone surrogate "
                f"{text[where]!a} at character {where + 1}",
            )
        return text


class TxtReader(Reader):
    """One text per line. An empty line is an empty text and keeps its row."""

    def __iter__(self) -> Iterator[Row]:
        for number, line in self._lines():
            yield Row(line.rstrip("\r\n"), number)


class JsonlReader(Reader):
    """One JSON object per line; blank lines are skipped."""

    def __iter__(self) -> Iterator[Row]:
        for number, line in self._lines():
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise self.error(
                    number,
                    f"expected a JSON object, got bad JSON: {error.msg} (column {error.colno})",
                ) from None
            except (ValueError, RecursionError) as error:
                raise self.error(number, f"expected a JSON object, got: {error}") from None
            if not isinstance(record, dict):
                got = type(record).__name__
                raise self.error(number, f"expected a JSON object, got a JSON {got}")
            if self.field not in record:
                raise self.error(number, f"expected a field {self.field!r}, got {_names(record)}")
            yield Row(self._check_text(number, record[self.field]), number, record)


class CsvReader(Reader):
    """Comma-separated values after a header line; blank lines are skipped."""

    def __iter__(self) -> Iterator[Row]:
        csv.field_size_limit(_CSV_FIELD_CHARACTERS)
        table = csv.reader((line for _, line in self._lines()), strict=True)
        header = self._next(table, 1)
        if header is None:
            return
        if header.count(self.field) != 1:
            raise self.error(1, f"expected one column {self.field!r}, got {_names(header)}")
        column = header.index(self.field)
        while True:
            number = table.line_num + 1
            values = self._next(table, number)
            if values is None:
                return
            if not values:
                continue
            if len(values) != len(header):
                raise self.error(
                    number, f"expected {len(header)} values as in the header, got {len(values)}"
                )
            yield Row(values[column], number)

    def _next(self, table: Iterator[list[str]], number: int) -> list[str] | None:
        try:
            return next(table, None)
        except csv.Error as error:
            raise self.error(number, f"expected comma-separated values, got: {error}") from None


class ParquetReader(Reader):
    """A string column of a Parquet file, streamed page by page."""

    unit: ClassVar[str] = "row"

    def __init__(self, stream: BufferedIOBase, name: str, field: str) -> None:
        super().__init__(stream, name, field)
        pyarrow = import_pyarrow()
        try:
            self._file = pyarrow.parquet.ParquetFile(
                stream, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES
            )
        except pyarrow.ArrowInvalid as error:
            raise RowError(f"{name}: expected a Parquet file: {error}") from None
        schema = self._file.schema_arrow
        if schema.names.count(field) != 1:
            raise RowError(f"{name}: expected one column {field!r}, got {_names(schema.names)}")
        kind = schema.field(field).type
        values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if str(values) not in ("string", "large_string", "string_view"):
            raise RowError(f"{name}: column {field!r} must hold strings, got {kind}")
        self._rows_read = 0

    def __iter__(self) -> Iterator[Row]:
        for batch in self._file.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.field]):
            for text in batch.column(0).to_pylist():
                self._rows_read += 1
                text = self._check_text(self._rows_read, text)
                self.bytes_read += len(text)
                yield Row(text, self._rows_read)

    def fraction(self) -> float | None:
        rows = self._file.metadata.num_rows
        return self._rows_read / rows if rows else None


FORMATS: dict[str, type[Reader]] = {
    "txt": TxtReader,
    "jsonl": JsonlReader,
    "csv": CsvReader,
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


def import_pyarrow() -> Any:
    """pyarrow with its Parquet module.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra that brings it.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Parquet files need pyarrow: pip install 'sbert-fast[parquet]'", name=error.name
        ) from None
    return pyarrow


def _names(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
