"""`submit` and `aencode`: results as of serial calls, bit for bit, whoever calls beside."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from checks import bits
from families import make_cross_encoder, make_sentence_transformer, make_texts
from sbert_fast import FastCrossEncoder, FastEncoder
from sbert_fast.errors import (
    InputError,
    NonFiniteEmbeddingError,
)

TEXTS = make_texts(60, seed=3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"priority": "first"}, r"priority must be one of .*, got 'first'"),
        ({"deadline": -1}, "deadline must be None or seconds from now, got -1"),
        ({"deadline": float("nan")}, "deadline must be None or seconds from now, got nan"),
    ],
)
def test_invalid_turns(encoder: FastEncoder, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        encoder.submit("a text", **arguments)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"prompt_name": "query", "normalize_embeddings": True},
    {"truncate_dim": 5, "convert_to_tensor": True},
    {"precision": "binary", "convert_to_numpy": False},
    {"precision": "int8"},
    {"output_value": "token_embeddings", "prompt": "look: "},
    {"output_value": None},
    {"batch_size": 2},
]


def flat(result: Any) -> list[Any]:
    """Arrays in a result, as bits."""
    if isinstance(result, dict):
        return [flat(value) for _, value in sorted(result.items())]
    if isinstance(result, list):
        return [flat(each) for each in result]
    if isinstance(result, (torch.Tensor, np.ndarray)):
        array = np.ascontiguousarray(result)
        return [type(result), str(array.dtype), array.shape, array.tobytes()]
    return [result]


def gated(model: Any) -> threading.Event:
    """An event before which a model's queue does not go on to its second batch."""
    gate, began = threading.Event(), threading.Event()
    runner = model.queue._runner
    run = runner.run

    def waits(inputs: Any, options: dict[str, Any]) -> Any:
        began.set()
        assert gate.wait(30)
        return run(inputs, options)

    runner.run = waits
    model.submit(["the first"] if model.method == "encode" else [("the", "first")])
    assert began.wait(30)
    return gate


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_results_are_those_of_encode(encoder: FastEncoder, options: dict[str, Any]) -> None:
    inputs = [TEXTS[:3], TEXTS[3], TEXTS[4:30], [], (TEXTS[5], TEXTS[6]), iter(TEXTS[7:9])]
    if options.get("precision") == "int8":
        inputs = [TEXTS, TEXTS[:50]]
    gate = gated(encoder)
    calls = [encoder.submit(copy.copy(each), **options) for each in inputs]
    gate.set()
    lists = [list(each) if hasattr(each, "__next__") else each for each in inputs]
    lists[-1] = TEXTS[7:9] if len(inputs) == 6 else lists[-1]
    assert [flat(call.result(30)) for call in calls] == [
        flat(encoder.encode(each, **options)) for each in lists
    ]


def test_calls_share_packed_batches(encoder: FastEncoder) -> None:
    gate = gated(encoder)
    calls = [encoder.submit(text, prompt_name="query") for text in TEXTS[:40]]
    others = [encoder.submit(text) for text in TEXTS[:3]]
    before = encoder.stats.batches
    gate.set()
    wait([*calls, *others], 30)
    # The first call of all, forty of one kind, three of another.
    assert encoder.stats.batches - before == 3
    assert sum(call.tokens for call in calls) < encoder.queue.max_tokens


def test_a_poisoned_text_fails_its_own_call(encoder: FastEncoder) -> None:
    gate = gated(encoder)
    good, bad = encoder.submit(TEXTS[:2]), encoder.submit([TEXTS[2], None])
    surrogate = encoder.submit("\ud800")
    wrong = encoder.submit("a text", normalise=True)
    gate.set()
    np.testing.assert_array_equal(good.result(30), encoder.encode(TEXTS[:2]))
    for call, told in ((bad, r"inputs\[1\] must be a str"), (surrogate, "lone surrogate")):
        with pytest.raises(InputError, match=told):
            call.result(30)
    with pytest.raises(ValueError, match="normalise"):
        wrong.result(30)


def test_a_text_whose_embedding_is_not_finite_fails_its_own_call() -> None:
    st = make_sentence_transformer()
    (number,) = st.tokenizer("lion", add_special_tokens=False)["input_ids"][:1]
    encoder = FastEncoder(st)
    # Finite weights whose sum is not.
    with torch.no_grad():
        st[0].auto_model.embeddings.word_embeddings.weight[number] = 3e38
    gate = gated(encoder)
    good, bad = encoder.submit(["tiger"] * 3), encoder.submit(["tiger", "lion"])
    gate.set()
    assert good.result(30).shape[0] == 3
    with pytest.raises(NonFiniteEmbeddingError) as raised:
        bad.result(30)
    assert raised.value.indices == [1]


@pytest.mark.parametrize("options", [{}, {"convert_to_tensor": True}, {"apply_softmax": True}])
def test_results_are_those_of_predict(options: dict[str, Any]) -> None:
    model = FastCrossEncoder(make_cross_encoder(num_labels=1))
    pairs = list(zip(TEXTS[:20], TEXTS[20:40], strict=True))
    inputs = [pairs[:3], pairs[4], pairs[5:20]]
    gate = gated(model)
    calls = [model.submit(each, **options) for each in inputs]
    before = model.stats.batches
    gate.set()
    assert [flat(call.result(30)) for call in calls] == [
        flat(model.predict(each, **options)) for each in inputs
    ]
    assert model.stats.batches - before == 2 + len(inputs)


