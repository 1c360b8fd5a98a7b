"""Snapshots: whether objects still hold what they held when something was derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from types import CellType, FunctionType
from typing import Any

from torch import nn

try:
    from sbert_fast import _host  # type: ignore[attr-defined]
except ImportError:
    _host = None

# None if it was not built, or was built from an older source.
_Compiled = getattr(_host, "Contents", None)

# Objects of these packages are looked into; others are compared by identity.
PACKAGES = ("transformers.", "sentence_transformers.", "torch.nn.modules.")
# Entries whose own contents no forward pass reads.
_UNREAD = frozenset(
    {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "deprecation_warnings",
        "model_card_data",
    }
)
# A container with more entries, such as a vocabulary, is compared by identity and length.
_MOST_ENTRIES = 1000
_MISSING = object()
EMPTY = CellType()


def is_theirs(cls: type) -> bool:
    """Whether the attributes of such an object affect what a model computes."""
    return issubclass(cls, nn.Module) or f"{cls.__module__}.".startswith(PACKAGES)


class Contents:
    """What containers hold, by identity, as it was.

    Args:
        containers: dicts and classes, with keys and values in their order; lists, tuples and sets;
            functions, with their code, defaults and closure; any other object, with its class and
            dict.
        places: dicts of modules, each with the names that are looked up in it.
    """

    def __init__(
        self, containers: list[Any], places: Sequence[tuple[dict[str, Any], tuple[str, ...]]] = ()
    ) -> None:
        self._containers, self._places = containers, list(places)
        self._listed = self._list()
        # Everything is kept alive here, where the garbage collector sees it.
        self._compiled = None if _Compiled is None else _Compiled(containers, self._places)

    def is_current(self) -> bool:
        """Whether nothing has changed."""
        if self._compiled is not None:
            return bool(self._compiled.is_current())
        now = self._list()
        return len(now) == len(self._listed) and all(map(is_, now, self._listed))

    def _list(self) -> list[object]:
        listed = [e for each in self._containers for e in chain((each,), _entries(each))]
        return listed + [
            space.get(name, _MISSING) for space, names in self._places for name in names
        ]


class Snapshot:
    """Everything that can be reached from some objects, as it was.

    It holds every attribute of modules, configs and tokenizers, and the entries of dicts, lists and
    sets among them, by identity: it detects whatever is assigned, added, removed or reordered,
    under any name. It does not look into tensors.

    Args:
        roots: where to begin.
        without: objects to leave out, along with what can only be reached through them.

    Attributes:
        objects: the modules, configs, tokenizers and the like that were reached.
    """

    def __init__(self, *roots: object, without: Iterable[object] = ()) -> None:
        self._containers: list[Any] = []
        self.objects: list[Any] = []
        self._large: list[Any] = []
        self._kept = list(without)
        self._seen = set(map(id, self._kept))
        for root in roots:
            self._walk(root)
        self._sizes = list(map(len, self._large))
        self._contents = Contents(self._containers)

    def is_current(self) -> bool:
        """Whether nothing has changed."""
        return list(map(len, self._large)) == self._sizes and self._contents.is_current()

    def _walk(self, value: object) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, (dict, list, tuple, set)):
            self._seen.add(id(value))
            if len(value) > _MOST_ENTRIES:
                self._large.append(value)
                return
            self._containers.append(value)
            if isinstance(value, dict):
                for key, entry in value.items():
                    if key not in _UNREAD:
                        self._walk(entry)
            else:
                for entry in value:
                    self._walk(entry)
        elif not isinstance(value, type) and is_theirs(type(value)) and hasattr(value, "__dict__"):
            self._seen.add(id(value))
            self.objects.append(value)
            self._containers.append(value)
            self._walk(vars(value))


def _entries(container: Any) -> Iterable[object]:
    if isinstance(container, FunctionType):
        cells = container.__closure__ or ()
        closed = (cell.cell_contents if cell != EMPTY else _MISSING for cell in cells)
        return container.__code__, container.__defaults__, container.__kwdefaults__, *closed
    if isinstance(container, type):
        return chain.from_iterable(vars(container).items())
    if isinstance(container, dict):
        return chain.from_iterable(container.items())
    if isinstance(container, (list, tuple, set)):
        return container
    return type(container), getattr(container, "__dict__", None)
