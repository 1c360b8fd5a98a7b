"""What it costs to compare a model with what was derived from it, beside whole calls.

    python -m benchmarks.encode.comparison --corpus mixed --texts 1000

Calls of one text are timed as they are and with the comparison left out, in turn. Beside a corpus
the comparison is lost in noise: there it is counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from benchmarks.common import options

TEXT = "A text of about sixteen tokens, such as people send to a search engine."
# Calls of one text are short: a round has many.
CALLS = 100


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _in_turn(encoder: Any, call: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Seconds of `call` as it is, and with the comparison of this moment taken for granted."""
    samples: dict[str, list[float]] = {"checked": [], "unchecked": []}
    pipeline = encoder.packed_pipeline
    granted = mock.patch.object(type(encoder._session), "pipeline", lambda *_: pipeline)
    for _ in range(rounds):
        samples["checked"].append(_seconds(call))
        with granted:
            samples["unchecked"].append(_seconds(call))
    pairs = zip(samples["checked"], samples["unchecked"], strict=True)
    return {
        **{name: statistics.median(values) for name, values in samples.items()},
        "difference": statistics.median(checked - unchecked for checked, unchecked in pairs),
        "samples": samples,
    }


def _of_corpus(encoder: Any, call: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Seconds of `call`, and how often it compares."""
    samples = [_seconds(call) for _ in range(rounds)]
    kind = type(encoder._session)
    with mock.patch.object(kind, "pipeline", autospec=True, side_effect=kind.pipeline) as compared:
        call()
    return {
        "seconds": statistics.median(samples),
        "comparisons": compared.call_count,
        "samples": samples,
    }


def measure(args: argparse.Namespace, checkpoint: Any, corpus: Any) -> dict[str, Any]:
    """What the comparison costs a call of one text, and how often a call of many compares."""
    from sbert_fast import FastEncoder

    encoder = FastEncoder(str(args.model), device="cpu")
    for inputs in ([TEXT], corpus.texts):
        encoder.encode(inputs)
    return {
        "one_text": _in_turn(encoder, lambda: encoder.encode(TEXT), CALLS * args.rounds),
        "corpus": _of_corpus(encoder, lambda: encoder.encode(corpus.texts), args.rounds),
    }


if __name__ == "__main__":
    raise SystemExit(options.run(__doc__, ["float32"], "checks", measure))
