"""What a row of an input is, how a bad one is reported, and how Parquet files are opened."""

from __future__ import annotations

from io import BufferedIOBase
from typing import Any, NamedTuple

from sbert_fast.errors import SbertFastError

_PARQUET_BUFFER_BYTES = 1 << 20


class RowError(SbertFastError, ValueError):
    """A row that cannot be read; the message names the file, the row and what was expected.

    Attributes:
        number: of the row, as in :class:`Row`; 0 if the error is about the whole file.
        reason: the message without file and row.
    """

    def __init__(self, message: str, number: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.number = number
        self.reason = reason


class Row(NamedTuple):
    """One text.

    Attributes:
        text: the text.
        number: its line, or its row in a Parquet file, counted from 1.
        record: the JSON object it comes from; None in the other formats.
        values: all values of the row, in a CSV or TSV file; None in the other formats.
    """

    text: str
    number: int
    record: dict[str, Any] | None = None
    values: list[str] | None = None


def open_parquet(stream: BufferedIOBase, name: str, field: str) -> Any:
    """A Parquet file, opened to be streamed.

    Raises:
        RowError: it is not one, or has no column of strings with that name.
        ModuleNotFoundError: pyarrow is not installed.
    """
    pyarrow = import_pyarrow()
    try:
        file = pyarrow.parquet.ParquetFile(
            stream, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES
        )
    except pyarrow.ArrowInvalid as error:
        raise RowError(f"{name}: expected a Parquet file: {error}") from None
    schema = file.schema_arrow
    if schema.names.count(field) != 1:
        raise RowError(f"{name}: expected one column {field!r}, got {column_names(schema.names)}")
    kind = schema.field(field).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(values) not in ("string", "large_string", "string_view"):
        raise RowError(f"{name}: column {field!r} must hold strings, got {kind}")
    return file


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


def column_names(names: Any) -> str:
    """Names for a message."""
    return ", ".join(map(repr, names)) or "none"
