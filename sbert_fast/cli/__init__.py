"""The command line: `sbert-fast encode`, `serve`, `bench` and `doctor`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated. A failure is one line
on stderr; `SBERT_FAST_DEBUG=1` adds the traceback. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import NoReturn

from sbert_fast.cli import bench, doctor, encode, serve, streams

__all__ = ["main"]

PROGRAM = "sbert-fast"


class _Terminated(BaseException):
    """SIGTERM has arrived; no `except Exception` on the way may catch this."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code, see the module docstring.
    """
    try:
        with streams.guarded(), _termination_unwinds():
            return _run(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Sentence embeddings of whole files, fast and exact."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    named = {"encode": encode, "serve": serve, "bench": bench, "doctor": doctor}
    for name, module in named.items():
        summary, _, rest = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{rest}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def _version() -> str:
    try:
        return metadata.version("sbert-fast")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _run(argv: Sequence[str] | None) -> int:
    try:
        try:
            args = _build_parser().parse_args(argv)
            return args.run(args)
        finally:
            streams.flush_output()
    except argparse.ArgumentError as error:
        return args.parser.error(str(error))
    except KeyboardInterrupt:
        streams.note("interrupted")
        return 130
    except _Terminated:
        streams.note("terminated")
        return 143
    except BrokenPipeError:
        # The reader of our output has gone away, as `head` does.
        return 1
    except Exception as error:
        if os.environ.get("SBERT_FAST_DEBUG") == "1":
            traceback.print_exc()
        streams.note(f"error: {streams.described(error)}")
        return 1


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> NoReturn:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
