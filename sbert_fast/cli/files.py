"""Files that appear once they are complete."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# How a write to a full disk or quota fails, without saying where.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise unless a file may be written at `path`.

    Raises:
        FileExistsError: there is a file, and `overwrite` is not set.
        OSError: there is something other than a file, or the folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        raise OSError(
            f"{path}: expected a regular file, or - for standard output, got something else"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: --overwrite replaces it")


@contextmanager
def atomic_file(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """A file that appears at `path` if the block succeeds; otherwise nothing is left behind.

    It is written under a temporary name in the same folder.

    Raises:
        FileExistsError, OSError: as for :func:`check_target`, or the system refuses.
    """
    # Checked before links are followed: what /dev/stdout leads to may have no name.
    check_target(path, overwrite)
    path = Path(os.path.realpath(path))
    check_target(path, overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "x+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        check_target(path, overwrite)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
