"""Reading bodies: every value is checked here, and refused by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from sbert_fast.server.errors import Refusal


def parsed(body: bytes) -> dict[str, Any]:
    """The object of a body.

    Raises:
        Refusal: it is not JSON, or not an object.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal("syntax", f"the body is not valid JSON: {error.msg}") from None
    if not isinstance(found, dict):
        raise _wrong("the body", "an object", found)
    return found


def _wrong(name: str, expected: str, got: object) -> Refusal:
    kinds = {
        dict: "an object", list: "an array", str: "a string", bool: "a boolean",
        int: "a number", float: "a number", type(None): "null",
    }  # fmt: skip
    return Refusal("validation", f"{name} must be {expected}, got {kinds[type(got)]}")


_MISSING = object()


def _get(body: dict[str, Any], name: str, kinds: tuple[type, ...], told: str, default: Any) -> Any:
    value = body.get(name, default)
    if value is _MISSING:
        raise Refusal("validation", f"{name} is missing")
    if value is None and default is not _MISSING:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _wrong(name, told, value)
    return value


def text_of(body: dict[str, Any], name: str, default: Any = _MISSING) -> Any:
    return _get(body, name, (str,), "a string", default)


def flag_of(body: dict[str, Any], name: str, default: Any = _MISSING) -> Any:
    return _get(body, name, (bool,), "a boolean", default)


def object_of(body: dict[str, Any], name: str, default: Any = _MISSING) -> Any:
    return _get(body, name, (dict,), "an object", default)


def count_of(body: dict[str, Any], name: str) -> int | None:
    """A positive integer, or None.

    Raises:
        Refusal: it is something else.
    """
    value = _get(body, name, (int,), "a positive integer", None)
    if value is not None and value < 1:
        raise Refusal("validation", f"{name} must be a positive integer, got {value}")
    return value


def choice_of(body: dict[str, Any], name: str, choices: Sequence[str], default: str) -> str:
    """One of some strings, the case of whose first letter does not matter."""
    value = _get(body, name, (str,), f"one of {', '.join(choices)}", default)
    for choice in choices:
        if value in (choice, choice.capitalize()):
            return choice
    raise Refusal("validation", f"{name} must be one of {', '.join(choices)}")


def texts_of(body: dict[str, Any], name: str, most: int) -> list[str]:
    """Strings, one or more.

    Raises:
        Refusal: the value is something else.
    """
    found = listed(body, name, most)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise _wrong(f"{name}[{index}]", "a string", text)
    return found


def listed(body: dict[str, Any], name: str, most: int) -> list[Any]:
    """An array of one or more values, and no more than `most`.

    Raises:
        Refusal: the value is something else.
    """
    found = _get(body, name, (list,), "an array", _MISSING)
    if not found:
        raise Refusal("empty", f"`{name}` cannot be empty")
    check_count(len(found), most)
    return list(found)


def check_count(count: int, most: int) -> None:
    """Refuse more texts than a request may have."""
    if count > most:
        raise Refusal(
            "validation", f"batch size {count} > maximum allowed batch size {most}", closes=True
        )


def inputs_of(body: dict[str, Any], name: str, most: int) -> tuple[list[str | list[int]], bool]:
    """Texts or token ids, and whether the value is not a list of such.

    A list of numbers is one input, given by its token ids.

    Raises:
        Refusal: the value is something else; names the place.
    """
    value = body.get(name, _MISSING)
    if isinstance(value, str):
        return [value], True
    if not isinstance(value, list):
        if value is _MISSING:
            raise Refusal("validation", f"{name} is missing")
        raise _wrong(name, "a string or an array", value)
    if not value:
        raise Refusal("empty", f"`{name}` cannot be empty")
    if _is_number(value[0]):
        return [ids_of(value, name)], True
    check_count(len(value), most)
    for index, element in enumerate(value):
        if not isinstance(element, str):
            value[index] = ids_of(element, f"{name}[{index}]")
    return value, False


_TEXT_OR_IDS = "a string or an array of token ids"


def ids_of(value: Any, name: str, *, is_only_ids: bool = False) -> list[int]:
    """Token ids; the tokenizer decides whether there are such tokens.

    Raises:
        Refusal: the value is something else; names the place.
    """
    if not isinstance(value, list):
        raise _wrong(name, "an array of token ids" if is_only_ids else _TEXT_OR_IDS, value)
    for index, number in enumerate(value):
        if not _is_number(number):
            raise _wrong(f"{name}[{index}]", "a token id", number)
        if not 0 <= number < 1 << 31:
            raise Refusal("validation", f"{name}[{index}] must be a token id, got {number}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def sequences_of(body: dict[str, Any], most: int) -> tuple[list[Any], bool]:
    """`inputs` of /predict: texts and pairs of texts, and whether it is a single one.

    Raises:
        Refusal: the value is something else; names the place.
    """
    value = body.get("inputs", _MISSING)
    if isinstance(value, str):
        return [value], True
    if value is _MISSING:
        raise Refusal("validation", "inputs is missing")
    if not isinstance(value, list):
        raise _wrong("inputs", "a string or an array", value)
    if not value:
        raise Refusal("empty", "`inputs` cannot be empty")
    if isinstance(value[0], str):
        return [_sequence(value, "inputs")], True
    check_count(len(value), most)
    return [_sequence(each, f"inputs[{index}]") for index, each in enumerate(value)], False


def _sequence(value: Any, name: str) -> Any:
    if not isinstance(value, list) or not 1 <= len(value) <= 2:
        raise Refusal("validation", f"{name} must be an array of one or two strings")
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise _wrong(f"{name}[{index}]", "a string", text)
    return value[0] if len(value) == 1 else (value[0], value[1])
