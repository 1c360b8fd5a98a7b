"""Tables of rotary positions: their bits, how they grow, and how little memory they take."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import families
from checks import assert_same_vectors
from packed import assert_same, packed_states, reference_states
from patched import LENGTHS, assert_same_states, pair, run
from sbert_fast import FastEncoder
from sbert_fast.engine import PackedEncoder
from sbert_fast.patching import counts
from sbert_fast.rotary import RotaryTable

ASKED = [1, 128, 512, 513, 700, 4097, 6000]


@pytest.mark.parametrize("width", [4, 5, 32, 128])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_position_has_the_same_bits_in_every_table(width: int, threads: int) -> None:
    frequencies, before = torch.rand(width), torch.get_num_threads()
    whole = RotaryTable(frequencies).first(max(ASKED))
    torch.set_num_threads(threads)
    try:
        grown = RotaryTable(frequencies)
        for asked in ASKED:
            for turns, all_turns in zip(grown.first(asked), whole, strict=True):
                assert turns.shape[0] >= asked
                assert torch.equal(turns, all_turns[: turns.shape[0]])
    finally:
        torch.set_num_threads(before)
    angles = torch.arange(6000.0)[:, None] * frequencies
    torch.testing.assert_close(whole[0][:6000], angles.cos())
    torch.testing.assert_close(whole[1][:6000], angles.sin())


def test_threads_share_a_table_that_grows() -> None:
    frequencies = torch.rand(16)
    expected = RotaryTable(frequencies).first(2 * max(ASKED))[0]
    for _ in range(5):
        table = RotaryTable(frequencies)
        with ThreadPoolExecutor(8) as pool:
            for asked, (cos, _) in zip(ASKED, pool.map(table.first, ASKED), strict=True):
                assert torch.equal(cos[:asked], expected[:asked])


def test_a_table_keeps_the_frequencies_it_was_made_of() -> None:
    frequencies = torch.rand(16)
    table, expected = RotaryTable(frequencies), RotaryTable(frequencies.clone()).first(2000)
    frequencies.mul_(2)
    assert torch.equal(table.first(2000)[1], expected[1])


@pytest.mark.parametrize("positions", [10**9, 2**31, 2**62])
def test_tables_are_as_long_as_texts_and_not_as_the_config_says(positions: int) -> None:
    original, model = pair("modernbert", max_position_embeddings=positions)
    batch = families.make_batch("modernbert", LENGTHS)
    assert_same_states(run(model, batch), run(original, batch), batch["attention_mask"])
    assert counts(model) == {"packed": 1}
    st = families.make_sentence_transformer(
        "modernbert", overrides={"max_position_embeddings": positions}
    )
    for limit in (64, 10**30):
        st.tokenizer.model_max_length = limit
        encoder, texts = FastEncoder(st), families.make_texts(5)
        assert_same_vectors(encoder.encode(texts), st.encode(texts))
        assert not encoder.stats.fallbacks


def test_a_text_longer_than_all_before_it() -> None:
    made = families.make_model("modernbert", max_position_embeddings=4096)
    engine = PackedEncoder(made)
    short = families.make_batch("modernbert", [60, 5])
    before = packed_states(engine, short)
    long = families.make_batch("modernbert", [900, 60])
    assert_same(packed_states(engine, long), reference_states(made, long))
    assert all(map(torch.equal, packed_states(engine, short), before))


@pytest.mark.parametrize(("last", "outcome"), [(5000, "packed"), (10**9, "position_ids outside")])
def test_positions_of_the_caller(last: int, outcome: str) -> None:
    original, model = pair("modernbert", max_position_embeddings=2**62)
    batch: dict[str, Any] = families.make_batch("modernbert", LENGTHS)
    batch["position_ids"] = torch.arange(64)[None] + last - 63
    ours, theirs = run(model, batch), run(original, batch)
    assert [each.startswith(outcome) for each in counts(model)] == [True]
    keep = batch["attention_mask"].bool()
    assert_same_vectors(ours[0][keep], theirs[0][keep])
