"""What arguments and texts may hold, and how messages quote them; imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

from sbert_fast.errors import MissingModelError, ModelFileError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
# A folder without any of these holds no model.
MODEL_FILES = ("modules.json", "config.json", "adapter_config.json")
# Characters of a value that a message quotes.
_SHOWN = 80


def shown(value: object) -> str:
    """`repr` of a value for a message, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:
        # Python does not write out integers of more than 4,300 digits.
        return f"a huge {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def lone_surrogate(text: str) -> int | None:
    """Where `text` holds half of a surrogate pair, which is not a character; None if nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def check_model(argument: str, model: str) -> None:
    """Refuse anything that can be neither a folder with a model nor a name on the Hugging Face Hub.

    Raises:
        ValueError: names `argument`, the argument; if there is nothing at that path, or a file, it
            is also the `OSError` that sentence-transformers raises.
    """
    if any((Path(model) / name).is_file() for name in MODEL_FILES):
        return
    reason: str | None = None
    kind: type[ValueError] = ValueError
    if not model:
        reason = "it is empty"
    elif Path(model).is_dir():
        reason = f"the folder holds none of {', '.join(MODEL_FILES)}"
    elif Path(model).exists():
        reason, kind = "that is a file", ModelFileError
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        reason, kind = "there is no such folder", MissingModelError
    if reason is not None:
        raise kind(
            f"{argument} must be a folder with a model or a name on the Hugging Face Hub, "
            f"got {shown(model)}: {reason}"
        )
