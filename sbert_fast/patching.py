"""accelerate and restore: packed inference inside models that are already loaded.

`accelerate` puts a :class:`PackedForward` in place of `forward` on each supported base model inside
a module, on that instance only. Inputs and outputs stay padded: tokens are packed once before the
first layer and unpacked once after the last. Poolers and heads run as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from sbert_fast import bypass, models
from sbert_fast.arguments import parse_dtype
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.models.adapted import skeleton
from sbert_fast.models.checks import check_finite
from sbert_fast.packed_forward import PackedForward, StandIn
from sbert_fast.sparse_forward import SparseForward, has_masked_lm_head


def forward_of(module: nn.Module) -> PackedForward | None:
    """The :class:`PackedForward` of a base model, or None where it is not accelerated."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, PackedForward) else None


def _stand_in_of(module: nn.Module) -> StandIn | None:
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, StandIn) else None


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The base models inside `model` by name: transformers' models that hold no further one."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    }
    return {
        name: module
        for name, module in found.items()
        if not any(
            part is not module and isinstance(part, PreTrainedModel) for part in module.modules()
        )
    }


def refusal(module: nn.Module) -> str | None:
    """Why a base model cannot be accelerated; None where it can."""
    return _replacement(module) or models.refusal(skeleton(module))


def _replacement(module: nn.Module) -> str | None:
    """What stands in the place of a module's forward and is neither its own nor ours; or None."""
    if not bypass.is_replaced(module, "forward"):
        return None
    forward = module.__dict__["forward"]
    return f"{type(module).__name__}.forward was replaced on this instance by {forward!r}"


def accelerate(
    model: nn.Module,
    *,
    dtype: str | torch.dtype | None = None,
    impl: str = "auto",
    padding: Literal["auto", "zeros", "stock"] = "auto",
) -> nn.Module:
    """Make every supported base model inside `model` run packed, in place and reversibly.

    Results stay what they were, but for two things: sums round in another order, and the hidden
    states of masked tokens are zeros. Code that reads those states gets another result: a plain
    mean over all columns, a convolution or an LSTM over the states, a loss whose labels on masked
    tokens are not -100. Pass `padding="stock"` for such code. Some of it is recognised, and its
    padded calls run the original forward: modules in a SentenceTransformer other than its
    token-wise and pooling ones, heads of question answering (the answer is the best of all
    columns), summaries of ELECTRA other than of the first token, and heads that read a last token
    that is masked. All other heads run packed.

    `state_dict`, parameters and saving are untouched. Weights that change are noticed, and a copy
    of the model uses its own. The original forward also runs for what the packed path does not do;
    :func:`counts` tells how often, and why: attention weights, the cache of a decoder (unless
    `config.use_cache` is False), masks that are not `[B, S]`, dropout where no gradients are
    recorded, gradients of families whose ops have none, hooks inside the model, and masks that drop
    the first token if a pooler or a module around the model might read its state. Tracing and
    compiling run the original forward uncounted.

    Trainers of sentence-transformers and transformers, and loops of one's own, train it as they
    train the original, packed wherever gradients are recorded and the list above has nothing.

    Call it again after a write through `.data` or numpy to less than a row of a matrix: weights are
    then read anew. A forward checks weights, when it reads them, and not its results: where weights
    have come to hold NaN or infinity it raises `InvalidWeightsError`, but hidden states that
    overflow are returned as the model computes them.

    Args:
        model: a loaded model of transformers or sentence-transformers, or any module that holds
            some. Already accelerated, it takes on `dtype`, `impl` and `padding` of this call.
        dtype: dtype to compute in: "float32", "bfloat16", "float16", "int8" (as in `FastEncoder`),
            or the torch dtype. None and "auto" are the dtype of the model. Outputs have the dtype
            of the model either way.
        impl: implementation of the ops, see :mod:`sbert_fast.ops`.
        padding: what runs where tokens are masked. "auto": zeros are their states, and the original
            forward runs where something is known to read them. "zeros": heads of question answering
            run packed too; it is for callers who look for answers among real tokens alone, because
            the logits of masked ones are those of zeros. "stock": the original forward.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: `dtype`, `impl` or `padding` is none of the above.
        UnsupportedModelError: nothing inside `model` is supported; the message says why not.
        InvalidWeightsError: weights hold NaN or infinity; the message names the tensor.
        ImplementationError: `impl` cannot run here.
    """
    _check_module("accelerate", model)
    requested_dtype = None if dtype is None else parse_dtype(dtype)
    if padding not in ("auto", "zeros", "stock"):
        raise ValueError(f"padding must be 'auto', 'zeros' or 'stock', got {padding!r}")
    found = candidates(model)
    reasons = {name: refusal(module) for name, module in found.items()}
    if all(reasons.values()):
        why = (
            "; ".join(dict.fromkeys(filter(None, reasons.values())))
            or "it contains no transformers model"
        )
        raise UnsupportedModelError(f"{type(model).__name__} cannot be accelerated: {why}")
    engines = [
        PackedEncoder(module, dtype=requested_dtype, impl=impl, adapted=True)
        for name, module in found.items()
        if reasons[name] is None
    ]
    for engine in engines:
        check_finite(engine.model)
    for engine in engines:
        current = forward_of(engine.model)
        if current is None:
            engine.model.__dict__["forward"] = PackedForward(engine, padding)
        else:
            current.use(engine, padding)
    for module in model.modules():
        if has_masked_lm_head(module) and not bypass.is_replaced(module, "forward"):
            module.__dict__["forward"] = _stand_in_of(module) or SparseForward(module)
    return model


