"""Snapshots and the comparison below them, compiled and in Python."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from sbert_fast import state
from sbert_fast.state import Contents, Snapshot


def _function(x: int = 1, *, y: int = 2) -> int:
    return x + y


def _make() -> SimpleNamespace:
    def function(x: object = 1, *, y: object = 2) -> object:
        return x, y

    def closing() -> object:
        return closed, later

    closed = object()

    return SimpleNamespace(
        dict={"a": object(), "b": object()},
        ordered=OrderedDict(a=object(), z=object()),
        list=[object(), object()],
        set={object()},
        function=function,
        closing=closing,
        cls=type("Class", (), {"attribute": object()}),
    )
    later = closed


CHANGES: dict[str, Callable[[Any], Any]] = {
    "value": lambda o: o.dict.update(a=object()),
    "key": lambda o: o.dict.update(c=o.dict.pop("b")),
    "removed": lambda o: o.dict.pop("a"),
    "order": lambda o: o.dict.update(a=o.dict.pop("a")),
    "ordered": lambda o: o.ordered.update(b=object()),
    "moved": lambda o: o.ordered.move_to_end("a"),
    "item": lambda o: o.list.__setitem__(0, object()),
    "reversed": lambda o: o.list.reverse(),
    "appended": lambda o: o.list.append(object()),
    "set": lambda o: o.set.add(object()),
    "code": lambda o: setattr(o.function, "__code__", _function.__code__),
    "defaults": lambda o: setattr(o.function, "__defaults__", (2,)),
    "keyword defaults": lambda o: setattr(o.function, "__kwdefaults__", {"y": 3}),
    "closure": lambda o: setattr(o.closing.__closure__[0], "cell_contents", 2),
    "filled cell": lambda o: setattr(o.closing.__closure__[1], "cell_contents", 2),
    "class": lambda o: setattr(o.cls, "attribute", object()),
}


@pytest.fixture(params=["compiled", "python"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(state, "_Compiled", None)
    elif state._Compiled is None:
        pytest.skip("the native library was not built")


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_contents_is_seen(change: str) -> None:
    made = _make()
    containers = list(vars(made).values())
    found = Contents(containers)
    assert found.is_current()
    CHANGES[change](made)
    assert not found.is_current()
    assert Contents(containers).is_current()


def test_contents_that_are_put_back_are_the_same() -> None:
    made = _make()
    found = Contents(list(vars(made).values()), [(vars(made), ("set",))])
    for change, undo in (
        (lambda: made.dict.update(c=1), lambda: made.dict.pop("c")),
        (lambda: setattr(made.cls, "other", 1), lambda: delattr(made.cls, "other")),
        (lambda: vars(made).pop("set"), lambda put=made.set: setattr(made, "set", put)),
    ):
        change()
        assert not found.is_current()
        undo()
        assert found.is_current()


def test_of_a_place_the_names_alone_are_seen() -> None:
    space = {"function": object(), "other": object()}
    found = Contents([], [(space, ("function", "missing"))])
    space["other"] = object()
    assert found.is_current()
    space["missing"] = None
    assert not found.is_current()


def test_what_is_compared_does_not_live_longer() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.note = Snapshot(model)
    seen = weakref.ref(model[0])
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "note", 1),
        lambda m: m[0].register_forward_hook(lambda *_: None),
        lambda m: m.append(nn.Identity()),
        lambda m: setattr(m[0], "bias", None),
        lambda m: setattr(m[1], "__class__", nn.Tanh),
        lambda m: setattr(m[1], "__dict__", dict(vars(m[1]))),
        lambda m: m[2].table.update(x=1),
        lambda m: m.eval(),
    ],
)
def test_a_snapshot_sees_what_can_be_reached(change: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Identity())
    model[2].table = {}
    snapshot = Snapshot(model)
    assert snapshot.is_current()
    change(model)
    assert not snapshot.is_current()


def test_what_is_left_out_may_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    snapshot = Snapshot(model, without=[model[0]])
    model[0].note = 1
    assert snapshot.is_current()
