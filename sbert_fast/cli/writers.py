"""Embeddings into files of several formats, by chunks; a file appears once it is complete."""

from __future__ import annotations

import json
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.util import quantize_embeddings

from sbert_fast.cli.files import atomic_file, check_target
from sbert_fast.cli.rows import Row, import_pyarrow
from sbert_fast.cli.streams import standard_output
from sbert_fast.errors import NonFiniteEmbeddingError, TextsError

# Size of the header: the smallest multiple of 64 with room for any number of rows.
_NPY_HEADER_BYTES = 128
SCALED_PRECISIONS = ("int8", "uint8")


class RecordError(TextsError):
    """Objects of the input that the format of the output cannot hold."""


class Writer(ABC):
    """Writes rows and their embeddings to an open file.

    Args:
        stream: the output, open in binary mode.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    @abstractmethod
    def write(self, rows: Sequence[Row], embeddings: NDArray[Any]) -> None:
        """Append a chunk.

        Args:
            rows: n rows; the first call may have none, and then only gives the width.
            embeddings: `[n, dim]`, floats, int8 or uint8, the same dtype and dim in every call.
        """

    @abstractmethod
    def finish(self) -> None:
        """Complete the file; called once, after the last chunk."""


class NpyWriter(Writer):
    """A `[N, dim]` array in numpy's format. The texts are not stored: row i is text i."""

    _rows = 0
    _dtype: np.dtype[Any]
    _width: int

    def write(self, rows: Sequence[Row], embeddings: NDArray[Any]) -> None:
        if self._rows == 0:
            self._dtype, self._width = embeddings.dtype, embeddings.shape[1]
            self.stream.seek(0)
            self.stream.write(self._header())
        self._rows += len(embeddings)
        self.stream.write(np.ascontiguousarray(embeddings).tobytes())

    def finish(self) -> None:
        self.stream.seek(0)
        self.stream.write(self._header())
        self.stream.seek(0, os.SEEK_END)

    def _header(self) -> bytes:
        """Format 1.0, padded to one size for any number of rows: it is written twice."""
        shape = (self._rows, self._width)
        text = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", _NPY_HEADER_BYTES - 10)
        return (start + text.encode("latin1")).ljust(_NPY_HEADER_BYTES - 1) + b"\n"


class JsonlWriter(Writer):
    """One JSON object per line: the input's own, or `{"text": ...}`, with "embedding" last.

    Raises:
        RecordError: while writing, at an object that JSON cannot express.
    """

    def write(self, rows: Sequence[Row], embeddings: NDArray[Any]) -> None:
        # Nine significant digits reproduce every float32 exactly.
        number = "%.9g" if embeddings.dtype.kind == "f" else "%d"
        vector = ", ".join([number] * embeddings.shape[1])
        for index, (row, embedding) in enumerate(zip(rows, embeddings, strict=True)):
            record = {"text": row.text} if row.record is None else dict(row.record)
            record.pop("embedding", None)
            tail = f', "embedding": [{vector % tuple(embedding.tolist())}]}}\n'
            try:
                head = _dump(record)[:-1]
            except ValueError:
                raise RecordError(
                    "a field holds NaN, Infinity or a number too large, which JSON cannot hold: "
                    "write null instead, or another output format",
                    [index],
                ) from None
            self.stream.write(head + tail.encode())

    def finish(self) -> None:
        self.stream.flush()


