"""Standard input, output and error as a process may find them: closed, full, without a reader."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from typing import BinaryIO, TextIO, cast

from sbert_fast.errors import SbertFastError

STDIN = "standard input"
STDOUT = "standard output"
# The messages of these are written for the user; other exceptions are shown with their type.
_SPEAKING = (
    SbertFastError,
    ValueError,
    OSError,
    ImportError,
    RuntimeError,
    argparse.ArgumentError,
)


def note(message: str) -> None:
    """Tell the user something on stderr; if nobody can read it, that is not a failure."""
    with suppress(OSError):
        print(f"sbert-fast: {message}", file=sys.stderr)


def described(error: Exception) -> str:
    """One line about an exception."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, _SPEAKING) and str(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (SBERT_FAST_DEBUG=1 shows the traceback)"
    return " ".join(text.split())


@contextmanager
def guarded() -> Iterator[None]:
    """Run a command, whatever state the standard streams are in.

    Messages to a closed stderr go nowhere, instead of to stdout, where `print` would send them.
    """
    with ExitStack() as stack:
        # The next file to be opened would get the number of a closed stream, and with it whatever
        # libraries write there. A folder can neither be written nor be mistaken for an empty input.
        with suppress(OSError):
            while (spare := os.open(os.sep, os.O_RDONLY)) <= 2:
                pass
            os.close(spare)
        if sys.stderr is None:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stderr(nowhere))
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                _drop_unwritten(stream)


def standard_input() -> io.BufferedIOBase:
    """Standard input, as bytes.

    Raises:
        OSError: it is closed.
    """
    return cast(io.BufferedIOBase, _check_open(sys.stdin, STDIN).buffer)


@contextmanager
def standard_output() -> Iterator[BinaryIO]:
    """Standard output, as bytes, flushed at the end.

    Raises:
        OSError: it is closed or cannot be written.
    """
    stream = _check_open(sys.stdout, STDOUT)
    with naming(STDOUT):
        stream.flush()
        if isinstance(stream.buffer, io.RawIOBase):
            # PYTHONUNBUFFERED: nobody would notice if only half of the bytes were written.
            with open(stream.fileno(), "wb", closefd=False) as buffered:
                yield buffered
        else:
            yield stream.buffer
            stream.buffer.flush()


def flush_output() -> None:
    """Write what `print` has left in the buffer.

    Raises:
        OSError: standard output cannot be written.
    """
    with naming(STDOUT):
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the file in an error of the system that does not name one itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = name
        raise


def _check_open(stream: TextIO | None, name: str) -> TextIO:
    if stream is None or stream.closed:
        raise OSError(f"{name} is closed")
    with suppress(OSError):
        # A non-blocking read would take "nothing yet" for the end of the input.
        os.set_blocking(stream.fileno(), True)
    return stream


def _drop_unwritten(stream: TextIO | None) -> None:
    """Forget what cannot be written: Python would try again at exit, and complain."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
