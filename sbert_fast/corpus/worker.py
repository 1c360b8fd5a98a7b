"""One process at work: a model, and shards one after the other."""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sbert_fast.cli.rows import import_pyarrow
from sbert_fast.cli.writers import Quantizer
from sbert_fast.corpus import writing
from sbert_fast.corpus.columns import Columns, load_columns
from sbert_fast.corpus.folder import Finished
from sbert_fast.corpus.identity import identity
from sbert_fast.corpus.inputs import Shard
from sbert_fast.corpus.reading import Chunk, ShardReader
from sbert_fast.corpus.task import Part, Progress, Task
from sbert_fast.errors import InputError, TextsError


class Worker:
    """Embeds shards.

    Args:
        task: what to do.

    Attributes:
        identity: see :func:`sbert_fast.corpus.identity.identity`.
    """

    def __init__(self, task: Task) -> None:
        options = task.options
        self._task = task
        self._quantizer = Quantizer(options.precision, options.ranges)
        self._columns: Columns | None = None
        if options.output_format == "parquet":
            self._columns = load_columns(
                task.files, options.field, options.keep_columns, task.json_types
            )
        encoder = task.load()
        self.identity = identity(encoder)
        self._encode = partial(encoder.encode, **options.encode, show_progress_bar=False)

    def run(self, shard: Shard) -> Iterator[Progress | Part]:
        """Embed a shard into a file of its own.

        Yields:
            Progress after every chunk, then the part.

        Raises:
            RowError: a row is bad, and that stops the run; or the rest cannot be read.
            CorpusError: the input is no longer what it was.
            OSError: a file cannot be read or written; names it.
        """
        temporary = self._task.folder / f".{shard.number}.{secrets.token_hex(4)}.part"
        try:
            with open(temporary, "x+b") as stream:
                rows, bad = yield from self._write(shard, stream)
                stream.flush()
                os.fsync(stream.fileno())
                size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            yield Part(temporary, Finished(shard.number, rows, size, digest, bad))
        except BaseException as error:
            # Whoever took the part has renamed it by now.
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                error.filename = str(temporary.parent)
            raise

    def _write(
        self, shard: Shard, stream: BinaryIO
    ) -> Generator[Progress, None, tuple[int, list[tuple[int, str]]]]:
        """Write the file of a shard; returns its rows, and the bad ones of the input."""
        options = self._task.options
        reader = ShardReader(self._task.files[shard.file], shard, options.field, self._columns)
        writer = writing.FORMATS[options.output_format](stream)
        rows = weight = 0
        bad: list[tuple[int, str]] = []
        try:
            for chunk in itertools.chain(reader, [Chunk([], [], weight=shard.weight)]):
                table, embeddings, missing = self._rows_of(reader, chunk)
                # The empty chunk at the end is written where no other was.
                if len(embeddings) or (rows == 0 and not chunk.texts):
                    writer.write(table, embeddings, missing)
                rows += len(embeddings)
                bad += [(reader.place(chunk.numbers[i]), chunk.bad[i]) for i in sorted(chunk.bad)]
                yield Progress(len(chunk.texts), chunk.weight - weight)
                weight = chunk.weight
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        return rows, bad

    def _rows_of(
        self, reader: ShardReader, chunk: Chunk
    ) -> tuple[Any, NDArray[Any], NDArray[np.bool_]]:
        """What is stored of a chunk, as :meth:`PartWriter.write` takes it."""
        good, vectors = self._embed(reader, chunk)
        table = chunk.table
        if self._columns is not None and not chunk.texts:
            table = self._columns.schema.empty_table()
        missing = np.zeros(len(chunk.texts), dtype=bool)
        missing[sorted(chunk.bad)] = True
        if not chunk.bad:
            return table, vectors, missing
        if self._task.options.on_error == "skip":
            table = None if table is None else table.filter(import_pyarrow().array(~missing))
            return table, vectors, missing[good]
        embeddings = np.zeros((len(chunk.texts), vectors.shape[1]), vectors.dtype)
        embeddings[good] = vectors
        return table, embeddings, missing

    def _embed(self, reader: ShardReader, chunk: Chunk) -> tuple[list[int], NDArray[Any]]:
        """The good rows of a chunk and their vectors; adds to the bad ones."""
        while True:
            if chunk.bad and self._task.options.on_error == "stop":
                first = min(chunk.bad)
                raise reader.error(chunk.numbers[first], chunk.bad[first])
            good = [index for index in range(len(chunk.texts)) if index not in chunk.bad]
            texts = [chunk.texts[index] for index in good]
            if not texts:
                return good, self._no_vectors
            try:
                return good, self._quantizer(self._encode(texts))
            except (InputError, TextsError) as error:
                indices = error.indices if isinstance(error, TextsError) else []
                found = {index: str(error) for index in indices} or self._refused(texts)
                if not found:
                    raise
            chunk.bad |= {good[index]: reason for index, reason in found.items()}

    @cached_property
    def _no_vectors(self) -> NDArray[Any]:
        """An array without rows, of the width and dtype that all have."""
        return self._quantizer(self._encode(["a"]))[:0]

    def _refused(self, texts: Sequence[str | None]) -> dict[int, str]:
        """The texts that have no embedding, and why."""
        try:
            self._encode(texts)
        except (InputError, TextsError) as error:
            if len(texts) == 1:
                return {0: str(error)}
            half = len(texts) // 2
            later = self._refused(texts[half:])
            return self._refused(texts[:half]) | {half + i: why for i, why in later.items()}
        return {}
