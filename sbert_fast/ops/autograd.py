"""Gradients of the ops: the formulas that autograd runs, of every implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from sbert_fast.ops.reference import NORMALIZE_EPS, POOLING_MODES, _accumulator

# Options that the gradient of attention does not have, with their places in the schema.
_UNCOVERED = {"position_keys": 14, "position_queries": 15}


def refusal(op: str, how: Mapping[str, Any]) -> str | None:
    """Why an op, asked of as :func:`sbert_fast.ops.bind` takes it, has no gradients; None where it
    has."""
    if op not in _FORMULAS:
        return f"{op} has no backward yet"
    given = {name for name, value in how.get("options", {}).items() if value}
    uncovered = (given | set(how.get("needs", ()))) & _UNCOVERED.keys()
    return f"{op} has no backward with {min(uncovered)} yet" if uncovered else None


def save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ANN401
    """Keep the arguments of an op for its formula."""
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs))
    ctx.arguments = [None if isinstance(a, Tensor) else a for a in inputs]


def refuse(op: str, what: str = "") -> NoReturn:
    raise NotImplementedError(
        f"sbert_fast.{op} has no backward{what} yet: run it under torch.inference_mode(), or train "
        "with the original model (sbert_fast.restore(model))"
    )


Overload = Callable[[str], Any]  # of an op, in the implementation that computes its gradient


def _varlen_attention(
    overload: Overload, arguments: list[Any], wanted: Sequence[bool], grad: Tensor
) -> tuple[Any, ...]:
    for name, place in _UNCOVERED.items():
        if isinstance(arguments[place], Tensor) or arguments[place]:
            refuse("varlen_attention", f" with {name}")
    if any(wanted[6:8]):
        refuse("varlen_attention", " to rotary")
    *which, cos, sin, _, causal, kv_heads, query_norm, key_norm, eps = arguments[:14]
    how = causal, cos, sin, kv_heads, query_norm, key_norm, eps
    backward = overload("varlen_attention_backward")
    d_qkv, d_bias, d_norms = backward(grad.contiguous(), *which, *how, *arguments[17:])
    norms = (None, None) if query_norm is None else d_norms
    d_bias = None if arguments[4] is None else d_bias
    return d_qkv, None, None, None, d_bias, *[None] * 6, *norms, *[None] * 6


def _add_norm(
    overload: Overload,
    arguments: list[Any],
    wanted: Sequence[bool],
    grad: Tensor,
    grad_sum: Tensor | None = None,
) -> tuple[Any, ...]:
    """Of add_norm, and of add_norm_sum, whose sum has a gradient of its own."""
    x, bias, residual, weight, _, eps, rms = arguments
    backward = overload("add_norm_backward")
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    d_x, sums = backward(grad.contiguous(), x, bias, residual, weight, eps, rms, grad_sum)
    d_bias = None if bias is None else sums[2]
    return d_x, d_bias, None if residual is None else d_x, sums[0], sums[1], None, None


def _embed_norm(
    overload: Overload, arguments: list[Any], wanted: Sequence[bool], grad: Tensor
) -> tuple[Any, ...]:
    ids, positions, types, word, position_table, type_table, weight, *rest = arguments
    _, eps, _, rms = rest
    places = (ids, word), (positions, position_table), (types, type_table)
    total, d_norm = grad.to(_accumulator(word.dtype)).contiguous(), (None, None)
    if weight is not None:
        embedded = torch.zeros_like(total)
        for rows, table in places:
            if table is not None:
                embedded += table[0] if rows is None else F.embedding(rows, table)
        backward = overload("add_norm_backward")
        total, sums = backward(total, embedded, None, None, weight, eps, rms)
        d_norm = sums[0], sums[1]
    d_tables = [
        _of_table(total, rows, table) if has_gradient else None
        for (rows, table), has_gradient in zip(places, wanted[3:6], strict=True)
    ]
    return None, None, None, *d_tables, *d_norm, None, None, None


def _of_table(total: Tensor, rows: Tensor | None, table: Tensor) -> Tensor:
    """The gradient of a table whose rows were added: each sums its tokens in their order."""
    if rows is None:
        d_table = total.new_zeros(table.shape)
        d_table[0] = total.sum(0)
    else:
        d_table = torch.ops.aten.embedding_dense_backward(total, rows, table.shape[0], -1, False)
    return d_table.to(table.dtype)


def _bias_gelu(
    overload: Overload, arguments: list[Any], wanted: Sequence[bool], grad: Tensor
) -> tuple[Any, ...]:
    d_x, d_bias = _activation(overload("bias_gelu_backward"), arguments, grad)
    return d_x, d_bias, None


def _gated_activation(
    overload: Overload, arguments: list[Any], wanted: Sequence[bool], grad: Tensor
) -> tuple[Any, ...]:
    d_x, d_bias = _activation(overload("gated_activation_backward"), arguments, grad)
    return d_x, d_bias, None, None


def _activation(backward: Any, arguments: list[Any], grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and bias, the first two arguments."""
    x, bias, *_ = arguments
    d_x = backward(grad.contiguous(), *arguments)
    return d_x, None if bias is None else d_x.sum(0, dtype=_accumulator(x.dtype))


