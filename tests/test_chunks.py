"""Late chunking: parts of a document, pooled from the states of the whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from checks import assert_same_vectors
from families import FAMILIES, make_sentence_transformer, make_texts, make_xlnet
from sbert_fast import FastEncoder, ops
from sbert_fast.errors import InputError
from sbert_fast.sentence_transformers import chunks

DOCUMENT = "The river runs south. In winter it is cold, and few people walk there!  "
SPANS = [(0, 21), (22, 43), (10, 30), (len(DOCUMENT) - 9, len(DOCUMENT))]


def expected(stock: SentenceTransformer, document: str, spans: Any, prompt: str = "") -> np.ndarray:
    """By hand: mean of the states of tokens, one part after the other."""
    text = prompt + document
    inputs = stock.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = inputs.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        (states,) = stock[0].auto_model(**inputs)[:1]
    rows = []
    for start, end in spans:
        start, end = start + len(prompt), end + len(prompt)
        inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
        rows.append(states[0, inside].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=1).numpy()


@pytest.mark.parametrize("prompt", ["", "find the "])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_parts_are_pooled_from_the_states_of_the_whole(family: str, prompt: str) -> None:
    stock = make_sentence_transformer(family)
    encoder = FastEncoder(stock)
    found = encoder.encode_chunks(DOCUMENT, SPANS, prompt=prompt or None)
    assert_same_vectors(found, expected(stock, DOCUMENT, SPANS, prompt))
    assert not encoder.stats.fallbacks


def test_several_documents(launches: Any) -> None:
    encoder = FastEncoder(make_sentence_transformer())
    documents = [DOCUMENT, "one word", *make_texts(3)]
    spans: list[Any] = [SPANS, [(0, 8)], [(0, 1)], [], [(0, 3)]]
    launches()
    found = encoder.encode_chunks(documents, spans)
    assert sum(count for (op, _), count in launches().items() if op == "embed_norm") == 1
    assert [len(part) for part in found] == [4, 1, 1, 0, 1]
    for document, own, part in zip(documents, spans, found, strict=True):
        assert part.shape[1] == 64
        if own:
            assert_same_vectors(part, encoder.encode_chunks(document, own))


def test_parts_of_any_length_take_no_more_memory_than_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    pad = chunks.pad_sequence

    def record(parts: Any, **how: Any) -> torch.Tensor:
        padded = pad(parts, **how)
        sizes.append(padded.shape[:2].numel())
        return padded

    monkeypatch.setattr(chunks, "pad_sequence", record)
    stock = make_sentence_transformer()
    words = [match.span() for match in re.finditer(r"\w+", DOCUMENT)]
    spans = [(0, len(DOCUMENT)), *words, *SPANS, *words]
    found = FastEncoder(stock).encode_chunks(DOCUMENT, spans)
    assert_same_vectors(found, expected(stock, DOCUMENT, spans))
    assert max(sizes) <= len(stock.tokenizer(DOCUMENT)["input_ids"])


_PEAK = """
import resource, sys
sys.path.insert(0, {tests!r})
import families
from sbert_fast import FastEncoder, ops
st = families.make_sentence_transformer({name!r}, overrides={{"max_position_embeddings": 8192}})
st.max_seq_length = 8192
encoder = FastEncoder(st, batch_tokens=8192)
encoder.encode("sea")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encoder.encode_chunks("sea " * 8190, [(0, 4 * 8190), *((i, i + 3) for i in range(0, 4000, 4))])
assert not encoder.stats.fallbacks and encoder.stats.tokens == 8192 + 3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not ops.extension.CPU.available, reason=str(ops.extension.CPU.reason))
@pytest.mark.parametrize(
    "name", [n for n in ("modernbert", "nomic_bert", "deberta-v2") if n in FAMILIES]
)
def test_memory_of_a_long_text_grows_with_its_length(name: str) -> None:
    script = _PEAK.format(tests=str(Path(__file__).parent), name=name)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
    )
    # In KiB. The scores of one head, [8192, 8192], would take 256 MiB; a thousand parts, each
    # padded to the longest, 2 GiB.
    assert int(done.stdout.split()[-1]) < 100 * 1024


def test_options() -> None:
    model = make_sentence_transformer(normalize=False)
    encoder = FastEncoder(model, prompts={"query": "find the "}, default_prompt_name="query")
    plain = encoder.encode_chunks(DOCUMENT, SPANS, prompt="")
    prompted = encoder.encode_chunks(DOCUMENT, SPANS)
    assert not np.allclose(plain, prompted)
    assert np.array_equal(prompted, encoder.encode_chunks(DOCUMENT, SPANS, prompt_name="query"))
    cut = encoder.encode_chunks(
        DOCUMENT, SPANS, convert_to_tensor=True, normalize_embeddings=True, truncate_dim=8
    )
    assert isinstance(cut, torch.Tensor) and cut.shape == (4, 8)
    torch.testing.assert_close(cut.norm(dim=1), torch.ones(4))


def test_a_model_that_runs_in_sentence_transformers() -> None:
    stock = make_xlnet()
    with pytest.warns(UserWarning, match="unaccelerated"):
        encoder = FastEncoder(stock)
    found = encoder.encode_chunks(DOCUMENT, SPANS, normalize_embeddings=True)
    assert_same_vectors(found, expected(stock, DOCUMENT, SPANS))
    assert sum(encoder.stats.fallbacks.values()) == 1


LONG = " ".join(make_texts(8, max_words=40))
REFUSED: dict[str, tuple[type[Exception], Any, Any]] = {
    r"spans\[0\]\[1\] must be \(start, end\), got 3": (TypeError, DOCUMENT, [(0, 3), 3]),
    r"must be \(start, end\)": (TypeError, DOCUMENT, [(0.0, 3)]),
    r"within the \d+ characters .* got \(3, 3\)": (ValueError, DOCUMENT, [(3, 3)]),
    r"within the \d+ characters .* got \(0, 1000\)": (ValueError, DOCUMENT, [(0, 1000)]),
    r"spans\[0\]\[0\] holds no token": (ValueError, DOCUMENT, [(21, 22)]),
    r"of which 0 are among the 64 that are kept": (ValueError, LONG, [(len(LONG) - 9, len(LONG))]),
    r"spans\[1\]\[0\] has \d+ tokens, of which": (ValueError, ["a", LONG], [[], [(0, len(LONG))]]),
    r"of each of 2 documents, got 1": (ValueError, ["a", "b"], [[(0, 1)]]),
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_is_refused(match: str) -> None:
    error, documents, spans = REFUSED[match]
    with pytest.raises(error, match=match):
        FastEncoder(make_sentence_transformer()).encode_chunks(documents, spans)


def test_a_tokenizer_without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FastEncoder(make_sentence_transformer())
    monkeypatch.setattr(type(encoder.tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="needs a tokenizer that gives offsets"):
        encoder.encode_chunks(DOCUMENT, SPANS)
