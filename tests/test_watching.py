"""Pages that tell of writes: of every one to a weight, and of none beside it."""

from __future__ import annotations

import copy
import io
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import families
from sbert_fast import FastEncoder, mapping, watching
from sbert_fast.fingerprint import Fingerprint

PAGE = os.sysconf("SC_PAGE_SIZE")
COUNT = 40 * PAGE // 4


def _refusal() -> str | None:
    """Why the system tells of no writes, asked directly: no other fault skips a test."""
    memory = torch.zeros(1 << 20)
    start = -(-memory.data_ptr() // PAGE) * PAGE
    if watching._watch_pages is None:
        return "sbert_fast/_host was not built"
    try:
        watching._watch_pages([(start, start + PAGE)])
    except OSError as error:
        return f"pages do not tell of writes here: that needs Linux 6.9 and userfaultfd: {error}"
    return None


needs_watching = pytest.mark.skipif((reason := _refusal()) is not None, reason=str(reason))


def at(offset: int, count: int = COUNT) -> tuple[np.ndarray, Tensor]:
    """Memory, and fp32 elements that begin some bytes behind the start of a page of it."""
    memory = np.frombuffer(mmap.mmap(-1, (count + 2 * PAGE) * 4, mmap.MAP_PRIVATE), np.uint8)
    return memory, torch.from_numpy(memory[offset : offset + 4 * count].view(np.float32))


def by_data(weight: Tensor, index: int) -> None:
    weight.data[index] = 1


def by_numpy(weight: Tensor, index: int) -> None:
    weight.detach().numpy()[index] = 1


def by_bits(weight: Tensor, index: int) -> None:
    weight.detach().numpy().view(np.uint8)[4 * index] ^= 1


def by_the_kernel(weight: Tensor, index: int) -> None:
    view = memoryview(weight.detach().numpy()[index : index + 1]).cast("B")
    assert io.BytesIO(b"1234").readinto(view) == 4
    with Path("/dev/urandom").open("rb", buffering=0) as file:
        file.readinto(view)


WRITERS = [by_data, by_numpy, by_bits, by_the_kernel]


@needs_watching
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("offset", [0, 64, PAGE - 4])
@pytest.mark.parametrize("index", [0, 1030, COUNT // 2, COUNT - 1])
def test_every_write_is_seen(write: Callable[[Tensor, int], None], offset: int, index: int) -> None:
    _, weight = at(offset)
    fingerprint = Fingerprint([weight], ())
    for _ in range(3):
        assert fingerprint.is_current()
    write(weight, index)
    for _ in range(2):
        assert not fingerprint.is_current()
    assert Fingerprint([weight], ()).is_current()


@needs_watching
def test_what_lies_beside_weights_does_not_count() -> None:
    memory, weight = at(64)
    fingerprint = Fingerprint([weight], ())
    memory[:64] = memory[64 + weight.nbytes :] = 7
    assert fingerprint.is_current()


@needs_watching
def test_weights_on_one_page() -> None:
    """It is watched where both are weights, whichever of them is read live."""
    memory, both = at(0)
    first, second = both[: COUNT // 2 + 5], both[COUNT // 2 + 5 :]
    fingerprint = Fingerprint([first, second], [second])
    assert not fingerprint._watched.rest
    second.data[-1] = 1
    assert fingerprint.is_current()
    first.data[-1] = 1
    assert not fingerprint.is_current()


@needs_watching
@pytest.mark.parametrize("order", [1, -1])
def test_all_who_watch_a_page_are_told(order: int) -> None:
    """One that protects it again keeps nobody else from knowing."""
    _, weight = at(0)
    older = Fingerprint([weight], ())
    by_bits(weight, 77)
    newer = Fingerprint([weight], ())
    for fingerprint, expected in [(older, False), (newer, True)][::order]:
        assert fingerprint.is_current() == expected


@needs_watching
def test_only_those_are_told_whose_pages_were_written_to() -> None:
    _, weight = at(0)
    parts = weight.split(10 * PAGE // 4)
    fingerprints = [Fingerprint([part], ()) for part in parts]
    for index in (0, 2):
        by_bits(parts[index], 9)
    Fingerprint([weight], ())
    assert [each.is_current() for each in fingerprints] == [False, True, False, True]


@needs_watching
def test_who_is_interrupted_keeps_nobody_from_knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight = at(0)
    older, watch = Fingerprint([weight], ()), watching._watch_pages

    def interrupted(pages: Any) -> None:
        watch(pages)
        raise KeyboardInterrupt

    by_bits(weight, 77)
    monkeypatch.setattr(watching, "_watch_pages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Fingerprint([weight], ())
    assert not older.is_current()


@needs_watching
def test_other_memory_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread: what is watched is not what the weight holds then."""
    weight, private_memory = torch.zeros(1 << 20), mapping.private_memory

    def exchanged() -> Any:
        found = private_memory()
        weight.data = weight.data.clone()
        return found

    monkeypatch.setattr(mapping, "private_memory", exchanged)
    fingerprint = Fingerprint([weight], ())
    by_bits(weight, 1)
    weight.data[:1000] = 1
    assert not fingerprint.is_current()


def _refuse(*_: Any) -> None:
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize(
    "make", ["shared", "small", "strided", "without the library", "without files", "refused"]
)
def test_what_cannot_be_watched_is_hashed(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(256, 300)
    if make == "shared":
        weight.share_memory_()
    elif make == "small":
        weight = torch.zeros(60, 100)
    elif make == "strided":
        weight = torch.zeros(300, 256).t()
    elif make == "without files":
        monkeypatch.setattr(mapping, "private_memory", _refuse)
    else:
        refuse = _refuse if make == "refused" else None
        monkeypatch.setattr(watching, "_watch_pages", refuse)
    fingerprint = Fingerprint([weight], ())
    assert not fingerprint._watched.pages
    assert fingerprint.is_current()
    weight.data[5] = 1
    assert not fingerprint.is_current()


@needs_watching
@pytest.mark.parametrize("size", [0, 1 << 22])
def test_memory_given_back(size: int) -> None:
    weight = torch.zeros(1 << 20)
    fingerprint = Fingerprint([weight], ())
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(size)
    if size:
        weight.data.zero_()[77] = 1
    assert not fingerprint.is_current()


@needs_watching
@pytest.mark.parametrize("writes", [False, True])
def test_a_forked_child_reads_contents(writes: bool) -> None:
    weight = torch.zeros(256, 300)
    fingerprint = Fingerprint([weight], ())
    child = os.fork()
    if child == 0:
        if writes:
            weight.data[5] = 1
        told = fingerprint._watched.are_written() is None
        right = told and fingerprint.is_current() != writes
        again = Fingerprint([weight], ())
        right = right and bool(again._watched.pages) and again.is_current()
        by_bits(weight.view(-1), 5)
        os._exit(0 if right and not again.is_current() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert fingerprint.is_current()


TEXTS = families.make_texts(5)
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}


@needs_watching
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("low_memory", [False, True])
def test_encoders_of_one_model(low_memory: bool, order: int, tmp_path: Path) -> None:
    """Both serve what was written to one element, whoever is asked first."""
    families.make_sentence_transformer("bert", overrides=SIZES).save_pretrained(str(tmp_path))
    first = FastEncoder(str(tmp_path))
    second = FastEncoder(first, low_memory=low_memory)
    weight = first[0].auto_model.encoder.layer[0].intermediate.dense.weight
    for _ in range(2):
        before = [encoder.encode(TEXTS) for encoder in (first, second, first)]
        assert all(np.array_equal(each, before[0]) for each in before)
        weight.data[3, 5] += 1
        after = [encoder.encode(TEXTS) for encoder in (first, second)[::order]]
        assert np.abs(after[0] - before[0]).max() > 1e-4
        expected = FastEncoder(copy.deepcopy(first)).encode(TEXTS)
        assert all(np.array_equal(each, expected) for each in after)
    assert not first.stats.fallbacks and not second.stats.fallbacks