def _segment_pool(
    overload: Overload, arguments: list[Any], wanted: Sequence[bool], grad: Tensor
) -> tuple[Any, ...]:
    x, cu_seqlens, pooling, normalize, skip, spans = arguments
    count = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    if count == 0:
        return torch.zeros_like(x), None, None, None, None, None
    mode = POOLING_MODES[pooling]
    if normalize or mode == "max":
        pooled = overload("segment_pool")(x, cu_seqlens, pooling, False, skip, spans)
    if normalize:
        norm = pooled.norm(dim=1, keepdim=True)
        unit = pooled / norm
        along = grad - unit * (grad * unit).sum(1, keepdim=True)
        grad = torch.where(norm > NORMALIZE_EPS, along / norm, grad / NORMALIZE_EPS)
    if spans is None:
        row, token, inside = _of_sequences(x, cu_seqlens)
        starts, lengths = cu_seqlens.long()[:-1], cu_seqlens.long().diff()
    else:
        starts, lengths = spans.long()[:, 0], spans.long().diff(dim=1)[:, 0]
        row, token, inside = _of_spans(starts, lengths)
    position = token - starts[row]
    share = _share(mode, position, lengths[row], skip, grad.dtype).masked_fill(~inside, 0)[:, None]
    taken = share != 0
    if mode == "max":
        taken = taken & (x[token] == pooled[row])
        place = torch.where(taken, token[:, None], x.shape[0])
        first = place.new_full(pooled.shape, x.shape[0])
        first = first.scatter_reduce(0, row[:, None].expand_as(place), place, "amin")
        taken = place == first[row]
    d_x = torch.where(taken, grad[row] * share, 0)
    if spans is not None:
        # Spans may overlap: the rows of a token add up in the order of spans.
        d_x = torch.ops.aten.embedding_dense_backward(d_x, token, x.shape[0], -1, False)
    return d_x.to(x.dtype), None, None, None, None, None


def _of_sequences(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence of each token, the tokens, and whether they lie in one."""
    ends, token = cu_seqlens[1:].long(), torch.arange(x.shape[0], device=x.device)
    row = torch.searchsorted(ends, token, right=True)
    inside = row < ends.shape[0]
    return torch.where(inside, row, 0), token, inside


def _of_spans(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the tokens of all spans, one span after the other."""
    row = torch.arange(len(starts), device=starts.device).repeat_interleave(lengths)
    offset = starts + lengths - lengths.cumsum(0)
    token = torch.arange(len(row), device=row.device) + offset[row]
    return row, token, torch.ones_like(row, dtype=torch.bool)


def _share(mode: str, position: Tensor, length: Tensor, skip: int, dtype: torch.dtype) -> Tensor:
    """The factor with which the token at each `position` enters the vector of its sequence; for
    the maximum, 1 for those that it is taken of."""
    if mode == "cls":
        return (position == torch.where(length > skip, skip, 0)).to(dtype)
    kept = (position >= skip).to(dtype)
    if mode == "last_token":
        return kept * (position == length - 1)
    if mode == "weighted_mean":
        weights = (length * (length + 1) - skip * (skip + 1)).clamp(min=1)
        return kept * (position + 1) * 2 / weights
    count = (length - skip).clamp(min=1).to(dtype)
    if mode == "mean_sqrt_len":
        count = count.sqrt()
    return kept if mode == "max" else kept / count


def _schema(op: str, implementation: str) -> list[Any]:
    overload = getattr(getattr(torch.ops.sbert_fast, op), implementation)
    return list(overload._schema.arguments)


_FORMULAS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "varlen_attention": _varlen_attention,
    "embed_norm": _embed_norm,
    "add_norm": _add_norm,
    "add_norm_sum": _add_norm,
    "bias_gelu": _bias_gelu,
    "gated_activation": _gated_activation,
    "segment_pool": _segment_pool,
}


def formula(op: str, implementation: str, overload: Overload) -> Callable[..., Any]:
    """What autograd calls for the gradients of `op` in an implementation; a refusal where there is
    no formula."""
    if op not in _FORMULAS:

        def refused(ctx: Any, *grads: Any) -> NoReturn:  # noqa: ANN401
            refuse(op)

        return refused

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        # Once: checkpoints give each saved tensor a single time.
        tensors = ctx.saved_tensors
        pairs = zip(ctx.arguments, tensors, strict=True)
        given = [argument if tensor is None else tensor for argument, tensor in pairs]
        # Formulas know all arguments; an implementation leaves out those of options that it lacks.
        own, whole = (_schema(op, name) for name in (implementation, "reference"))
        values = dict(zip((each.name for each in own), given, strict=True))
        # It ends where the caller left the rest to defaults.
        wanted = dict(zip(values, ctx.needs_input_grad, strict=False))
        arguments = [values.get(each.name, each.default_value) for each in whole]
        needs = [wanted.get(each.name, False) for each in whole]
        gradients = _FORMULAS[op](overload, arguments, needs, *grads)
        found = {each.name: g for each, g in zip(whole, gradients, strict=True)}
        kept = zip((found[name] for name in values), tensors, strict=True)
        return tuple(g if g is None else g.to(x.dtype) for g, x in kept)

    return backward
