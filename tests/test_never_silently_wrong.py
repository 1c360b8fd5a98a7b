"""Whatever people do to a model, no vector is silently another one than stock gives now.

`SBERT_FAST_SEQUENCES=first:count` chooses the random sequences, by the seeds they are drawn from.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import code_operations  # noqa: F401
import copy_operations  # noqa: F401
import hook_operations  # noqa: F401
import layout_operations  # noqa: F401
import module_operations  # noqa: F401
import optimizer_operations  # noqa: F401
import setting_operations  # noqa: F401
import surrounding_operations  # noqa: F401
import tokenizer_operations  # noqa: F401
import weight_operations  # noqa: F401
from checks import assert_same_vectors
from model_operations import OPERATIONS
from packed_kinds import KINDS, launches
from sbert_fast import FastEncoder
from walks import STEPS, TEXTS, WALKED, NotNow, Subject

if importlib.util.find_spec("peft"):
    import adapter_operations  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")

FIRST, COUNT = map(int, os.environ.get("SBERT_FAST_SEQUENCES", "0:300").split(":"))
CHUNK = 50
UNDO = "undo"
# Of the steps that are drawn, those that undo what can be undone: without them most walks end where
# nothing runs packed.
UNDO_SHARE = 0.5

Step = tuple[str, int]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A child of a process with more of them hangs in stock."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subject(kind: str, family: str) -> Subject:
    made = Subject.new(kind, family)
    assert made.fault("encode") is None
    return made


@pytest.mark.parametrize("family", sorted(set(WALKED)))
@pytest.mark.parametrize("kind", KINDS)
def test_calls_give_vectors(kind: str, family: str) -> None:
    """Of a model nothing was done to: calls that raise in both would agree."""
    s = Subject.new(kind, family)
    for call in KINDS[kind].calls.values():
        assert isinstance(s.attempt(call, s.model, TEXTS), np.ndarray)
        assert isinstance(s.stock(call), np.ndarray)


# Each operation alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(kind: str, name: str) -> None:
    """Right after it, and right after it is undone."""
    s = subject(kind, OPERATIONS[name].family)
    try:
        s.act(OPERATIONS[name].act, 0)
        faults = [s.fault(call) for call in KINDS[kind].calls]
        if s.undos:
            s.undo()
            faults += [s.fault(call) for call in KINDS[kind].calls]
    finally:
        s.close()
    found = [fault for fault in faults if fault]
    assert not found, found


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_an_operation_changes(name: str) -> None:
    """An encoder that did not notice would be found."""
    operation = OPERATIONS[name]
    seeds = range(4) if operation.changes else [0]
    assert any(changes(name, seed) for seed in seeds) == operation.changes


def changes(name: str, seed: int) -> bool:
    """Whether stock gives anything else after an operation."""
    s = subject("encoder", OPERATIONS[name].family)
    calls = KINDS["encoder"].calls.values()
    before = [s.stock(call) for call in calls]
    try:
        s.act(OPERATIONS[name].act, seed)
        after = [s.stock(call) for call in calls]
    finally:
        s.close()
    return not all(map(same, before, after))


def same(a: Any, b: Any) -> bool:
    if isinstance(b, BaseException):
        return False
    with contextlib.suppress(AssertionError):
        assert_same_vectors(a, b)
        return True
    return False


# Sequences


def draw(rng: random.Random) -> Iterator[Step]:
    names, weights = list(OPERATIONS), [o.weight for o in OPERATIONS.values()]
    while True:
        name = UNDO if rng.random() < UNDO_SHARE else rng.choices(names, weights)[0]
        yield name, rng.randrange(10**6)


def walk(kind: str, family: str, steps: Any, log: list[Step], ran: Counter[str]) -> str | None:
    """Do steps until one is silently wrong, and tell what is; `log` holds those that were done."""
    s = subject(kind, family)
    calls = list(KINDS[kind].calls)
    try:
        for name, seed in steps:
            try:
                s.undo() if name == UNDO else s.act(OPERATIONS[name].act, seed)
            except NotNow:
                continue
            except Exception:
                # What torch or transformers refuse may have been done in part.
                ran["refused"] += 1
            log.append((name, seed))
            before = launches()
            if (fault := s.fault(calls[seed % len(calls)])) is not None:
                return fault
            ran["packed" if launches() > before else "not packed"] += 1
            if len(log) == STEPS:
                break
    finally:
        s.close()
    return None


def shrunk(kind: str, family: str, steps: list[Step]) -> tuple[list[Step], str]:
    """The steps without those that the fault does not need, and the fault."""
    fault, position = "", 0
    while position < len(steps):
        fewer: list[Step] = []
        candidate = steps[:position] + steps[position + 1 :]
        found = walk(kind, family, candidate, fewer, Counter())
        if found is None:
            position += 1
        else:
            fault, steps = found, fewer
    return steps, fault


def first_fault(seed: int, ran: Counter[str]) -> str | None:
    rng = random.Random(seed)
    kind, family = rng.choice(list(KINDS)), rng.choice(WALKED)
    log: list[Step] = []
    fault = walk(kind, family, draw(rng), log, ran)
    if fault is None:
        return None
    steps, least = shrunk(kind, family, log)
    done = "\n".join(f"  {name} ({seed})" for name, seed in steps)
    return (
        f"sequence {seed}, {kind}, {family}: {fault}\nafter {len(log)} steps, of which these are "
        f"enough:\n{done}\n  {least or fault}\nagain: SBERT_FAST_SEQUENCES={seed}:1"
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, CHUNK))
def test_sequences(first: int) -> None:
    ran: Counter[str] = Counter()
    for seed in range(first, min(first + CHUNK, FIRST + COUNT)):
        fault = first_fault(seed, ran)
        assert fault is None, fault
    # Where little runs packed, little is compared.
    assert ran["packed"] >= 0.3 * sum(ran.values()), ran


# The tests of the test


def test_an_encoder_that_notices_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers with the vectors of the model that it saw first."""
    frozen: dict[Any, FastEncoder] = {}
    encode = FastEncoder.encode

    def stale(self: FastEncoder, *args: Any, **kwargs: Any) -> Any:
        first = frozen.setdefault(id(self._modules), copy.deepcopy(self))
        encode(self, *args, **kwargs)
        return encode(first, *args, **kwargs)

    monkeypatch.setattr(FastEncoder, "encode", stale)
    steps = [("deep_copied", 1), ("train", 1), ("written_through_data", 1), ("eval", 1)]
    log: list[Step] = []
    assert walk("encoder", "bert", steps, log, Counter()) is not None
    least, fault = shrunk("encoder", "bert", log)
    assert [name for name, _ in least] == ["written_through_data"]
    assert "encode" in fault


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_leaves_the_model_alone(kind: str) -> None:
    s = subject(kind, "bert")
    s.model.train()
    s.model[1].include_prompt = False
    s.backend.enable_truncation(7)

    def state() -> Any:
        tensors = [*s.model.parameters(), *s.model.buffers()]
        modules = [
            (module.training, {k: repr(v) for k, v in vars(module).items() if k[0] != "_"})
            for module in s.model.modules()
        ]
        versions = [(t.data_ptr(), t._version) for t in tensors]
        return versions, modules, s.backend.to_str(), dict(s.first._prompt_length_mapping)

    before = state()
    for call in KINDS[kind].calls.values():
        assert isinstance(s.stock(call), np.ndarray)
    assert state() == before
