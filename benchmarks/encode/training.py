"""Fine-tuning: steps of sentence-transformers' loss on pairs of texts, padded and packed.

    python -m benchmarks.encode.training --corpus short --texts 640 --dtype float32,bfloat16
    python -m benchmarks.encode.training --task scores --corpus passages --texts 160

A model, and a copy of it that `accelerate` has patched, take turns at the same batches: tokenise,
loss, backward, AdamW. It embeds both texts of a pair, or is a cross-encoder with a random head that
scores texts against one query. bfloat16 is autocast. Before that, a step without dropout shows
whether both give the same gradients. Peak memory is that of a process of its own for each.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks import ROOT
from benchmarks.common import options
from benchmarks.common.provenance import provenance
from benchmarks.encode.rerank import QUERY, save_cross_encoder
from sbert_fast.bench.machine import pin
from sbert_fast.bench.memory import resident_mb
from sbert_fast.bench.names import OURS, REFERENCE

# A program that reads the arguments of `peak_of`.
_PEAK = """import json, sys
from benchmarks.encode.training import peak_of
print(peak_of(*json.load(sys.stdin)))"""
PAIRS = 32  # of a batch
# What the gradients may lose, all of them as one vector, in float32; under autocast they may differ
# by twice what stock's differ from those in float32.
LOSS = 1e-4


class Training:
    """A model, a loss over pairs, and what steps it."""

    def __init__(self, name: str, precision: str, model: Any) -> None:
        import torch

        from sbert_fast import accelerate

        self.precision = precision
        self.model = copy.deepcopy(model).train()
        if name == OURS:
            accelerate(self.model)
        self.loss = self.make_loss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5)

    @staticmethod
    def load(folder: str) -> Any:
        """The model."""
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(folder, device="cpu")

    def make_loss(self) -> Any:
        from sentence_transformers.sentence_transformer import losses

        return losses.CosineSimilarityLoss(self.model)

    def sides(self, texts: list[str]) -> list[Any]:
        """What the loss takes of a batch: the first half of `texts` are partners of the second."""
        half = len(texts) // 2
        return [self.model.preprocess(side) for side in (texts[:half], texts[half:])]

    def step(self, texts: list[str]) -> None:
        """Of a batch."""
        self.backward(texts)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, texts: list[str]) -> None:
        """The gradients of a batch."""
        import torch

        sides, labels = self.sides(texts), torch.linspace(0, 1, PAIRS)
        autocast = self.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = self.loss(sides, labels)
        loss.backward()

    def gradients(self, texts: list[str]) -> Any:
        """Those of one batch without dropout, fp32 `[parameters]`."""
        import torch

        dropouts = [m for m in self.model.modules() if isinstance(m, torch.nn.Dropout)]
        kept = [module.p for module in dropouts]
        for module in dropouts:
            module.p = 0.0
        self.backward(texts)
        found = [p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        for module, p in zip(dropouts, kept, strict=True):
            module.p = p
        return torch.cat(found).numpy()


class Scoring(Training):
    """The same of a cross-encoder: each text of a batch, and one query."""

    @staticmethod
    def load(folder: str) -> Any:
        from sentence_transformers import CrossEncoder

        return CrossEncoder(folder, device="cpu")

    def make_loss(self) -> Any:
        from sentence_transformers.cross_encoder import losses

        return losses.BinaryCrossEntropyLoss(self.model)

    def sides(self, texts: list[str]) -> list[Any]:
        return [[QUERY] * len(texts), texts]


# What is trained, and the texts of a batch.
TASKS: dict[str, tuple[type[Training], int]] = {
    "embeddings": (Training, 2 * PAIRS),
    "scores": (Scoring, PAIRS),
}


def peak_of(
    task: str, name: str, precision: str, folder: str, threads: int, texts: list[str]
) -> float:
    """MB that a process holds at most, which takes a step for each batch."""
    import torch

    torch.set_num_threads(threads)
    kind, size = TASKS[task]
    training = kind(name, precision, kind.load(folder))
    for batch in batches(texts, size):
        training.step(batch)
    return resident_mb("VmHWM")


def batches(texts: list[str], size: int) -> list[list[str]]:
    """`size` texts each, the last ones that are too few left out."""
    return [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]


def measure(args: argparse.Namespace, checkpoint: Any, corpus: Any) -> dict[str, Any]:
    """Steps a second of each, in turn, and what they hold."""
    with tempfile.TemporaryDirectory() as folder:
        if args.task == "scores":
            save_cross_encoder(args, folder)
        model = folder if args.task == "scores" else str(args.model)
        return _measure(args, model, corpus.texts)


def _measure(args: argparse.Namespace, folder: str, texts: list[str]) -> dict[str, Any]:
    """Those of the model in a folder."""
    import torch

    from sbert_fast.bench import contenders
    from sbert_fast.bench.contenders import Contender
    from sbert_fast.patching import counts

    kind, size = TASKS[args.task]
    steps, model = batches(texts, size), kind.load(folder)
    if not steps:
        raise ValueError(f"--texts must be at least {size}, got {args.texts}")
    systems = [Contender(*each) for each in itertools.product((REFERENCE, OURS), args.dtype)]
    trainings = [kind(each.name, each.precision, model) for each in systems]
    for each, training in zip(systems, trainings, strict=True):
        each.embeddings = training.gradients(steps[0])
    turns = [
        (each, lambda training=training: [training.step(batch) for batch in steps])
        for each, training in zip(systems, trainings, strict=True)
    ]
    for _ in contenders.take_turns(turns, args.rounds, torch.device("cpu")):
        pass
    for each, training in zip(systems, trainings, strict=True):
        if each.name == OURS and counts(training.model).keys() != {"packed"}:
            raise RuntimeError(f"not every step ran packed: {counts(training.model)}")
        asked = args.task, each.name, each.precision, folder, args.threads, texts
        command = [sys.executable, "-c", _PEAK]
        told = subprocess.run(
            command,
            cwd=ROOT,
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        each.more["peak_rss_mb"] = float(told.stdout.splitlines()[-1])
    rows = [_row(each, systems, len(steps)) for each in systems]
    return {"task": args.task, "batch_pairs": PAIRS, "rows": rows}


def _row(each: Any, systems: list[Any], steps: int) -> dict[str, Any]:
    found = {(other.name, other.precision): other for other in systems}
    stock = found[REFERENCE, each.precision]
    truth = found.get((REFERENCE, "float32"), stock).embeddings

    def loss(gradients: Any) -> float:
        return float(np.linalg.norm(gradients - truth) / np.linalg.norm(truth))

    row = {
        **each.named,
        "loss": loss(each.embeddings),
        "steps_per_s": steps / float(np.median(each.seconds)),
        "samples": each.seconds,
        **each.more,
    }
    allowed = LOSS if each.precision == "float32" else 2 * loss(stock.embeddings)
    if each is not stock and row["loss"] <= allowed:
        row["ratio"] = float(np.median(np.divide(stock.seconds, each.seconds)))
        row["memory_ratio"] = each.more["peak_rss_mb"] / stock.more["peak_rss_mb"]
    return row


def main() -> int:
    parser = options.make_parser(__doc__, "float32", "bfloat16")
    parser.add_argument(
        "--task", choices=TASKS, default="embeddings", help="(default: %(default)s)"
    )
    args = parser.parse_args()
    options.finish(args, parser)
    pin(args.threads)
    from sbert_fast.bench.measure import make_document

    document = make_document(args, provenance(args.threads), "training", measure)
    options.conclude(document, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
