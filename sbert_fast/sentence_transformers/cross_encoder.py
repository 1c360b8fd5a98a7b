"""FastCrossEncoder: a CrossEncoder whose `predict` and `rank` run packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import CrossEncoder
from sentence_transformers.util.decorators import cross_encoder_predict_rank_args_decorator
from torch import Tensor

from sbert_fast import bypass
from sbert_fast.arguments import (
    DEFAULT_BATCH_SIZE,
    Chunk,
    check_positive,
    with_default_batch_size,
)
from sbert_fast.assembly import Unsupported
from sbert_fast.call import Call
from sbert_fast.finite import check_embeddings
from sbert_fast.inference import Pipeline
from sbert_fast.pending import Priority
from sbert_fast.pooling import ACTIVATIONS
from sbert_fast.sentence_transformers.packed_model import PackedModel, shared_arguments
from sbert_fast.sentence_transformers.stock import check_pairs, stock_words

# The bits of a score must depend on no other score. torch activates the values left over from whole
# vectors differently, so rows are padded to a multiple of the first number. It gives many values to
# several threads, so no more rows than the second number are activated at once.
_ROWS, _MANY_ROWS = 64, 1 << 14
_FUNCTIONS = (torch.sigmoid, torch.tanh)
# Until 6.2, sentence-transformers squeezed scores last, and took a false activation for none.
_IS_OLD = "_inference" not in vars(CrossEncoder)

# Arguments of a call that `_inference` takes too.
_NAMES = {"prompt", "batch_size", "show_progress_bar", "device"}


class FastCrossEncoder(PackedModel, CrossEncoder):
    """A `CrossEncoder` that scores pairs of texts faster, with the same results.

    It takes the same arguments, gives the same scores and works wherever a `CrossEncoder` is
    expected. Pairs run packed: each different text is tokenised once, pairs are cut into batches by
    tokens and never padded, the last layer computes what the head reads and no more. What the
    packed engine does not support runs in sentence-transformers, with one warning.

    Rerankers that generate run packed too: of the logits of the last token, only those that a
    `LogitScore` reads are computed. Where a chat template formats the pairs, sentence-transformers
    renders and tokenises each as a whole, the query with every passage: the ids of a text depend on
    what the template puts next to it.

    The trainers of sentence-transformers train it packed, see :meth:`forward`.

    Args:
        model_name_or_path: name or path of a model, or a loaded `CrossEncoder`, whose modules are
            shared, not copied.
        modules: modules to build the model from, as in `CrossEncoder`.
        device: where to run; default as in `CrossEncoder`.
        dtype: dtype to compute in; see :class:`FastEncoder`. Scores are float32.
        impl: implementation of the ops, see :mod:`sbert_fast.ops`.
        batch_tokens: most tokens of a batch; "auto" picks by model and device.
        low_memory: see :class:`FastEncoder`.
        **kwargs: further arguments of `CrossEncoder`.

    Raises:
        ValueError: `device`, `dtype`, `impl` or `batch_tokens` is invalid, or `max_seq_length` is
            beyond the position table or below the number of special tokens of a pair.
        InvalidWeightsError: weights hold NaN or infinity; the message names the tensor.

    Example:
        >>> reranker = FastCrossEncoder("cross-encoder/ms-marco-MiniLM-L6-v2")
        >>> reranker.rank("What is the capital of France?", ["Paris.", "It rains."])
    """

    method = "predict"
    mergeable = frozenset(
        {"prompt", "prompt_name", "apply_softmax", "convert_to_numpy", "convert_to_tensor"}
    )
    _kept = (*PackedModel._kept, "activation_fn")

    @staticmethod
    def _arguments_of(source: CrossEncoder) -> dict[str, Any]:
        own = {"activation_fn": source.activation_fn}
        # New in sentence-transformers 6.2.
        if kept := getattr(source, "keep_in_fp32_modules", None):
            own["keep_in_fp32_modules"] = kept
        return shared_arguments(source) | own

    @staticmethod
    def _input_of(words: int) -> Any:  # noqa: ANN401
        return "word " * (words // 2), "word " * (words - words // 2)

    @torch.inference_mode()
    @cross_encoder_predict_rank_args_decorator
    def predict(  # type: ignore[override]
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | list[str | torch.device] | None = None,
        pool: dict[Any, Any] | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Score pairs of texts; arguments and results are those of `CrossEncoder.predict`.

        Args:
            inputs: a pair of texts, or a list, tuple or numpy array of pairs. Other inputs that the
                model scores, such as single texts, run in sentence-transformers.
            prompt_name: name of a prompt in `self.prompts` to prepend to the first text of a pair.
            prompt: text to prepend; to a chat template, a message of the system.
            batch_size: limits memory, not rows; see :meth:`FastEncoder.encode`.
            show_progress_bar: default: shown if the logger of sentence-transformers is at INFO.
            activation_fn: applied to the logits `[N, labels]`; default: `self.activation_fn`.
            apply_softmax: apply softmax to the scores of several labels.
            convert_to_numpy: a numpy array instead of a list of tensors.
            convert_to_tensor: one tensor; overrides `convert_to_numpy`.
            device: where to run; a list runs one worker process on each device.
            pool: worker processes of :meth:`start_multi_process_pool`.
            chunk_size: pairs sent to a worker at once.
            **kwargs: further arguments of `CrossEncoder.predict`, which runs such a call.

        Returns:
            float32 `[N]`, or `[N, labels]` of several labels, in the order of `inputs`; one score,
            or `[labels]`, for a single pair; an empty array for no pair.

        Raises:
            InputError: an input is not one that the model scores; names its index.
            ValueError: an argument is invalid; names it.
            TokenIdError: the tokenizer gives an id for which the model has no embedding.
            NonFiniteEmbeddingError: a score is NaN or infinite; names the pairs.
            torch.OutOfMemoryError: a pair, or the smallest batch, does not fit; names it.
            DeviceLostError: the GPU failed, now or in an earlier call, and no longer serves this
                process.
        """
        is_single = self.is_singular_input(inputs)
        pairs = _listed(inputs, is_single)
        how: dict[str, Any] = {
            "prompt": self._resolve_prompt(prompt, prompt_name),
            "batch_size": batch_size,
            "show_progress_bar": show_progress_bar,
            "device": device,
            "pool": pool,
            "chunk_size": chunk_size,
        }
        call = self._checked(_call(**how, keywords=kwargs))
        found = self._ready(call, check_pairs(self, pairs))
        if isinstance(found, Unsupported):
            self._session.count(found)
        if isinstance(found, Unsupported) or call.in_workers:
            result = self._predict_elsewhere(
                pairs[0] if is_single else pairs,
                activation_fn=activation_fn,
                apply_softmax=apply_softmax,
                convert_to_numpy=convert_to_numpy,
                convert_to_tensor=convert_to_tensor,
                **how,
                **kwargs,
            )
            _check_finite(result, is_single, self.dtype)
            return result
        result = self._scores(found, pairs, call, activation_fn, apply_softmax)
        if not convert_to_tensor:
            result = result.float().cpu().numpy() if convert_to_numpy else list(result)
            result = np.array([]) if convert_to_numpy and not pairs else result
        return result[0] if is_single else result

    async def apredict(
        self,
        inputs: Any,
        *,
        priority: Priority = "query",
        deadline: float | None = None,
        **options: Any,
    ) -> Any:
        """:meth:`predict`, run by the queue of :meth:`submit` and awaited; see
        :meth:`FastEncoder.aencode`."""
        return await self._await(inputs, priority=priority, deadline=deadline, **options)

    def _key(self, options: dict[str, Any]) -> frozenset[tuple[str, Any]] | None:
        return super()._key(options) if _treats_rows(self.activation_fn) else None

    def _asked(
        self, inputs: Any, options: dict[str, Any]
    ) -> tuple[list[Any], bool, Pipeline | Unsupported, str | None]:
        is_single = self.is_singular_input(inputs)
        pairs = _listed(inputs, is_single)
        prompt = self._resolve_prompt(options.get("prompt"), options.get("prompt_name"))
        call = self._checked(
            _call(prompt=prompt, batch_size=DEFAULT_BATCH_SIZE, show_progress_bar=None)
        )
        found = self._ready(call, check_pairs(self, pairs))
        return pairs, is_single, Unsupported("workers") if call.in_workers else found, prompt

    rank = with_default_batch_size(CrossEncoder.rank)

    def _checked(self, call: Call) -> Call:
        """A call whose arguments are checked.

        Raises:
            ValueError: an argument is invalid; names it.
        """
        with stock_words(lambda: CrossEncoder.predict(self, [], batch_size=call.batch_size)):
            check_positive("batch_size", call.batch_size)
        distributed = getattr(self, "_distributed_inference", None) is not None
        elsewhere = call.pool is not None or isinstance(call.device, list)
        in_workers = elsewhere or (distributed and call.device is None)
        call = replace(call, in_workers=in_workers)
        call.check()
        return call

    def _predict_elsewhere(self, inputs: Any, **arguments: Any) -> Any:
        """`predict` of sentence-transformers, which runs worker processes and the models that the
        engine does not."""
        is_list = isinstance(inputs, list) and not isinstance(inputs, Chunk)
        if is_list and not self.is_singular_input(inputs):
            inputs = Chunk(inputs)
        return super().predict(inputs, **arguments)

    @torch.inference_mode()
    def _inference(self, inputs: list[Any], **arguments: Any) -> Any:
        """Score checked pairs in this process; workers of sentence-transformers start here."""
        own = dict(arguments)
        form = own.pop("activation_fn"), own.pop("apply_softmax")
        call = _call(**{name: own.pop(name) for name in _NAMES & own.keys()}, keywords=own)
        found = self._ready(call, check_pairs(self, inputs))
        if isinstance(found, Unsupported):
            return super()._inference(inputs, **arguments)
        return self._scores(found, inputs, call, *form)

    def _ready(self, call: Call, reason: str | None) -> Pipeline | Unsupported:
        """What runs a call; `reason` says why its inputs do not run packed, if they do not."""
        found = self._session.ready(self, None, call.moves_to)
        if isinstance(found, Pipeline):
            reason = self._own_method() or reason
            if call.keywords:
                reason = f"argument {next(iter(call.keywords))!r}"
            found = found if reason is None else Unsupported(reason)
        return found

    def _scores(
        self,
        pipeline: Pipeline,
        pairs: list[Any],
        call: Call,
        activation_fn: Callable[[Tensor], Tensor] | None,
        apply_softmax: bool | None,
    ) -> Tensor:
        """The scores fp32 `[N]` or `[N, labels]` of checked pairs, on the device of the model."""
        scores: Tensor = self._session.run(self, pipeline, pairs, call)
        if not len(scores):
            return torch.tensor([], device=scores.device)
        activate: Any = activation_fn
        if activate is None or (_IS_OLD and not activate):
            activate = self.activation_fn
        if activate is not None:
            try:
                scores = self._activated(scores, pairs, call.batch_size, activate)
            except Exception as error:
                error.add_note(f"activation_fn was given logits of shape {list(scores.shape)}")
                raise
        if not _IS_OLD:
            scores = self._squeezed(scores)
        if apply_softmax and scores.ndim > 1:
            scores = scores.softmax(dim=1)
        return self._squeezed(scores)

    def _squeezed(self, scores: Tensor) -> Tensor:
        return scores.squeeze(-1) if self.num_labels == 1 and scores.ndim > 1 else scores

    def _activated(
        self, scores: Tensor, pairs: list[Any], batch_size: int, activate: Any
    ) -> Tensor:
        """The activated scores; what may look across rows gets the batches that it gets in
        sentence-transformers."""
        if _treats_rows(activate):
            padded = F.pad(scores, (0, 0, 0, -len(pairs) % _ROWS))
            return torch.cat([activate(rows) for rows in padded.split(_MANY_ROWS)])[: len(pairs)]
        order = np.argsort([-self._input_length(pair) for pair in pairs])
        batches = torch.from_numpy(order).to(scores.device).split(batch_size)
        parts = [part for batch in batches for part in activate(scores[batch])]
        if len(parts) != len(pairs):
            raise ValueError(f"activation_fn must give a row a pair, got {len(parts)} rows")
        return torch.stack([parts[index] for index in np.argsort(order)])


def _treats_rows(activate: Any) -> bool:
    """Whether an activation is known to look at each value or row alone."""
    return activate in _FUNCTIONS or (
        type(activate) in ACTIVATIONS and not bypass.reason([activate])
    )


def _call(**arguments: Any) -> Call:
    """A call for one row of logits a pair, as a tensor on the device of the model."""
    return Call(
        output_value="sentence_embedding",
        normalize_embeddings=False,
        truncate_dim=None,
        convert_to_tensor=True,
        **arguments,
    )


def _listed(inputs: Any, is_single: bool) -> list[Any]:
    """The inputs of a call, one after the other."""
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist()
    if is_single:
        return [inputs]
    return inputs if isinstance(inputs, list) else list(inputs)


def _check_finite(scores: Any, is_single: bool, dtype: torch.dtype) -> None:
    """Refuse scores that sentence-transformers has computed in `dtype` and that are not finite."""
    if not isinstance(scores, list):
        rows = torch.as_tensor(scores)
        scores = rows[None] if is_single else list(rows)
    check_embeddings(list(scores), dtype)
