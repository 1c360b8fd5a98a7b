"""What the examples that train share: labels made from the bundled text, a picture of losses."""

from __future__ import annotations

import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

import sbert_fast
from sbert_fast.data import sample_texts

OUTPUT = Path("training")
METRIC = "dev_cosine_ndcg@10"
# Of every trainer. TensorBoard gets the losses where it is installed.
ARGUMENTS: dict[str, Any] = {
    "max_steps": 40,
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "report_to": ["tensorboard"] if find_spec("tensorboard") else "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
# The first so many rows.
_HELD_OUT = 80
_GOOD = set(
    """beautiful best better bright clear delicious easy enjoy excellent free fresh gentle glad good
    great happy kind love loved perfect pleasant quiet safe strong sweet thank thanks useful warm
    well win won wonderful""".split()
)
_BAD = set(
    """angry bad broken cold complain cracked damage damaged dangerous dark dead death died
    difficult dirty error errors fail failed fails failure fear fell hard hate ill lost missing
    never pain poor problem refuse refused sick slow worse worst wrong""".split()
)


def _paragraphs() -> list[list[str]]:
    """The bundled texts of more than two sentences, sentence by sentence."""
    found = (re.split(r"(?<=[.!?]) +", text) for text in sample_texts())
    return [sentences for sentences in found if len(sentences) > 2]


def _columns(names: tuple[str, ...], rows: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of rows to train on, and of those held out."""
    parts = [zip(*part, strict=True) for part in (rows[_HELD_OUT:], rows[:_HELD_OUT])]
    training, held_out = (dict(zip(names, part, strict=True)) for part in parts)
    return training, held_out


def ends_of_paragraphs() -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last sentence of each paragraph, to train on and held out."""
    return _columns(("first", "last"), [(each[0], each[-1]) for each in _paragraphs()])


def neighbours() -> tuple[dict[str, Any], dict[str, Any]]:
    """Pairs of sentences, to train on and held out; the label is 0 where `b` comes right behind `a`
    in a paragraph, 1 where it comes right before, 2 where it is of the next paragraph."""
    rows: list[tuple[str, str, int]] = []
    for here, there in pairwise(_paragraphs()):
        for a, b in pairwise(here):
            rows += [(a, b, 0), (b, a, 1), (a, there[0], 2)]
    return _columns(("a", "b", "label"), rows)


def moods() -> tuple[dict[str, Any], dict[str, Any]]:
    """Sentences to train on and held out; the label is 1 where one has a good word and no bad one,
    0 the other way round."""
    rows: list[tuple[str, int]] = []
    for sentence in sum(_paragraphs(), []):
        words = set(re.findall(r"[a-z]+", sentence.lower()))
        good, bad = not words.isdisjoint(_GOOD), not words.isdisjoint(_BAD)
        if good != bad:
            rows.append((sentence, int(good)))
    return _columns(("text", "label"), rows)


def finds_last_sentences(pairs: dict[str, Any]) -> InformationRetrievalEvaluator:
    """How well the first sentence of a paragraph finds the last one, by `METRIC`."""
    queries, corpus = ({str(k): s for k, s in enumerate(column)} for column in pairs.values())
    relevant = {key: {key} for key in queries}
    return InformationRetrievalEvaluator(queries, corpus, relevant, name="dev", write_csv=False)


def tell(name: str, trainer: Any, before: float, after: float) -> None:
    """Print what training has changed and how it ran, and draw the loss of every step."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"before {before:.3f}, after {len(losses)} steps {after:.3f}")
    stats = getattr(trainer.model, "stats", None)
    told = stats and {"packed": stats.forwards} | stats.fallbacks
    print(f"calls: {told or sbert_fast.counts(trainer.model)}")
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), [float(loss) for loss in losses])
    axes.set(xlabel="step", ylabel="loss", title=name)
    OUTPUT.mkdir(exist_ok=True)
    figure.savefig(OUTPUT / f"{name}.png", dpi=150)
    print(f"losses: {OUTPUT / name}.png")