def _dump(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        # A lone surrogate in one of the other fields: only its escape can be written.
        return json.dumps(record, allow_nan=False).encode()


class ParquetWriter(Writer):
    """Columns "text" (string) and "embedding" (fixed-size list), one row group per chunk."""

    _writer: Any = None

    def write(self, rows: Sequence[Row], embeddings: NDArray[Any]) -> None:
        pyarrow = import_pyarrow()
        width = embeddings.shape[1]
        values = pyarrow.array(np.ascontiguousarray(embeddings).reshape(-1))
        columns = {
            "text": pyarrow.array([row.text for row in rows], pyarrow.string()),
            "embedding": pyarrow.FixedSizeListArray.from_arrays(values, width),
        }
        table = pyarrow.table(columns)
        if self._writer is None:
            # Embeddings gain nothing from dictionaries or compression.
            self._writer = pyarrow.parquet.ParquetWriter(
                self.stream,
                table.schema,
                use_dictionary=False,
                write_statistics=False,
                compression={"text": "snappy", "embedding.list.element": "none"},
            )
        self._writer.write_table(table)

    def finish(self) -> None:
        self._writer.close()


FORMATS: dict[str, type[Writer]] = {
    "npy": NpyWriter,
    "jsonl": JsonlWriter,
    "parquet": ParquetWriter,
}


def _load_ranges(path: str) -> NDArray[np.float32]:
    with open(path, "rb") as stream:
        try:
            ranges = np.lib.format.read_array(stream, allow_pickle=False)
            got = f"{ranges.dtype} {ranges.shape}"
        except ValueError:
            # numpy's own message is about bytes and pickles.
            ranges, got = np.zeros(0), "another kind of file, or half of one"
    if ranges.dtype != np.float32 or ranges.ndim != 2 or len(ranges) != 2:
        raise ValueError(
            f"--ranges must be a .npy file of float32 (2, dim), as --precision int8 writes it "
            f"beside its output, got {path}: {got}"
        )
    return ranges


class Quantizer:
    """Float embeddings to the precision of the output.

    int8 and uint8 split the range of each dimension into 256 steps. The range must be the same in
    every chunk, so it is taken from the first chunk unless it is given.

    Args:
        precision: "float32", "int8", "uint8", "binary" or "ubinary", as in sentence-transformers,
            or "float16".
        ranges_path: .npy file of float32 `[2, dim]`: lowest and highest value of each dimension.

    Attributes:
        calibrates: whether the ranges come from the first chunk.
        ranges: float32 `[2, dim]`; None before they are taken, and if there are none.

    Raises:
        OSError, ValueError: the file cannot be read or holds something else; names the option.
    """

    def __init__(self, precision: str, ranges_path: str | None = None) -> None:
        self.precision = precision
        self.calibrates = precision in SCALED_PRECISIONS and ranges_path is None
        self.ranges: NDArray[np.float32] | None = None
        if ranges_path is not None:
            self.ranges = _load_ranges(ranges_path)

    def check_sample(self, texts: int) -> None:
        """Raise ValueError if a first chunk of `texts` texts is too few to take ranges from."""
        if self.calibrates and texts == 1:
            raise ValueError(
                f"{self.precision} needs at least 2 texts to take the ranges from, got 1: "
                "name ranges with --ranges"
            )

    def __call__(self, embeddings: NDArray[Any]) -> NDArray[Any]:
        """Quantise `[n, dim]`.

        Returns:
            `[n, dim]` float32, float16, int8 or uint8; "binary" (int8) and "ubinary" (uint8) are
            signs, eight to a number: `[n, ceil(dim / 8)]`.

        Raises:
            ValueError: the ranges do not fit.
            NonFiniteEmbeddingError: embeddings are too large for float16.
        """
        if self.precision == "float16":
            return _halved(embeddings)
        if self.precision in SCALED_PRECISIONS and len(embeddings) == 0:
            return np.zeros(embeddings.shape, dtype=self.precision)
        if self.calibrates and self.ranges is None:
            limits = (embeddings.min(axis=0), embeddings.max(axis=0))
            self.ranges = np.stack(limits).astype(np.float32)
        expected = (2, embeddings.shape[1])
        if self.ranges is not None and self.ranges.shape != expected:
            raise ValueError(f"ranges must have shape {expected}, got {self.ranges.shape}")
        precision = cast(Any, self.precision)
        quantized = quantize_embeddings(embeddings, precision, ranges=self.ranges)
        return cast("NDArray[Any]", quantized)


def _halved(embeddings: NDArray[Any]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halves = embeddings.astype(np.float16)
    if len(rows := np.flatnonzero(~np.isfinite(halves).all(axis=1))):
        raise NonFiniteEmbeddingError(
            f"inputs[{rows[0]}] has an embedding beyond the largest number of float16, 65504",
            rows.tolist(),
        )
    return halves


@contextmanager
def open_output(target: str, overwrite: bool, quantizer: Quantizer) -> Iterator[BinaryIO]:
    """The stream to write embeddings to.

    Args:
        target: path, or "-" for standard output.
        overwrite: replace what is there.
        quantizer: if it has taken ranges by the end, they go to `<target>.ranges.npy`.

    Raises:
        FileExistsError, OSError: see :func:`atomic_file`, :func:`standard_output`.
    """
    if target == "-":
        with standard_output() as stream:
            yield stream
        return
    ranges_path = Path(f"{target}.ranges.npy")
    if quantizer.calibrates:
        check_target(ranges_path, overwrite)
    with atomic_file(Path(target), overwrite) as stream:
        yield stream
        if quantizer.calibrates and quantizer.ranges is not None:
            with atomic_file(ranges_path, overwrite) as ranges_stream:
                np.save(ranges_stream, quantizer.ranges)
