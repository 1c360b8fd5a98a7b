"""`sbert-fast encode INPUT... --output FOLDER`: its arguments, its progress, its last line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbert_fast.cli.loading import load_encoder, positive
from sbert_fast.cli.rows import import_pyarrow
from sbert_fast.cli.streams import note

if TYPE_CHECKING:
    from sbert_fast.corpus.folder import Finished

FILE_FORMATS = ("npy", "jsonl", "parquet")
FORMATS = ("parquet", "npy")
SHARD_BYTES = 4 << 20
# Of the arguments, those that say how the encoder is loaded; where it lies is not among them.
_LOADING = ("device", "dtype", "impl", "batch_tokens", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that only a run into a folder has."""
    group = parser.add_argument_group("into a folder")
    group.add_argument("--resume", action="store_true", help="go on with the run that is there")
    group.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes (default: %(default)s)"
    )
    group.add_argument("--keep-columns", action="store_true", help="store all columns of the input")
    group.add_argument(
        "--on-error",
        choices=("stop", "skip", "null"),
        default="stop",
        help="a bad row ends the run, is left out, or gets no embedding (default: %(default)s)",
    )
    group.add_argument(
        "--shard-bytes",
        type=positive,
        default=SHARD_BYTES,
        metavar="N",
        help="bytes of an input that is no Parquet file for each output (default: %(default)s)",
    )


def is_meant(args: argparse.Namespace) -> bool:
    """Whether the output is a folder: it ends in "/", exists as one, or has no extension; or there
    are several inputs, folders or patterns."""
    output, suffix = args.output, Path(args.output).suffix.lower().removeprefix(".")
    several = len(args.input) > 1 or any(
        _is_folder(name) or (has_magic(name) and not os.path.exists(name)) for name in args.input
    )
    if output == "-" or suffix in FILE_FORMATS:
        return several or args.resume
    named = not suffix and args.output_format is None and not output.startswith("/dev/")
    return several or args.resume or output.endswith(os.sep) or named or _is_folder(output)


def _is_folder(path: str) -> bool:
    # Standard streams that are closed lead to one: see streams.guarded.
    return os.path.isdir(path) and not path.startswith("/dev/")


def run(args: argparse.Namespace) -> int:
    """Embed a corpus into a folder.

    Raises:
        argparse.ArgumentError: the arguments do not fit together.
        SbertFastError, OSError, ValueError, ImportError: what stopped it; finished files stay.
    """
    output_format = _check(args)
    if output_format == "parquet":
        import_pyarrow()
    from sbert_fast.corpus.run import Request
    from sbert_fast.corpus.run import run as run_corpus
    from sbert_fast.corpus.task import Options

    if args.ranges:
        from sbert_fast.cli.writers import Quantizer

        Quantizer(args.precision, args.ranges)  # refuses what holds no ranges
    options = Options(
        args.field,
        output_format,
        args.keep_columns,
        args.on_error,
        args.precision,
        args.ranges,
        {
            "prompt_name": args.prompt_name,
            "prompt": args.prompt,
            "normalize_embeddings": args.normalize,
            "truncate_dim": args.truncate_dim,
        },
    )
    request = Request(
        inputs=args.input,
        input_format=args.input_format,
        output=Path(args.output),
        options=options,
        loading={name: getattr(args, name) for name in _LOADING},
        load=partial(_loader, args),
        shard_bytes=args.shard_bytes,
        workers=args.workers,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    with redirect_stdout(sys.stderr):
        meter = _Meter(args.no_progress)
        try:
            finished = run_corpus(request, meter)
        finally:
            meter.close()
    note(meter.summary(finished, args.output))
    return 0


def _loader(args: argparse.Namespace, threads: int) -> Any:
    """Loads the encoder, in another process, too."""
    names = ("model", "no_progress", *_LOADING)
    kept = {name: getattr(args, name) for name in names} | {"threads": threads}
    kept["no_progress"] |= args.workers > 1
    return partial(load_encoder, argparse.Namespace(**kept))


def _check(args: argparse.Namespace) -> str:
    """The format of the output files; refuse what does not go with a folder.

    Raises:
        argparse.ArgumentError: names the options.
    """
    output_format = args.output_format or "parquet"
    reason = None
    if args.output == "-" or Path(args.output).suffix.lower()[1:] in FILE_FORMATS:
        what = "--resume" if args.resume else "more than one input"
        reason = f"{what} needs a folder: -o {args.output} is a file"
    elif "-" in args.input:
        reason = "a run into a folder reads files, not standard input"
    elif output_format not in FORMATS:
        reason = f"the files in a folder are {' or '.join(FORMATS)}, got {output_format}"
    elif args.limit:
        reason = "--limit goes with one file and an output file"
    elif args.resume and args.overwrite:
        reason = "--resume and --overwrite contradict each other"
    elif args.precision in ("int8", "uint8") and not args.ranges:
        reason = f"{args.precision} into a folder needs --ranges: all files must have the same"
    elif args.ranges and args.precision not in ("int8", "uint8"):
        reason = f"--ranges goes with --precision int8 or uint8, got {args.precision}"
    elif output_format == "npy" and args.keep_columns:
        reason = "--keep-columns needs --output-format parquet: an array holds embeddings alone"
    elif output_format == "npy" and args.on_error == "null":
        reason = "--on-error null needs --output-format parquet: an array has no nulls"
    if reason:
        raise argparse.ArgumentError(None, reason)
    return output_format


class _Meter:
    """A bar on stderr of bytes of input, with texts a second and the time that is left."""

    def __init__(self, hidden: bool) -> None:
        self._hidden = hidden
        self._texts = 0
        self._started = time.perf_counter()
        self._bar: Any = None

    def begin(self, total: int, done: int) -> None:
        from tqdm import tqdm

        self._started = time.perf_counter()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            disable=self._hidden,
        )

    def advance(self, texts: int, weight: int) -> None:
        self._texts += texts
        rate = self._texts / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{self._texts:,} texts, {rate:,.0f} texts/s", refresh=False)
        self._bar.update(weight)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def summary(self, finished: list[Finished], output: str) -> str:
        seconds = time.perf_counter() - self._started
        rows, bad = sum(f.rows for f in finished), sum(len(f.bad) for f in finished)
        parts = [f"{rows:,} rows in {len(finished):,} files", f"{bad:,} bad rows"]
        parts += [f"{self._texts:,} texts now", f"{seconds:.1f} s"]
        return f"{', '.join([*parts, f'{self._texts / seconds:,.0f} texts/s'])} -> {output}"
