"""Worker processes and distributed inference: packed everywhere, equal vectors."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from checks import assert_same_result, assert_same_vectors
from families import make_texts
from sbert_fast import FastEncoder, ops
from sbert_fast.arguments import Chunk
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import InputError, NonFiniteEmbeddingError
from sbert_fast.packing import PackedBatch

TEXTS = make_texts(60)
Launches = Callable[[], dict[tuple[str, str], int]]
Pool = dict[str, Any]


class ReportingEncoder(FastEncoder):
    """Writes what ran in its process to a file, after every call, in worker processes too."""

    folder: str

    # Workers of sentence-transformers 6.0 and 6.1 call `encode`, those of 6.2 `_inference`.
    def encode(self, *args: Any, **kwargs: Any) -> Any:
        result = super().encode(*args, **kwargs)
        self.report()
        return result

    def _inference(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._inference(*args, **kwargs)
        self.report()
        return result

    def report(self) -> None:
        stats = self.stats
        content = {
            "launches": {op: count for (op, _), count in ops.launches().items()},
            "texts": stats.texts,
            "batches": stats.batches,
            "fallbacks": stats.fallbacks,
        }
        path = Path(self.folder) / f"{os.getpid()}.json"
        path.write_text(json.dumps(content), encoding="utf-8")


def reports(encoder: ReportingEncoder) -> list[dict[str, Any]]:
    """The last report of each process but this one."""
    own = f"{os.getpid()}.json"
    paths = sorted(Path(encoder.folder).glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.name != own]


@pytest.fixture(scope="module")
def encoder(st: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> ReportingEncoder:
    encoder = ReportingEncoder(st, batch_tokens=1_000_000)
    encoder.folder = str(tmp_path_factory.mktemp("reports"))
    return encoder


@pytest.fixture(scope="module")
def pool(encoder: ReportingEncoder) -> Iterator[Pool]:
    pool = encoder.start_multi_process_pool(["cpu", "cpu"])
    yield pool
    encoder.stop_multi_process_pool(pool)


# A pool of workers


def test_workers_run_the_packed_engine(
    encoder: ReportingEncoder, pool: Pool, launches: Launches
) -> None:
    # Small chunks, so that both workers get some whichever starts first.
    encoder.encode(make_texts(400), pool=pool, chunk_size=1)
    assert launches() == {}
    workers = reports(encoder)
    assert workers
    assert sum(worker["texts"] for worker in workers) == 400
    layers = encoder[0].auto_model.config.num_hidden_layers
    for worker in workers:
        assert worker["fallbacks"] == {}
        assert worker["launches"]["varlen_attention"] == layers * worker["texts"]
        assert worker["launches"]["segment_pool_out"] == worker["texts"]
        assert worker["launches"]["embed_norm"] == worker["texts"]


ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "chunk_size": {"chunk_size": 7},
    "one chunk": {"chunk_size": 1000},
    "tensor": {"convert_to_tensor": True, "chunk_size": 9},
    "list of tensors": {"convert_to_numpy": False, "chunk_size": 9},
    "prompt": {"prompt_name": "query"},
    "batch_size": {"batch_size": 2},
    "normalize and truncate": {"normalize_embeddings": True, "truncate_dim": 20},
    "token_embeddings": {"output_value": "token_embeddings", "chunk_size": 9},
    "progress": {"show_progress_bar": True},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_vectors_of_workers(
    encoder: ReportingEncoder, pool: Pool, arguments: dict[str, Any], launches: Launches
) -> None:
    ours = encoder.encode(TEXTS, pool=pool, **arguments)
    assert launches() == {}
    local = {name: value for name, value in arguments.items() if name != "chunk_size"}
    assert_same_result(ours, encoder.encode(TEXTS, **local))


@pytest.mark.parametrize("precision", ["int8", "ubinary"])
def test_precision_of_workers(encoder: ReportingEncoder, pool: Pool, precision: str) -> None:
    ours = encoder.encode(TEXTS, pool=pool, precision=precision, chunk_size=1000)
    local = encoder.encode(TEXTS, precision=precision)
    assert ours.dtype == local.dtype
    assert ours.shape == local.shape


def test_other_ways_to_reach_the_workers(encoder: ReportingEncoder, pool: Pool) -> None:
    expected = encoder.encode(TEXTS)
    with pytest.deprecated_call():
        assert_same_vectors(encoder.encode_multi_process(TEXTS, pool), expected)
    assert_same_vectors(encoder.encode(tuple(TEXTS), pool=pool), expected)
    query = encoder.encode_query(TEXTS, pool=pool)
    assert_same_vectors(query, encoder.encode_query(TEXTS))
    assert_same_vectors(encoder.encode(TEXTS[0], pool=pool), expected[0])


@pytest.mark.filterwarnings("ignore:The `encode_multi_process` method has been deprecated")
@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_multi_process"])
def test_the_default_batch_size_limits_nothing_in_workers(
    encoder: ReportingEncoder, pool: Pool, method: str
) -> None:
    def batches(**arguments: int) -> int:
        before = sum(worker["batches"] for worker in reports(encoder))
        getattr(encoder, method)(texts, pool=pool, chunk_size=len(texts), **arguments)
        return sum(worker["batches"] for worker in reports(encoder)) - before

    texts = ["the sea and the sun"] * (32 * encoder.max_seq_length // 4)
    assert batches() == 1
    assert batches(batch_size=32) > 1


def test_bad_input_never_reaches_a_worker(encoder: ReportingEncoder, pool: Pool) -> None:
    before = reports(encoder)
    with pytest.raises(InputError, match=r" inputs\[60\] must be a str, got NoneType"):
        encoder.encode([*TEXTS, None], pool=pool)
    assert reports(encoder) == before
    # And the pool still serves.
    assert len(encoder.encode(TEXTS, pool=pool)) == len(TEXTS)


@pytest.mark.parametrize(
    "inputs",
    [[("a", "sea"), ("b", "sun")], {"text": "sea"}, [TEXTS[0], {"text": "sun"}, ["a", "b"]]],
    ids=repr,
)
def test_workers_run_other_inputs_in_sentence_transformers(
    encoder: ReportingEncoder, st: SentenceTransformer, pool: Pool, inputs: Any
) -> None:
    for arguments in ({}, {"precision": "binary"}, {"output_value": "token_embeddings"}):
        before = sum(encoder.stats.fallbacks.values())
        ours = encoder.encode(inputs, pool=pool, **arguments)
        assert_same_result(ours, st.encode(inputs, **arguments))
        assert sum(encoder.stats.fallbacks.values()) == before + 1


def test_list_of_devices(st: SentenceTransformer, tmp_path: Path, launches: Launches) -> None:
    encoder = ReportingEncoder(st, dtype="bfloat16")
    encoder.folder = str(tmp_path)
    ours = encoder.encode(TEXTS, device=["cpu"], chunk_size=20)
    assert launches() == {}
    assert [worker["texts"] for worker in reports(encoder)] == [len(TEXTS)]
    assert [worker["fallbacks"] for worker in reports(encoder)] == [{}]
    # The dtype of the encoder goes with it.
    local = encoder.encode(TEXTS)
    assert_same_vectors(ours, local)
    assert np.abs(local - st.encode(TEXTS)).max() > np.abs(ours - local).max()


# Texts that are named where a worker ran them


POISON, HUGE = "river", "mountain"
CLEAN = [text for text in TEXTS if POISON not in text and HUGE not in text]
POISONED = [*CLEAN[:3], POISON, *CLEAN[3:20], f"{POISON} and sea", *CLEAN[20:]]


class PoisonedEncoder(FastEncoder):
    """The engine turns the hidden state of one word into NaN, and finds no memory for another."""

    def encode(self, *args: Any, **how: Any) -> Any:
        with self._poison():
            return super().encode(*args, **how)

    def _inference(self, *args: Any, **how: Any) -> Any:
        with self._poison():
            return super()._inference(*args, **how)

    def _poison(self) -> Any:
        forward = PackedEncoder.__call__
        poison, huge = self.tokenizer.convert_tokens_to_ids([POISON, HUGE])

        def poisoned(engine: PackedEncoder, batch: PackedBatch, *rest: Any) -> torch.Tensor:
            if (batch.input_ids == huge).any():
                raise torch.OutOfMemoryError("no memory")
            found = batch.input_ids == poison
            return forward(engine, batch, *rest).masked_fill(found[:, None], float("nan"))

        return patch.object(PackedEncoder, "__call__", poisoned)


@pytest.fixture(scope="module")
def poisoned(st: SentenceTransformer) -> PoisonedEncoder:
    return PoisonedEncoder(st)


@pytest.fixture(scope="module")
def poisoned_pool(poisoned: PoisonedEncoder) -> Iterator[Pool]:
    pool = poisoned.start_multi_process_pool(["cpu"])
    yield pool
    poisoned.stop_multi_process_pool(pool)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"precision": "int8"},
        {"output_value": "token_embeddings"},
        {"output_value": None},
    ],
)
@pytest.mark.parametrize("chunk_size", [3, None])
def test_non_finite_result_of_a_worker(
    poisoned: PoisonedEncoder, poisoned_pool: Pool, chunk_size: int | None, arguments: Any
) -> None:
    how = arguments | {"pool": poisoned_pool, "chunk_size": chunk_size}
    with pytest.raises(NonFiniteEmbeddingError, match=r"inputs\[3, 21\];") as caught:
        poisoned.encode(POISONED, **how)
    assert caught.value.indices == [3, 21]
    with pytest.raises(NonFiniteEmbeddingError) as caught:
        poisoned.encode(POISON, **how)
    assert caught.value.indices == [0]
    # And the pool still serves.
    assert_same_result(poisoned.encode(CLEAN, **how), poisoned.encode(CLEAN, **arguments))


@pytest.mark.skipif(
    not hasattr(SentenceTransformer, "_inference"),
    reason="an error ends the workers of this sentence-transformers",
)
def test_other_errors_of_a_worker(poisoned: PoisonedEncoder, poisoned_pool: Pool) -> None:
    tokens: dict[str, Any] = {"output_value": "token_embeddings", "precision": "int8"}
    huge = [HUGE if text == POISON else text for text in POISONED]
    for texts, arguments, error, message in (
        (POISONED, tokens, NonFiniteEmbeddingError, r"inputs\[3\]"),
        (huge, {}, torch.OutOfMemoryError, r"^inputs\[3\] with its \d+ tokens"),
    ):
        with pytest.raises(error, match=message):
            poisoned.encode(texts, pool=poisoned_pool, chunk_size=1, **arguments)


def test_chunks_know_where_they_begin() -> None:
    chunk = Chunk(range(100), checks=False)
    part = chunk[30:60][2:9]
    assert part == list(range(32, 39))
    assert (part.offset, part.checks) == (32, False)
    assert (chunk[:7].offset, chunk[-5:].offset, chunk[3]) == (0, 95, 3)
    again = pickle.loads(pickle.dumps(part))
    assert (again, again.offset, again.checks) == (part, 32, False)


# Distributed inference (sentence-transformers 6.2 and later)


def test_distributed_inference(
    encoder: ReportingEncoder, poisoned: PoisonedEncoder, tmp_path: Path, launches: Launches
) -> None:
    distributed = pytest.importorskip("sentence_transformers.util.distributed")
    if not hasattr(distributed, "_DistributedInference"):
        pytest.skip("this sentence-transformers has no distributed inference")
    expected, before = encoder.encode(TEXTS), encoder.stats.fallbacks
    ops.reset_launches()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        encoder._distributed_inference = distributed._DistributedInference(encoder)
        ours = encoder.encode(TEXTS)
        assert launches() != {}
        assert_same_result(
            encoder.encode(TEXTS, convert_to_tensor=True), torch.from_numpy(expected)
        )
        assert_same_result(encoder.encode([]), np.array([]))
        poisoned._distributed_inference = distributed._DistributedInference(poisoned)
        with pytest.raises(NonFiniteEmbeddingError) as caught:
            poisoned.encode(POISONED)
        assert caught.value.indices == [3, 21]
    finally:
        encoder._distributed_inference = poisoned._distributed_inference = None
        torch.distributed.destroy_process_group()
    assert_same_result(ours, expected)
    assert encoder.stats.fallbacks == before