@contextmanager
def accelerated(
    model: nn.Module,
    known: dict[str, PackedForward],
    impl: str,
    count: Callable[[str], None],
    *,
    all_of_them: bool = False,
) -> Iterator[bool]:
    """While a block runs, accelerate base models that are trained: those in training mode, and all
    where gradients are recorded. What is accelerated anyway stays so.

    Args:
        model: holds the base models.
        known: their stand-ins in earlier blocks, by name; those of new base models are added.
        impl: implementation of the ops.
        count: called with how each call ran, as :func:`counts` names it, and with the reason why
            nothing, or not a base model, is accelerated.
        all_of_them: accelerate base models that are not trained, too.

    Yields:
        Whether every base model is accelerated now, and there is one.

    Raises:
        InvalidWeightsError: as :func:`accelerate`.
    """
    own: list[tuple[nn.Module, object]] = []
    found = candidates(model)
    if not found and torch.is_grad_enabled():
        count("the model contains no model of transformers")
    try:
        for name, base in found.items():
            forward = base.__dict__.get("forward")
            is_trained = base.training or torch.is_grad_enabled()
            if not (is_trained or all_of_them) or isinstance(forward, StandIn):
                continue
            try:
                stand_in = _known(base, known.get(name), impl)
            except UnsupportedModelError as error:
                count(str(error))
                continue
            stand_in.observer, known[name] = count, stand_in
            own.append((base, forward))
            base.__dict__["forward"] = stand_in
        yield bool(found) and all(map(_stand_in_of, found.values()))
    finally:
        for base, forward in own:
            if forward is None:
                base.__dict__.pop("forward", None)
            else:
                base.__dict__["forward"] = forward


def _known(base: nn.Module, known: PackedForward | None, impl: str) -> PackedForward:
    """What stands in for the forward of `base`: `known`, where it is of the same model.

    Raises:
        UnsupportedModelError, InvalidWeightsError: as :func:`accelerate`.
    """
    if known is None or known.model is not base:
        accelerate(base, impl=impl)
        known = base.__dict__["forward"]
        restore(base)
    elif (reason := _replacement(base)) is not None:
        raise UnsupportedModelError(reason)
    return known


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: every base model inside `model` has its own forward again.

    Args:
        model: any module; one that was not accelerated is left alone.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    _check_module("restore", model)
    for module in model.modules():
        forward = _stand_in_of(module)
        if forward is None:
            continue
        if forward.shadowed:
            module.__dict__["forward"] = forward.original
        else:
            del module.__dict__["forward"]
    return model


def counts(model: nn.Module) -> dict[str, int]:
    """How the calls of the accelerated base models inside `model` ran.

    Args:
        model: any module.

    Returns:
        Calls that ran packed under "packed", and calls of the original forward by reason.
    """
    _check_module("counts", model)
    total: Counter[str] = Counter()
    for module in model.modules():
        forward = _stand_in_of(module)
        if forward is not None:
            total.update(forward.counts)
    return dict(total)


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
