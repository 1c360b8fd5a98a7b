"""Snapshots: whether objects still hold what they held when something was derived from them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from types import FunctionType
from typing import Any

from torch import nn

try:
    from sbert_fast import _host  # type: ignore[attr-defined]
except ImportError:
    _host = None

# None where it was not built, or by an older source.
_compiled = getattr(_host, "same_contents", None)

# Objects of these packages are looked into, others are compared by identity.
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
# A container of more entries, such as a vocabulary, is compared by identity and length.
_MOST_ENTRIES = 1000


def is_theirs(cls: type) -> bool:
    """Whether the attributes of such an object decide about what a model computes."""
    return issubclass(cls, nn.Module) or f"{cls.__module__}.".startswith(PACKAGES)


class Snapshot:
    """Everything that can be reached from some objects, as it was.

    It holds every attribute of modules, configs and tokenizers, and the entries of dicts, lists and
    sets among them, by identity: what is assigned, added, removed or reordered is seen, whatever
    its name. It does not look into tensors.

    Args:
        roots: where to begin.
        without: objects that are left out, with what can only be reached through them.

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
        self._types = list(map(type, self.objects))
        self._sizes = list(map(len, self._large))
        self._contents = contents(self._containers)

    def is_current(self) -> bool:
        """Whether nothing has changed."""
        return (
            list(map(type, self.objects)) == self._types
            and list(map(len, self._large)) == self._sizes
            and same_contents(self._containers, self._contents)
        )

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
            self._walk(vars(value))


def _entries(container: Any) -> Iterable[object]:
    if isinstance(container, FunctionType):
        return container.__code__, container.__defaults__, container.__kwdefaults__
    if isinstance(container, type):
        return chain.from_iterable(vars(container).items())
    if isinstance(container, dict):
        # Not in the order of an OrderedDict: that of its base is looked at faster.
        return chain.from_iterable(dict.items(container))
    return container


def contents(containers: Iterable[Any]) -> list[object]:
    """What :func:`same_contents` compares: each container, then its entries.

    Args:
        containers: dicts and classes, whose keys and values are listed; lists, tuples and sets; and
            functions, of which it is the code and the defaults.
    """
    return [entry for container in containers for entry in chain((container,), _entries(container))]


def same_contents(containers: list[Any], listed: list[object]) -> bool:
    """Whether `containers` hold the very objects that :func:`contents` has listed."""
    if _compiled is not None:
        return bool(_compiled(containers, listed))
    now = contents(containers)
    return len(now) == len(listed) and all(map(is_, now, listed))
