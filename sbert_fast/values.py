"""What arguments and texts may hold, and how messages show what they do hold; imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Characters of a value that a message quotes.
_SHOWN = 80


def shown(value: object) -> str:
    """`repr` of a value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes out no integer of more than 4,300 digits.
        return f"a huge {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def lone_surrogate(text: str) -> int | None:
    """Where `text` holds half of a surrogate pair, which is no character; None where nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
