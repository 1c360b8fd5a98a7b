"""Reranking: the passages that a search found, scored against its query.

    python -m benchmarks.encode.rerank --corpus passages --texts 100 --dtype float32,bfloat16

A cross-encoder of MiniLM's weights and a random head scores `--texts` pairs of one query, and in
short calls 20. FastCrossEncoder and CrossEncoder take turns; CrossEncoder has its best batch size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.common import arguments
from benchmarks.common.provenance import provenance
from benchmarks.common.text import OURS, REFERENCE, say

QUERY = "what is the capital of france and how many people live there"
SHORT = 20  # passages of a short call
CALLS = 5  # short calls in a round
# What a score may lose in float32; in bfloat16, twice what CrossEncoder loses.
LOSS = 1e-5

Score = Callable[..., Any]


def _models(args: argparse.Namespace, folder: str) -> dict[tuple[str, str], Score]:
    """How each system scores pairs in each precision."""
    import transformers
    from sentence_transformers import CrossEncoder

    from sbert_fast import FastCrossEncoder

    transformers.set_seed(args.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1
    )
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    found: dict[tuple[str, str], Score] = {}
    for precision in dict.fromkeys(("float32", *args.dtype)):
        stock = CrossEncoder(folder, device="cpu", model_kwargs={"dtype": precision})
        found[REFERENCE, precision] = stock.predict
        ours = FastCrossEncoder(folder, device="cpu", dtype=precision)
        if ours.unsupported_reason is not None:
            raise RuntimeError(f"the model does not run packed: {ours.unsupported_reason}")
        found[OURS, precision] = ours.predict
    return found


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _batch_size(score: Score, pairs: list[Any]) -> int:
    """The fastest of the batch sizes that people use."""
    times = {}
    for size in (8, 16, 32, 64, 128):
        run = partial(score, pairs, batch_size=size)
        times[size] = min(_seconds(run), _seconds(run))
    return min(times, key=times.__getitem__)


def _losses(scores: dict[tuple[str, str], Any]) -> dict[tuple[str, str], float]:
    exact = scores[REFERENCE, "float32"]
    return {key: float(np.abs(found - exact).max()) for key, found in scores.items()}


def _is_right(precision: str, losses: dict[tuple[str, str], float]) -> bool:
    """Whether our scores are as near to CrossEncoder's in float32 as they must be."""
    allowed = LOSS if precision == "float32" else 2 * losses[REFERENCE, precision]
    return losses[OURS, precision] <= allowed


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the arguments ask for, as the document that report.py shows."""
    from benchmarks.common.corpora import describe, load_corpus
    from benchmarks.common.models import ModelFolder

    document = provenance(args.threads)
    folder = ModelFolder(args.model, args.threads)
    texts = load_corpus(args.corpus, args.texts, args.seed, folder.count)
    pairs = [(QUERY, text) for text in texts]
    with tempfile.TemporaryDirectory() as place:
        models = _models(args, place)
        losses = _losses({key: score(pairs) for key, score in models.items()})
        sizes = {
            key: {"batch_size": _batch_size(score, pairs)}
            for key, score in models.items()
            if key[0] == REFERENCE
        }
        samples: dict[tuple[str, str], dict[str, list[float]]] = {
            key: {"all": [], "short": []} for key in models
        }
        for number in range(args.rounds):
            say(f"round {number + 1} of {args.rounds}")
            for key, score in models.items():
                how = sizes.get(key, {})
                samples[key]["all"].append(_seconds(partial(score, pairs, **how)))
                calls = [_seconds(partial(score, pairs[:SHORT])) for _ in range(CALLS)]
                samples[key]["short"].append(statistics.median(calls))
    settings = ("threads", "rounds", "texts", "seed")
    return document | {
        "benchmark": "rerank",
        "model": {"name": args.model_name},
        "corpus": describe(args.corpus, folder.tokenize(texts).lengths),
        "settings": {name: getattr(args, name) for name in settings},
        "rows": [_row(key, samples, sizes, losses, args.texts) for key in models],
    }


def _row(
    key: tuple[str, str],
    samples: dict[tuple[str, str], dict[str, list[float]]],
    sizes: dict[tuple[str, str], dict[str, int]],
    losses: dict[tuple[str, str], float],
    count: int,
) -> dict[str, Any]:
    system, precision = key
    median = {name: statistics.median(taken) for name, taken in samples[key].items()}
    row = {
        "system": system,
        "precision": precision,
        "loss": losses[key],
        "pairs_per_s": count / median["all"],
        "short_ms": median["short"] * 1e3,
        "samples": samples[key],
        **sizes.get(key, {}),
    }
    if system == OURS and _is_right(precision, losses):
        row["ratios"] = {
            theirs: {
                name: statistics.median(
                    a / b for a, b in zip(samples[REFERENCE, theirs][name], mine, strict=True)
                )
                for name, mine in samples[key].items()
            }
            for theirs in dict.fromkeys(("float32", precision))
        }
    return row


if __name__ == "__main__":
    raise SystemExit(arguments.run(__doc__, ["float32", "bfloat16"], measure))
