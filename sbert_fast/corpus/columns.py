"""The columns that are stored beside embeddings: the text alone, or all of the input's."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from sbert_fast.cli.rows import Row, RowError, column_names, import_pyarrow, open_parquet
from sbert_fast.corpus.inputs import CorpusError, InputFile
from sbert_fast.corpus.streams import header_of, make_reader, opened
from sbert_fast.values import lone_surrogate

EMBEDDING = "embedding"
# Integers up to here are float64 numbers, all of them.
_EXACT = 1 << 53
_SCALARS = {bool: "bool", int: "int64", float: "float64", str: "string"}
JSON = "json"


class Columns:
    """What is stored beside embeddings.

    Args:
        schema: pyarrow schema of what is stored.
        field: name of the field or column that holds the text.
        values: for each column of the schema, what its value is in a row of a file that is read
            line by line, given the places of the columns in that file.
    """

    def __init__(
        self, schema: Any, field: str, values: Sequence[Callable[[Row, dict[str, int]], Any]]
    ) -> None:
        self.schema = schema
        self._field, self._values = field, values

    @property
    def names(self) -> list[str]:
        """The columns to read of a Parquet file."""
        return [self._field] if self._values else list(self.schema.names)

    def of_rows(self, rows: Sequence[Row | None], header: Sequence[str] = ()) -> Any:
        """The table of rows, with nulls for the bad ones, which are None.

        Args:
            rows: of one file.
            header: of that file, if it is a CSV or TSV file: the order of columns is its own.
        """
        pyarrow = import_pyarrow()
        places = {name: place for place, name in enumerate(header)}
        arrays = [
            pyarrow.array(
                [None if row is None else value(row, places) for row in rows], column.type
            )
            for column, value in zip(self.schema, self._values, strict=True)
        ]
        return pyarrow.table(arrays, schema=self.schema)

    def of_table(self, table: Any, texts: Sequence[str | None]) -> Any:
        """The same for what was read of a Parquet file, and its texts."""
        pyarrow = import_pyarrow()
        if self._values:
            return pyarrow.table([pyarrow.array(texts, pyarrow.string())], schema=self.schema)
        table = table.select(self.schema.names).cast(self.schema)
        place = table.schema.get_field_index(self._field)
        column = pyarrow.array(texts, pyarrow.string()).cast(self.schema.field(place).type)
        return table.set_column(place, self.schema.field(place), column)


def plan_columns(files: Sequence[InputFile], field: str, everything: bool) -> dict[str, str] | None:
    """What has to be known of all files before the first is embedded.

    Args:
        files: the whole corpus.
        field: name of the field or column that holds the text.
        everything: whether all columns are kept.

    Returns:
        The fields of the objects in all JSON Lines files, with the types that hold their values:
        that takes reading these files. None in every other case.

    Raises:
        CorpusError: the files cannot be stored under one schema; says which and why.
    """
    if not everything:
        return None
    first = files[0]
    for file in files[1:]:
        if file.format != first.format:
            raise CorpusError(
                f"--keep-columns needs files of one format, got {first.path} and {file.path}"
            )
    if first.format == "jsonl":
        return _json_types(files, field)
    columns = _stored(first, field)
    for file in files[1:]:
        found = _stored(file, field)
        if found != columns:
            raise CorpusError(
                f"--keep-columns needs the same columns in all files: {first.path} has "
                f"{_listed(columns)}; {file.path} has {_listed(found)}"
            )
    return None


def load_columns(
    files: Sequence[InputFile], field: str, everything: bool, types: dict[str, str] | None
) -> Columns:
    """What is stored of files that :func:`plan_columns` has accepted with these `types`."""
    pyarrow = import_pyarrow()
    if everything and types is not None:
        stored = ((n, "string" if t == JSON else t) for n, t in types.items())
        schema = pyarrow.schema([(n, pyarrow.type_for_alias(t)) for n, t in stored])
        return Columns(schema, field, [partial(_of_record, n, types[n]) for n in types])
    if everything and files[0].format == "parquet":
        return Columns(pyarrow.schema(list(_stored(files[0], field).values())), field, [])
    if everything and files[0].format != "txt":
        kept = [name for name in header_of(files[0], field) if name != EMBEDDING]
        schema = pyarrow.schema([(name, pyarrow.string()) for name in kept])
        return Columns(schema, field, [partial(_of_column, name) for name in kept])
    return Columns(pyarrow.schema([("text", pyarrow.string())]), field, [_text_of])


def _text_of(row: Row, _: dict[str, int]) -> str:
    return row.text


def _of_column(name: str, row: Row, places: dict[str, int]) -> str:
    return cast("list[str]", row.values)[places[name]]


def _of_record(name: str, kind: str, row: Row, _: dict[str, int]) -> Any:
    value = cast("dict[str, Any]", row.record).get(name)
    if value is None or kind != JSON:
        return value
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text


def _stored(file: InputFile, field: str) -> dict[str, Any]:
    """The columns of a file, but for its embeddings: pyarrow fields of a Parquet file."""
    if file.format == "txt":
        return {}
    if file.format == "parquet":
        with open(file.path, "rb") as stream:
            schema = open_parquet(cast(io.BufferedIOBase, stream), file.path, field).schema_arrow
        names, columns = schema.names, list(schema.remove_metadata())
        columns = [column.remove_metadata() for column in columns]
    else:
        names = columns = header_of(file, field)
    if len(set(names)) < len(names):
        raise CorpusError(
            f"{file.path}: --keep-columns needs names that differ, got {column_names(names)}"
        )
    if field == EMBEDDING:
        raise CorpusError(f"--keep-columns cannot store the text: {EMBEDDING!r} is its column")
    return {n: c for n, c in zip(names, columns, strict=True) if n != EMBEDDING}


def _listed(columns: dict[str, Any]) -> str:
    return ", ".join(str(column) for column in columns.values()) or "none"


def _json_types(files: Sequence[InputFile], field: str) -> dict[str, str]:
    found: dict[str, str | None] = {}
    inexact: set[str] = set()
    for file in files:
        with opened(file) as stream:
            for row in make_reader(file, stream, field).items():
                if isinstance(row, RowError) or row.record is None:
                    continue
                for name, value in row.record.items():
                    found[name] = _merged(found.get(name), _kind_of(value))
                    if isinstance(value, int) and abs(value) > _EXACT:
                        inexact.add(name)
    found.pop(EMBEDDING, None)
    found.setdefault(field, "string")
    if field == EMBEDDING:
        raise CorpusError(f"--keep-columns cannot store the text: {EMBEDDING!r} is its column")
    wide = {n for n in inexact if found.get(n) == "float64"}
    return {n: JSON if t is None or n in wide else t for n, t in found.items()}


def _kind_of(value: Any) -> str | None:
    """The type of a column that holds a value of JSON; None for null."""
    if value is None:
        return None
    kind = _SCALARS.get(type(value), JSON)
    if kind == "string" and lone_surrogate(value) is not None:
        return JSON
    return JSON if kind == "int64" and not -(1 << 63) <= value < 1 << 63 else kind


def _merged(one: str | None, other: str | None) -> str | None:
    if one is None or other is None or one == other:
        return one or other
    return "float64" if {one, other} == {"int64", "float64"} else JSON
