"""Whether the functions of other packages that a packed pass replaces are still their own."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
import typing_extensions

from sbert_fast.state import EMPTY, PACKAGES, Contents

# What modules of transformers call without importing it by name.
_TORCH = (vars(F), vars(torch))


# What transformers and sentence-transformers import functions from.
_LIBRARIES = frozenset(
    "PIL datasets filelock httpx huggingface_hub jinja2 numpy packaging regex requests safetensors "
    "scipy sklearn tokenizers tqdm typing_extensions yaml".split()
)
# Where the types of other callables are defined that stand under a name in those packages: types
# of Python, and operators and decorators of torch. What a caller puts there is a partial, a mock, a
# module or the like.
_CALLABLES = tuple(
    f"{home}."
    for home in "builtins torch._dynamo torch._higher_order_ops torch._ops types typing".split()
)
_Cached = type(cache(len))
_MISSING = object()
# Methods that are called without being named.
SYNTAX = ("__call__", "__getattr__", "__getattribute__", "__getitem__", "__iter__", "__len__")
# No forward reaches it, but it shares names with what a forward reaches.
_GENERATION = "transformers.generation."
# The defaults of each function when it was first seen.
_defaults: dict[FunctionType, tuple[Any, ...]] = {}
# Decorators made by these are wrappers like any other.
_DECORATORS = tuple(str(module.__file__) for module in (contextlib, typing_extensions, warnings))


@cache
def _folder(package: str) -> str:
    return os.path.dirname(str(sys.modules[package].__file__)) + os.sep


def is_theirs_by_name(home: object) -> bool:
    """Whether a module of that name belongs to transformers, sentence-transformers or torch.nn."""
    return f"{home}.".startswith(PACKAGES)


@cache
def names_in(code: CodeType) -> frozenset[str]:
    """What a function mentions: variables, attributes, and strings that may name an attribute."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
    return frozenset(names)


