"""Reranking: the passages that a search found, scored against its query.

    python -m benchmarks.encode.rerank --corpus passages --texts 100 --dtype float32,bfloat16

A cross-encoder of MiniLM's weights and a random head scores `--texts` pairs of one query, and ranks
20 in short calls. FastCrossEncoder and CrossEncoder take turns; CrossEncoder scores at its best
batch size.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np

from benchmarks.common import options
from sbert_fast.bench.names import OURS, REFERENCE

QUERY = "what is the capital of france and how many people live there"
SHORT = 20  # passages of a short call
CALLS = 5  # short calls in a round
# What a score may lose in float32; in bfloat16, twice what CrossEncoder loses.
LOSS = 1e-5


def save_cross_encoder(args: argparse.Namespace, folder: str) -> None:
    """A cross-encoder of the weights of `args.model` and a random head."""
    import transformers

    transformers.set_seed(args.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1
    )
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _build(args: argparse.Namespace, folder: str) -> list[Any]:
    """The cross-encoders in each precision, as contenders whose systems score pairs; each has
    another beside it that ranks them."""
    from sentence_transformers import CrossEncoder

    from sbert_fast import FastCrossEncoder
    from sbert_fast.bench.contenders import Contender
    from sbert_fast.bench.systems import Setting, System

    class Scores(System):
        def __init__(self, score: Any) -> None:
            self.score = score

        def encode(self, texts: list[Any], setting: Setting) -> Any:
            size = {"batch_size": setting.batch_size} if setting.batch_size else {}
            return self.score(texts, **size)

    class Ranks(Scores):
        def encode(self, texts: list[Any], setting: Setting) -> Any:
            return self.score(QUERY, [text for _, text in texts])

    save_cross_encoder(args, folder)
    found = []
    for precision in dict.fromkeys(("float32", *args.dtype)):
        stock = CrossEncoder(folder, device="cpu", model_kwargs={"dtype": precision})
        ours = FastCrossEncoder(folder, device="cpu", dtype=precision)
        if ours.unsupported_reason is not None:
            raise RuntimeError(f"the model does not run packed: {ours.unsupported_reason}")
        for name, model in ((REFERENCE, stock), (OURS, ours)):
            few = Contender(name, precision, system=Ranks(model.rank))
            all_pairs = Contender(name, precision, system=Scores(model.predict))
            all_pairs.more = {"all": all_pairs, "short": few}
            found.append(all_pairs)
    return found


def measure(args: argparse.Namespace, checkpoint: Any, corpus: Any) -> dict[str, Any]:
    """Scores of all pairs and of few, each system in turn."""
    import torch

    from sbert_fast.bench import contenders

    cpu = torch.device("cpu")
    pairs = corpus._replace(texts=[(QUERY, text) for text in corpus.texts])
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        systems = _build(args, folder)
        for each in systems:
            each.embeddings = each.system.encode(pairs.texts, each.setting)
            if each.name == REFERENCE:
                sizes = contenders.Sizes(8, 128, largest=128, times=2)
                contenders.find_setting(each, "s1", pairs, cpu, sizes)
            few = each.more["short"]
            turns.append((each, contenders.runner(each, "s1", pairs)))
            turns += [(few, contenders.runner(few, "s1", pairs.first(SHORT)))] * CALLS
        for _ in contenders.take_turns(turns, args.rounds, cpu):
            pass
    return {"rows": [_row(each, systems, args.texts) for each in systems]}


def _row(each: Any, systems: list[Any], count: int) -> dict[str, Any]:
    stock = {other.precision: other for other in systems if other.name == REFERENCE}

    def loss(system: Any) -> float:
        return float(np.abs(system.embeddings - stock["float32"].embeddings).max())

    row = {
        "system": each.name,
        "precision": each.precision,
        "loss": loss(each),
        "pairs_per_s": count / float(np.median(each.seconds)),
        "short_ms": float(np.median(each.more["short"].seconds)) * 1e3,
        "samples": {name: kind.seconds for name, kind in each.more.items()},
    }
    if each.name == REFERENCE:
        return row | {"batch_size": each.setting.batch_size}
    allowed = LOSS if each.precision == "float32" else 2 * loss(stock[each.precision])
    if row["loss"] <= allowed:
        row["ratios"] = {
            theirs: {
                name: float(np.median(np.divide(stock[theirs].more[name].seconds, kind.seconds)))
                for name, kind in each.more.items()
            }
            for theirs in dict.fromkeys(("float32", each.precision))
        }
    return row


if __name__ == "__main__":
    raise SystemExit(options.run(__doc__, ["float32", "bfloat16"], "rerank", measure))
