"""DeBERTa-v2 and v3: laid out like BERT, with disentangled attention.

Source: `transformers.models.deberta_v2`; He et al., arXiv:2006.03654 and arXiv:2111.09543.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.models.activations import activation
from sbert_fast.models.base import (
    Attention,
    Disentangled,
    Embeddings,
    EncoderWeights,
    FeedForward,
    Layer,
    linear,
    norm,
)
from sbert_fast.ops.reference import Activation

# Tokens this far apart must share a row with those further apart.
_MAX_REACH = 1 << 17


def weights(model: Any) -> EncoderWeights:
    config, encoder = model.config, model.encoder
    if encoder.conv is not None:
        raise UnsupportedModelError(
            f"config.conv_kernel_size must be 0, got {config.conv_kernel_size!r}: a convolution "
            "mixes neighbouring tokens"
        )
    if model.z_steps > 1:
        raise UnsupportedModelError(f"z_steps must be 0 or 1, got {model.z_steps!r}")
    functions = [layer.intermediate.intermediate_act_fn for layer in encoder.layer]
    function = activation(config.hidden_act, functions)
    buckets = _buckets(encoder) if encoder.relative_attention else ()
    layers = (_layer(layer, encoder, buckets, function) for layer in encoder.layer)
    return EncoderWeights(_embeddings(model.embeddings), tuple(layers))


def _embeddings(module: Any) -> Embeddings:
    positions, types = module.position_embeddings, module.token_type_embeddings
    projection, last = module.embed_proj, norm(module.LayerNorm)
    return Embeddings(
        module.word_embeddings.weight,
        None if positions is None else positions.weight,
        None if types is None else types.weight,
        last if projection is None else None,
        None if projection is None else linear(projection),
        projected_norm=None if projection is None else last,
        masked=True,
    )


def _layer(module: Any, encoder: Any, buckets: Sequence[int], function: Activation) -> Layer:
    attention, output = module.attention, module.output
    part = attention.self
    heads, dim = part.num_attention_heads, part.attention_head_size
    terms = [kind in part.pos_att_type for kind in ("c2p", "p2c")]
    return Layer(
        attention=Attention(
            qkv=(linear(part.query_proj), linear(part.key_proj), linear(part.value_proj)),
            output=linear(attention.output.dense),
            heads=heads,
            kv_heads=heads,
            head_dim=dim,
            # The terms count where distances add none, too.
            scale=(dim * (1 + sum(terms))) ** -0.5,
            disentangled=_disentangled(part, encoder, buckets) if buckets else None,
        ),
        attention_norm=norm(attention.output.LayerNorm),
        feed_forward=FeedForward(
            (linear(module.intermediate.dense),), linear(output.dense), function
        ),
        feed_forward_norm=norm(output.LayerNorm),
    )


def _disentangled(module: Any, encoder: Any, buckets: Sequence[int]) -> Disentangled:
    shared, kinds = module.share_att_key, module.pos_att_type
    keys = queries = None
    if "c2p" in kinds:
        keys = linear(module.key_proj if shared else module.pos_key_proj)
    if "p2c" in kinds:
        queries = linear(module.query_proj if shared else module.pos_query_proj)
    if keys is None and queries is None:
        raise UnsupportedModelError(
            f"config.pos_att_type must name c2p or p2c with relative_attention, got {kinds!r}"
        )
    normed = "layer_norm" in encoder.norm_rel_ebd
    return Disentangled(
        table=encoder.rel_embeddings.weight,
        norm=norm(encoder.LayerNorm) if normed else None,
        keys=keys,
        queries=queries,
        buckets=tuple(buckets),
    )


def _buckets(encoder: Any) -> tuple[int, ...]:
    """Rows of the table of distances, for keys from furthest behind to furthest ahead.

    Both terms of the model lead from a query and a key to the same row.
    """
    # Imported with the model, and not before: sentence-transformers alone may not need it.
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    count, most = encoder.position_buckets, encoder.max_relative_positions
    span = reach = count if count > 0 else most
    # Where the model computes them: logarithms may differ.
    weight = encoder.rel_embeddings.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    while reach <= _MAX_REACH:
        behind = torch.arange(reach, -reach - 1, -1, device=device)
        if count > 0:
            behind = make_log_bucket_position(behind, count, most).long()
        rows: list[int] = (behind + span).clamp(0, 2 * span - 1).tolist()
        if (rows[0], rows[-1]) == (2 * span - 1, 0):
            return _without_repeated_ends(rows)
        reach *= 2
    raise UnsupportedModelError(
        "config.position_buckets and max_relative_positions must lead distances to the last "
        f"bucket, got {count!r} and {most!r}"
    )


def _without_repeated_ends(rows: list[int]) -> tuple[int, ...]:
    """Rows by distance, without distances whose rows are those of the next ones in between."""
    ends, most = 0, len(rows) // 2
    while ends < most and rows[ends + 1] == rows[0] and rows[-ends - 2] == rows[-1]:
        ends += 1
    return tuple(rows[ends : len(rows) - ends])
