"""Hidden states of a batch: by the model itself, and by the packed engine."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checks import assert_same_vectors
from families import make_batch
from sbert_fast import ops
from sbert_fast.engine import PackedEncoder
from sbert_fast.packing import pack
from sbert_fast.testing import assert_close_to_oracle


def reference_states(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states `[L, E]` of each text by the model's own forward, which runs no op of ours."""
    before = ops.launches()
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    assert ops.launches() == before
    return [
        row[keep.bool()].float() for row, keep in zip(hidden, batch["attention_mask"], strict=True)
    ]


def packed_states(encoder: PackedEncoder, batch: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states `[L, E]` of each text by the packed engine, which runs only ops of ours."""
    keep = batch["attention_mask"].bool()
    types = batch.get("token_type_ids")
    lengths = keep.sum(1)
    architecture = encoder.architecture
    packed = pack(
        batch["input_ids"][keep].int().numpy(),
        np.concatenate(([0], lengths.cumsum(0).numpy())),
        np.arange(lengths.shape[0]),
        token_types=None if types is None else types[keep].int().numpy(),
        position_offset=architecture.position_offset,
        uncounted_id=architecture.uncounted_id,
    )
    ops.reset_launches()
    with torch.inference_mode():
        hidden = encoder(packed)
    layers, launches = encoder.architecture.num_layers, Counter[str]()
    required = dict(encoder.required_ops())
    for (op, implementation), times in ops.launches().items():
        kernel = encoder.bind(op).implementation if op in required else encoder.implementation
        assert implementation == kernel
        launches[op] += times
    assert launches["embed_norm"] == 1
    assert launches["varlen_attention"] == layers
    # The norm is part of the linear before it where that runs on panels.
    norms = launches["add_norm"], launches["linear_norm"], launches["add_norm_sum"]
    weights = encoder.admitted.weights
    first, pre_norm = weights.layers[0], weights.final_norm is not None
    exits = [e for x in weights.layers for e in (x.attention_exit, x.feed_forward_exit) if e]
    others = len(exits) + (weights.embeddings.projected_norm is not None)
    others += first.norm_first and first.attention_norm is not None
    assert sum(norms) == 2 * layers + others
    assert norms[2] == (2 * layers - (not exits) if pre_norm else 0)
    return list(hidden[: packed.num_tokens].float().split(lengths.tolist()))


def assert_packed_as_stock(made: Any, name: str, lengths: Sequence[int]) -> None:
    """As near to fp64 as stock is."""
    batch = make_batch(name, list(lengths))
    ours = packed_states(PackedEncoder(made), batch)
    peer, oracle = (reference_states(m, batch) for m in (made, copy.deepcopy(made).double()))
    assert_close_to_oracle(*map(torch.cat, (ours, oracle, peer)), torch.float32)


def texts_of(states: list[Tensor]) -> Tensor:
    """Mean-pooled, L2-normalised vectors `[B, E]`."""
    return nn.functional.normalize(torch.stack([s.mean(0) for s in states]), dim=1)


def assert_same(packed: list[Tensor], expected: list[Tensor]) -> None:
    """The fp32 budget, for every token and every text."""
    assert_same_vectors(torch.cat(packed), torch.cat(expected))
    assert_same_vectors(texts_of(packed), texts_of(expected))
