"""Chunks and their embeddings -> the file of a shard, the same bytes whenever it is written."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from sbert_fast.cli.rows import import_pyarrow
from sbert_fast.cli.writers import NpyWriter
from sbert_fast.corpus.columns import EMBEDDING


class PartWriter(Protocol):
    """Writes one shard to an open file."""

    def write(self, table: Any, embeddings: NDArray[Any], missing: NDArray[np.bool_]) -> None:
        """Append a chunk; the first may be empty, and then only gives the types.

        Args:
            table: pyarrow table of n rows, what is stored beside embeddings.
            embeddings: `[n, dim]`, the same dtype and dim in every call.
            missing: `[n]`, the rows without an embedding.
        """

    def finish(self) -> None:
        """Complete the file."""

    def abandon(self) -> None:
        """Let go of the file, which will not be completed."""


class NpyPart:
    """An array `[N, dim]`: no rows may lack an embedding, and the table is not stored."""

    def __init__(self, stream: BinaryIO) -> None:
        self._writer = NpyWriter(stream)

    def write(self, table: Any, embeddings: NDArray[Any], missing: NDArray[np.bool_]) -> None:
        self._writer.write((), embeddings)

    def finish(self) -> None:
        self._writer.finish()

    def abandon(self) -> None:
        pass


class ParquetPart:
    """The columns of the table and a fixed-size list of numbers, one row group a chunk."""

    _writer: Any = None

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, table: Any, embeddings: NDArray[Any], missing: NDArray[np.bool_]) -> None:
        pyarrow = import_pyarrow()
        values = pyarrow.array(np.ascontiguousarray(embeddings).reshape(-1))
        mask = pyarrow.array(missing) if missing.any() else None
        vectors = pyarrow.FixedSizeListArray.from_arrays(values, embeddings.shape[1], mask=mask)
        table = table.append_column(EMBEDDING, vectors)
        if self._writer is None:
            # Embeddings gain nothing from dictionaries or compression.
            compression = {name: "snappy" for name in table.column_names[:-1]}
            self._writer = pyarrow.parquet.ParquetWriter(
                self._stream,
                table.schema,
                use_dictionary=False,
                write_statistics=False,
                compression=compression | {f"{EMBEDDING}.list.element": "none"},
            )
        self._writer.write_table(table)

    def finish(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        # Otherwise pyarrow would do it, and complain, when the stream is closed.
        with suppress(Exception):
            self._writer.close()


FORMATS: dict[str, type[NpyPart] | type[ParquetPart]] = {"parquet": ParquetPart, "npy": NpyPart}
