"""What people do to a model, as a table of functions; the other files of operations fill it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from walks import NotNow, Subject, Undo

Act = Callable[[Subject], Undo | None]
_MISSING = object()


@dataclass(frozen=True)
class Operation:
    """Something done to a model.

    Attributes:
        act: does it; what comes back undoes it.
        changes: stock's vectors of a fresh model are others afterwards.
        weight: how often it is drawn, beside 1 of the others.
        family: one that it means something for.
    """

    act: Act
    changes: bool = True
    weight: float = 1.0
    family: str = "bert"


OPERATIONS: dict[str, Operation] = {}


def operation(act: Act | None = None, *, name: str = "", **how: Any) -> Any:
    """Enter a function into the table, under its own name by default; see :class:`Operation`."""
    if act is None:
        return lambda act: operation(act, name=name, **how)
    name = name or act.__name__
    assert name not in OPERATIONS, f"two operations are called {name!r}"
    OPERATIONS[name] = Operation(act, **how)
    return act


def assigned(where: Callable[[Subject], Any], name: str, *values: Any) -> Act:
    """Give an attribute one of the values, or what a function makes of the old one.

    Undone, it has its old one. `where` draws the same again.
    """

    def act(s: Subject) -> Undo:
        target = where(s)
        old = getattr(target, name, _MISSING)
        if old is _MISSING:
            raise NotNow
        value = s.rng.choice([v for v in values if v is not old])
        made = value(old) if callable(value) and not isinstance(value, nn.Module) else value
        setattr(target, name, made)
        return lambda s: setattr(where(s), name, old)

    return act


def setting(
    where: Callable[[Subject], Any], title: str, name: str, *values: Any, **how: Any
) -> None:
    """Enter :func:`assigned` into the table."""
    operation(assigned(where, name, *values), name=f"{title}.{name}", **how)
