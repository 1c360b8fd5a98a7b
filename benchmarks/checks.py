"""What it costs to compare a model with what was derived from it, beside whole calls.

    python benchmarks/checks.py --corpus mixed --texts 1000

Calls of one text and of a corpus are timed as they are and with the comparison left out, in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import report
from encode import finish, make_parser
from process import pin
from provenance import provenance, write_json

TEXT = "A text of about sixteen tokens, such as people send to a search engine."


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _in_turn(encoder: Any, call: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Seconds of `call` as it is, and with the comparison of this moment taken for granted."""
    pipeline = encoder._pipeline()
    samples: dict[str, list[float]] = {"checked": [], "unchecked": []}
    for _ in range(rounds):
        samples["checked"].append(_seconds(call))
        with mock.patch.object(type(encoder._session), "pipeline", lambda *_: pipeline):
            samples["unchecked"].append(_seconds(call))
    pairs = zip(samples["checked"], samples["unchecked"], strict=True)
    return {
        **{name: statistics.median(values) for name, values in samples.items()},
        "difference": statistics.median(checked - unchecked for checked, unchecked in pairs),
        "samples": samples,
    }


def measure(args: Any) -> dict[str, Any]:
    from corpora import load_corpus

    from sbert_fast import FastEncoder

    encoder = FastEncoder(str(args.model), device="cpu")
    texts = load_corpus(args.corpus, args.texts, args.seed)
    for inputs in ([TEXT], texts):
        encoder.encode(inputs)
    return provenance(args.threads) | {
        "benchmark": "checks",
        "model": {"name": args.model_name},
        "settings": {
            name: getattr(args, name) for name in ("threads", "rounds", "texts", "corpus")
        },
        "one_text": _in_turn(encoder, lambda: encoder.encode(TEXT), 100 * args.rounds),
        "corpus": _in_turn(encoder, lambda: encoder.encode(texts), args.rounds),
        "comparison_alone": statistics.median(
            _seconds(encoder._pipeline) for _ in range(100 * args.rounds)
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, store and print."""
    parser = make_parser(__doc__, ("float32",))
    args = parser.parse_args(argv)
    finish(args, parser)
    pin(args.threads)
    document = measure(args)
    if args.json:
        write_json(document, args.json)
    for name in ("one_text", "corpus"):
        row = document[name]
        share = row["difference"] / row["unchecked"]
        report.say(
            f"{name}: {row['checked'] * 1e3:.3f} ms, of which the comparison takes "
            f"{row['difference'] * 1e6:.0f} us ({share:.2%})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