def _called(value: Any) -> Any:
    """What is called where a value is read or called."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, cached_property):
        return value.func
    if isinstance(value, (classmethod, staticmethod, MethodType)):
        return value.__func__
    return value.__wrapped__ if isinstance(value, _Cached) else value


def functions_of(value: object) -> Iterator[FunctionType]:
    """The Python functions behind a value, the innermost last: the getter of a property, what a
    wrapper wraps, and what its closure holds."""
    value = _called(value)
    while isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            if cell != EMPTY and isinstance(cell.cell_contents, FunctionType):
                yield cell.cell_contents
        yield value
        value = getattr(value, "__wrapped__", None)


class Originals:
    """The functions that some classes reach by name, as they are now.

    Args:
        classes: classes of transformers, sentence-transformers and torch.
        roots: names of the methods that are called.

    Attributes:
        names: every name that the functions mention; they read no attribute of any other name.
        reason: which function is not its package's own; None if all are.
    """

    def __init__(self, classes: Iterable[type], roots: Iterable[str]) -> None:
        self.names: set[str] = set()
        self.reason: str | None = None
        self._containers: list[Any] = list(classes)
        self._known: set[tuple[int, str]] = set()
        # Functions of modules; those of classes are among the containers.
        self._places: dict[int, tuple[dict[str, Any], list[str]]] = {}
        classes, todo = list(classes), list(roots)
        while todo:
            name = todo.pop()
            if name in self.names:
                continue
            self.names.add(name)
            for cls in classes:
                if name in vars(cls):
                    todo += self._add(vars(cls), name, cls)
        self._contents = Contents(
            self._containers,
            [(space, tuple(names)) for space, names in self._places.values()],
        )

    def is_current(self) -> bool:
        """Whether each function is still in its place, with the code it had."""
        return self._contents.is_current()

    def _add(self, space: Any, name: str, cls: type | None) -> set[str]:
        """Add the function `name` of a class or module; returns the names that it mentions."""
        value = space[name]
        bodies = list(functions_of(value))
        if (id(space if cls is None else cls), name) in self._known:
            return set()
        self._known.add((id(space if cls is None else cls), name))
        is_builtin = isinstance(value, BuiltinFunctionType)
        if not (bodies or is_builtin or _is_foreign(value)):
            return set()
        if cls is None:
            self._add_place(space, name)
        own = _is_builtin_of(name, value) if is_builtin else is_genuine(value, cls)
        if self.reason is None and not own:
            where = space.get("__name__", "torch") if cls is None else cls.__qualname__
            compiled = isinstance(_called(value), torch.jit.ScriptFunction)
            how = "is compiled by TorchScript" if compiled else "was replaced"
            self.reason = f"{where}.{name} {how}"
        return self._follow(bodies, name)

    def _follow(self, bodies: list[FunctionType], name: str) -> set[str]:
        """Add what functions call; returns the names that they mention."""
        self._containers += bodies
        mentioned: set[str] = set()
        for body in bodies:
            if body.__kwdefaults__ is not None:
                self._containers.append(body.__kwdefaults__)
            defaults = body.__defaults__, dict(body.__kwdefaults__ or {})
            if _defaults.setdefault(body, defaults) != defaults and self.reason is None:
                self.reason = f"the defaults of {name} were changed"
            names = names_in(body.__code__)
            mentioned |= names
            for other in names:
                mentioned |= self._add_global(body.__globals__, other)
            for library in _TORCH:
                for other in names & library.keys():
                    self._add(library, other, None)
        return mentioned

    def _add_place(self, space: dict[str, Any], name: str) -> None:
        self._places.setdefault(id(space), (space, []))[1].append(name)

    def _add_global(self, space: dict[str, Any], name: str) -> set[str]:
        value = space.get(name)
        is_function = isinstance(value, FunctionType) and not _is_from_elsewhere(value)
        # A module may define a class and hold an instance, which others import: `silu` of
        # transformers.activations.
        home = sys.modules.get(type(value).__module__)
        is_its_own = home is not None and vars(home).get(name, _MISSING) is value
        if is_function or (_is_foreign(value) and not is_its_own):
            return self._add(space, name, None)
        # A registry of functions, such as the one for attention.
        if isinstance(value, Mapping) and is_theirs_by_name(type(value).__module__):
            if (id(space), name) not in self._known:
                self._known.add((id(space), name))
                self._add_place(space, name)
                tables = [*vars(type(value)).values(), *vars(value).values()]
                found = [table for table in tables if isinstance(table, dict)]
                self._containers += found
                functions = [f for table in found for v in table.values() for f in functions_of(v)]
                return self._follow([f for f in functions if is_genuine(f)], name)
        return set()


def _is_from_elsewhere(function: Any) -> bool:
    """Whether the function comes from a library that needs no watching: what a model computes with
    is in transformers, sentence-transformers and torch."""
    package = str(function.__module__).partition(".")[0]
    return package in sys.stdlib_module_names or package in _LIBRARIES


def _is_foreign(value: Any) -> bool:
    """Whether a value that is no Python function is called in place of one, and none of the
    packages put it there."""
    called = _called(value)
    if isinstance(called, FunctionType):
        replaces = isinstance(value, (MethodType, _Cached)) and not _is_from_elsewhere(called)
        return replaces and not is_genuine(called)
    if isinstance(called, BuiltinFunctionType):
        home = called.__module__
        return not (home is None or _is_from_elsewhere(called) or _is_of_packages(home))
    if isinstance(called, type) or not (callable(called) or hasattr(type(called), "__get__")):
        return False
    home = f"{type(called).__module__}."
    known = home.startswith(_CALLABLES) or home.partition(".")[0] in _LIBRARIES
    return isinstance(called, torch.nn.Module) or not known


def _is_builtin_of(name: str, value: Any) -> bool:
    return not _is_foreign(value) and value.__name__.strip("_") == name.strip("_")


def _is_of_packages(home: object) -> bool:
    return str(home).partition(".")[0] in ("torch", "transformers", "sentence_transformers")


def is_genuine(value: Any, cls: type | None = None) -> bool:
    """Whether a function is the one its package defined, judged by where its code lies.

    Args:
        value: an attribute of a class, or a function of a module.
        cls: the class; None for a function of a module.
    """
    bodies = list(functions_of(value))
    if not bodies or any(map(_holds_foreign, bodies)):
        return False
    home = cls.__module__ if cls is not None else getattr(bodies[-1], "__module__", None)
    package = str(home).partition(".")[0]
    if not _is_of_packages(home):
        return False
    folders = _folder(package), _folder("torch")
    files = [body.__code__.co_filename for body in bodies]
    if not files[-1].startswith(folders) or not all(
        file.startswith((*folders, *_DECORATORS)) for file in files
    ):
        return False
    if cls is None or "." not in bodies[-1].__qualname__:
        return True
    # Where a decorator of theirs has no __wrapped__, its closure holds what it decorates.
    owners = {body.__qualname__.partition(".")[0] for body in bodies}
    return any(base.__name__ in owners for base in cls.__mro__)


def _holds_foreign(body: FunctionType) -> bool:
    cells = (cell for cell in body.__closure__ or () if cell != EMPTY)
    return any(_is_foreign(cell.cell_contents) for cell in cells)


_known: dict[tuple[frozenset[type], tuple[str, ...]], Originals] = {}


def originals(classes: Iterable[type], roots: tuple[str, ...]) -> Originals:
    """:class:`Originals` of the packages' classes among `classes` and their bases, but for those
    that generate texts."""
    family = frozenset(
        base
        for cls in classes
        for base in cls.__mro__
        if is_theirs_by_name(base.__module__) and not base.__module__.startswith(_GENERATION)
    )
    found = _known.get((family, roots))
    if found is None or not found.is_current():
        found = _known[family, roots] = Originals(family, roots)
    return found