def test_stale_tokens_are_not_used(encoder: FastEncoder) -> None:
    gate = gated(encoder)
    call = encoder.submit(" ".join(TEXTS[:9]))
    encoder.max_seq_length, before = 8, encoder.max_seq_length
    gate.set()
    try:
        expected = encoder.encode(" ".join(TEXTS[:9]))
        np.testing.assert_array_equal(call.result(30), expected)
    finally:
        encoder.max_seq_length = before


def test_calls_of_before_and_after_a_change_share_a_batch(encoder: FastEncoder) -> None:
    gate = gated(encoder)
    text = " ".join(TEXTS[:9])
    older, before = encoder.submit(text, priority="bulk"), encoder.max_seq_length
    try:
        encoder.max_seq_length = 8
        newer = encoder.submit(text, priority="bulk")
        gate.set()
        expected = encoder.encode(text)
        for call in (older, newer):
            np.testing.assert_array_equal(call.result(30), expected)
    finally:
        encoder.max_seq_length = before


@pytest.mark.parametrize("options", [{}, {"batch_size": 8}])
def test_what_a_caller_changes_later_is_not_meant(
    encoder: FastEncoder, options: dict[str, Any]
) -> None:
    gate, texts, prompts = gated(encoder), TEXTS[:3], dict(encoder.prompts)
    expected = encoder.encode(texts, prompt_name="query", **options)
    mine = list(texts)
    call = encoder.submit(mine, prompt_name="query", **options)
    mine.clear()
    if not options:
        encoder.prompts["query"] = "quite another "
    gate.set()
    try:
        np.testing.assert_array_equal(call.result(30), expected)
    finally:
        encoder.prompts.update(prompts)


# Many callers


@pytest.fixture(scope="module")
def expected(st: SentenceTransformer) -> tuple[FastEncoder, list[Any]]:
    encoder = FastEncoder(st)
    return encoder, [bits(encoder.encode(text)) for text in TEXTS]


def test_a_thousand_coroutines(expected: tuple[FastEncoder, list[Any]]) -> None:
    encoder, serial = expected

    async def caller(number: int) -> None:
        for step in range(4):
            index = (number * 7 + step * 13) % (len(TEXTS) - 2)
            found = await encoder.aencode(TEXTS[index : index + 2])
            for row, reference in zip(found, serial[index : index + 2], strict=True):
                assert np.array_equal(bits(row), reference)

    async def main() -> None:
        await asyncio.gather(*(caller(number) for number in range(1000)))

    asyncio.run(main())


def test_many_threads(expected: tuple[FastEncoder, list[Any]]) -> None:
    encoder, serial = expected
    wrong: list[int] = []

    def caller(number: int) -> None:
        for step in range(25):
            index = (number * 11 + step * 17) % len(TEXTS)
            encode = encoder.encode if step % 5 == 0 else lambda text: encoder.submit(text).result()
            if not np.array_equal(bits(encode(TEXTS[index])), serial[index]):
                wrong.append(index)

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("text", ["a text", "word " * 10_000], ids=["short", "long"])
def test_a_cancelled_task_drops_its_call(encoder: FastEncoder, text: str) -> None:
    gate = gated(encoder)

    async def main() -> None:
        task = asyncio.ensure_future(encoder.aencode([text] * 3))
        while not encoder.queue.waiting_texts:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while encoder.queue.waiting_texts:
            await asyncio.sleep(0.001)

    asyncio.run(main())
    gate.set()


# Copies, forks, the end of a process


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_have_queues_of_their_own(
    encoder: FastEncoder, duplicate: Callable[[FastEncoder], FastEncoder]
) -> None:
    expected = encoder.submit(TEXTS[:3]).result(30)
    other = duplicate(encoder)
    assert other.queue is not encoder.queue
    np.testing.assert_array_equal(other.submit(TEXTS[:3]).result(30), expected)


_PROCESS = """
import os, sys, numpy as np
from sbert_fast import FastEncoder
encoder = FastEncoder(sys.argv[1], device="cpu")
expected = encoder.submit("a text").result(30)
waiting = [encoder.submit("word " * 300, priority="bulk") for n in range(50)]
child = os.fork()
same = np.array_equal(encoder.submit("a text").result(30), expected)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_fork_and_the_end_of_a_process_while_work_waits(saved: str) -> None:
    command = [sys.executable, "-P", "-W", "ignore", "-c", _PROCESS, saved]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_an_idle_thread_ends(monkeypatch: pytest.MonkeyPatch, encoder: FastEncoder) -> None:
    monkeypatch.setattr("sbert_fast.queueing._IDLE_SECONDS", 0.01)
    encoder.submit("a text").result(30)
    thread = encoder.queue._thread
    if thread is not None:
        thread.join(30)
    assert encoder.queue._thread is None
    assert encoder.submit("another").result(30).shape == encoder.encode("another").shape
