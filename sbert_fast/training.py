"""Packed passes whose gradients are recorded: the model's own linear layers and tables, live."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sbert_fast import bypass, ops
from sbert_fast.engine import PackedEncoder
from sbert_fast.models.base import Embeddings, EncoderWeights, is_in_pooler
from sbert_fast.norms import PreparedNorm
from sbert_fast.originals import is_genuine
from sbert_fast.packing import PackedBatch
from sbert_fast.preparation import prepare_projection, prepare_stack, required_ops
from sbert_fast.target import Target

_IMPLEMENTATIONS = ("cpu", "reference")
_NOT_RECORDED = "reentrant checkpoints of embeddings that record none leave out the layers"


def refusal(engine: PackedEncoder) -> str | None:
    """Why a pass of `engine` whose gradients are recorded does not run packed; None where it does.

    The model is admitted: what every packed pass refuses has been looked at.
    """
    weights, model = engine.admitted.weights, engine.model
    if engine.device.type != "cpu" or engine.implementation not in _IMPLEMENTATIONS:
        return f"not by {engine.implementation} on {engine.device.type}"
    dtype = next(model.parameters()).dtype
    if engine.compute_dtype != dtype or engine.requested_dtype == torch.int8:
        return f"not in another dtype than that of the weights, {dtype}"
    if torch.is_autocast_enabled("cpu") and (reason := _autocast_refusal(engine)) is not None:
        return f"torch.autocast {reason}"
    for op, how in required_ops(weights):
        if (reason := ops.gradient_refusal(op, how)) is not None:
            return reason
    rates = (part.rate for layer in weights.layers if (part := layer.attention.dropout) is not None)
    if not all(isinstance(rate, (int, float)) and 0 <= rate < 1 for rate in rates):
        return "dropout leaves no attention weights"
    if engine.admitted.drops and bypass.is_computed_again():
        return "a backward pass computes anew what dropout has changed"
    if any(part.module is None for part in weights.linears()):
        return "a linear layer is no module"
    tables = _tables(model, weights.embeddings)
    if not tables or weights.embeddings.masked:
        return "the embeddings are not the sum of modules"
    modules = [m for name, m in model.named_modules() if name and not is_in_pooler(name)]
    if (reason := bypass.gradient_reason(modules)) is not None:
        return reason
    if any(bypass.records_gradients(module) for module in modules if module not in tables):
        return "a hook makes states record them"
    return _checkpoint_refusal(engine)


def refusal_of_call(engine: PackedEncoder, given: Tensor | None, between: bool) -> str | None:
    """Why a call of an `engine` that is not refused does not run packed; None where it does.

    Args:
        engine: the packed forward pass.
        given: embeddings that stand for those of words, and record no gradients; or None.
        between: whether states between the layers are asked for.
    """
    if between:
        # They would be copies beside the graph: no gradient would reach them.
        return "not of states between the layers"
    if given is not None and _is_reentrant(engine.model):
        return _NOT_RECORDED
    return None


def _checkpointed(model: nn.Module) -> dict[int, Any]:
    """The numbers of the layers under gradient checkpointing, and what runs each in the original.

    The packed pass checkpoints them itself: it has other layers to run.
    """
    # Imported with the model, and not before: sentence-transformers alone may not need it.
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return {
        number: getattr(layer, "_gradient_checkpointing_func", None)
        for number, layer in enumerate(layers)
        if layer.gradient_checkpointing and layer.training
    }


def _is_reentrant(model: nn.Module) -> bool:
    return any(each.keywords["use_reentrant"] for each in _checkpointed(model).values())


def _checkpoint_refusal(engine: PackedEncoder) -> str | None:
    for each in _checkpointed(engine.model).values():
        is_plain = isinstance(each, partial) and each.func is checkpoint and is_genuine(checkpoint)
        if not is_plain or each.args or each.keywords.keys() != {"use_reentrant"}:
            return "gradient checkpointing is more than torch's"
    tables = _tables(engine.model, engine.admitted.weights.embeddings)
    recorded = any(t.requires_grad for table in tables for t in table.parameters())
    if not (recorded or engine.admitted.records) and _is_reentrant(engine.model):
        return _NOT_RECORDED
    return None


def _autocast_refusal(engine: PackedEncoder) -> str | None:
    dtype = torch.get_autocast_dtype("cpu")
    if dtype != torch.bfloat16:
        return f"in {dtype}"
    return None if engine.implementation == "cpu" else "reaches the products of the reference"


def _tables(model: nn.Module, embeddings: Embeddings) -> list[nn.Module]:
    """The modules of word, position and type embeddings, those there are; none where one lacks.

    Where there is a scale, the module of words multiplies by it.
    """
    kinds = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    scaled = embeddings.scale is not None
    found = {id(m.weight): m for m in kinds if scaled or type(m) is nn.Embedding}
    tables = embeddings.word, embeddings.position, embeddings.token_type
    modules = [found.get(id(table)) for table in tables if table is not None]
    return [] if None in modules else [m for m in modules if m is not None]


def states(engine: PackedEncoder, batch: PackedBatch, given: Tensor | None) -> Iterator[Tensor]:
    """The states `[T, E]` before and after every layer, as :meth:`PackedEncoder.states` has them.

    Args:
        engine: one that is not refused.
        batch: on the device of its model.
        given: embeddings `[rows, E]` that stand for those of words, by the ids of `batch`; or None.
    """
    weights = engine.admitted.weights
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    target = Target(engine.compute_dtype, engine.device, engine.impl, live=True, autocast=autocast)
    target = replace(target, drops=True)
    # In a dead tail, a token that no text holds would pass on weights that are not finite.
    count = batch.num_tokens or None
    types = batch.token_type_ids
    batch = replace(
        batch,
        input_ids=batch.input_ids[:count],
        position_ids=batch.position_ids[:count],
        token_type_ids=None if types is None else types[:count],
    )
    x = _embed(engine, weights, batch, given, target)
    # Under autocast a projection of the embeddings narrows them; the sums of layers do not.
    stack = prepare_stack(weights, replace(target, dtype=x.dtype))
    checkpointed = frozenset(_checkpointed(engine.model))
    yield from replace(stack, checkpointed=checkpointed).states(x, batch)


def _embed(
    engine: PackedEncoder,
    weights: EncoderWeights,
    batch: PackedBatch,
    given: Tensor | None,
    target: Target,
) -> Tensor:
    embeddings, types = weights.embeddings, batch.token_type_ids
    tables = iter(_tables(engine.model, embeddings))
    word = next(tables)
    x = word(batch.input_ids) if given is None else given[batch.input_ids]
    if embeddings.position is not None:
        x = x + next(tables)(batch.position_ids)
    if embeddings.token_type is not None:
        x = x + next(tables)(torch.zeros_like(batch.input_ids) if types is None else types)
    if embeddings.norm is not None:
        norm = PreparedNorm.of(embeddings.norm)
        kernel = target.bind("add_norm", width=x.shape[1], options={"rms": norm.rms})
        x = kernel(x, None, None, norm.weight, norm.bias, norm.eps)
    if embeddings.dropout is not None:
        x = embeddings.dropout(x)
    projection = prepare_projection(embeddings, target)
    return x if projection is None else projection(x)
