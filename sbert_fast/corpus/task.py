"""What the parent of a run tells its workers, and they tell it; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbert_fast.corpus.folder import Finished
from sbert_fast.corpus.inputs import InputFile


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to do, as its manifest has it.

    Attributes:
        field: name of the field or column that holds the text.
        output_format: "parquet" or "npy".
        keep_columns: whether all columns of the input are stored.
        on_error: what a bad row does: "stop", "skip" (no row) or "null" (a row without embedding).
        precision: of the embeddings: "float32", "float16", "int8", "uint8", "binary", "ubinary".
        ranges: path of the ranges of int8 and uint8.
        encode: further arguments of `FastEncoder.encode`.
    """

    field: str
    output_format: str
    keep_columns: bool
    on_error: str
    precision: str
    ranges: str | None
    encode: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """What every worker of a run has to know; goes to other processes.

    Attributes:
        load: loads the encoder.
        options: what is asked for.
        files: the corpus.
        json_types: what :func:`plan_columns` found.
        folder: where output files go.
    """

    load: Callable[[], Any]
    options: Options
    files: Sequence[InputFile]
    json_types: dict[str, str] | None
    folder: Path


@dataclass(frozen=True, slots=True)
class Progress:
    """Texts that have been embedded, and their part of the weight of the shard."""

    texts: int
    weight: int


@dataclass(frozen=True, slots=True)
class Part:
    """A shard whose file is complete, on the disk, under a temporary name."""

    temporary: Path
    finished: Finished
