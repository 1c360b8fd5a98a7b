"""Calls that wait their turn: `submit` of FastEncoder and FastCrossEncoder, and what awaits it."""

from __future__ import annotations

import asyncio
import weakref
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbert_fast.assembly import Unsupported
from sbert_fast.forking import Lock
from sbert_fast.inference import Pipeline, Ready, size_of, tokens_of
from sbert_fast.pending import Pending, Priority, Work, check_turn
from sbert_fast.queueing import BatchQueue
from sbert_fast.session import Session

# Characters beyond which an event loop does not wait for a call to be tokenised.
_MANY_CHARACTERS = 20_000
# What sizes are guessed by where the packed engine does not run a call.
_CHARACTERS_PER_TOKEN = 4
_making = Lock()


class _Runner:
    """Runs what waits for a model; calls in the queue keep that alive, this does not."""

    def __init__(self, model: QueuedModel) -> None:
        self._model = weakref.ref(model)

    def join(self, parts: list[Any]) -> Any:
        return Ready.join(parts)

    def run(self, inputs: Any, options: dict[str, Any]) -> Any:
        model: Any = self._model()
        return getattr(model, model.method)(inputs, **options)

    def finish(self, work: Work, parts: list[Any]) -> Any:
        if isinstance(parts[0], np.ndarray):
            result: Any = np.concatenate(parts)
        elif isinstance(parts[0], Tensor):
            result = torch.cat(parts)
        else:
            result = [row for part in parts for row in part]
        return result[0] if work.is_single else result


class QueuedModel:
    """A model with a queue: a base of :class:`PackedModel`.

    Attributes:
        method: the name of the method that runs what is submitted.
        mergeable: arguments of it under which equal calls may share a batch.
    """

    method: str
    mergeable: frozenset[str]
    _session: Session

    @property
    def queue(self) -> BatchQueue:
        """Where calls of :meth:`submit` wait; copies of the model have queues of their own."""
        session = self._session
        if session.queue is None:
            with _making:
                if session.queue is None:
                    session.queue = BatchQueue(_Runner(self))
        return session.queue

    def submit(
        self,
        inputs: Any,
        *,
        priority: Priority = "query",
        deadline: float | None = None,
        **options: Any,
    ) -> Pending:
        """Have a thread of this model's queue run a call, merged with others into packed batches.

        Results are those of `encode` (`predict`), bit for bit. Texts are tokenised here, by the
        tokenizer as it is now. Calls that `encode` hands to sentence-transformers, and those with
        arguments other than prompts, `normalize_embeddings`, `truncate_dim` and the type of the
        result, run alone.

        Args:
            inputs: as `encode` (`predict`) takes them.
            priority: "query" runs before "bulk", which gets every fifth batch while both wait and
                is cut into batches, unless it runs alone.
            deadline: seconds from now until all of the call must have begun to run.
            **options: arguments of `encode` (`predict`).

        Returns:
            A future. Until it has a result, `cancel` drops what has not run. What `encode` would
            raise for these inputs, it raises, and DeadlineError.

        Raises:
            QueueFullError: calls wait, and with this one more than `queue.max_tokens` tokens or
                `queue.max_texts` texts would.
            QueueClosedError: `queue.close` was called.
            ValueError: `priority` or `deadline` is invalid.
        """
        check_turn(priority, deadline)
        try:
            work = self.work_of(inputs, options)
        except Exception as error:
            failed = Pending()
            failed.set_exception(error)
            return failed
        return self.queue.put(work, priority, deadline)

    async def _await(self, inputs: Any, **options: Any) -> Any:
        """:meth:`submit`, awaited; a task that is cancelled drops what has not run."""
        submit = partial(self.submit, inputs, **options)
        if not (isinstance(inputs, str) and len(inputs) <= _MANY_CHARACTERS) and not (
            isinstance(inputs, list) and sum(map(_size, inputs)) <= _MANY_CHARACTERS
        ):
            submitting = asyncio.ensure_future(asyncio.to_thread(submit))
            try:
                pending = await asyncio.shield(submitting)
            except asyncio.CancelledError:
                submitting.add_done_callback(_cancel)
                raise
        else:
            pending = submit()
        return await asyncio.wrap_future(pending)

    @torch.inference_mode()
    def work_of(self, inputs: Any, options: dict[str, Any]) -> Work:
        """What `encode(inputs, **options)` would run.

        Raises:
            InputError, ValueError, TokenIdError, ...: as `encode` would.
        """
        if self._key(options) is not None:
            texts, is_single, found, prompt = self._asked(inputs, dict(options))
            if isinstance(found, Pipeline) and texts:
                # What a prompt's name stands for may change before the call runs.
                options = {n: value for n, value in options.items() if n != "prompt_name"}
                options["prompt"] = prompt or ""
                work = self.packed_work(found, texts, options, prompt)
                work.is_single = is_single
                return work
        # What the caller gives or changes later is not meant.
        if isinstance(inputs, np.ndarray):
            inputs = inputs.copy()
        elif not isinstance(inputs, (str, dict, tuple)) and hasattr(inputs, "__iter__"):
            inputs = list(inputs)
        several = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        sizes = [1 + _size(text) // _CHARACTERS_PER_TOKEN for text in several]
        return Work(inputs, sizes, None, options, owner=self)

    def packed_work(
        self, pipeline: Pipeline, texts: list[Any], options: dict[str, Any], prompt: str | None
    ) -> Work:
        """What `encode(texts, **options)` would run, given checked texts and its pipeline.

        If the model has another one by the time that it runs, it tokenises the texts again.
        """
        tokens = tokens_of(pipeline, texts, prompt or "")
        return Work(
            Ready(texts, pipeline.tokenizer, tokens),
            tokens.lengths.tolist(),
            self._key(options),
            options,
            self._session.token_budget(pipeline),
            tokens.truncated,
            owner=self,
        )

    def _key(self, options: dict[str, Any]) -> frozenset[tuple[str, Any]] | None:
        """What calls that may share a batch have in common; None if this one shares none."""
        if not options.keys() <= self.mergeable:
            return None
        try:
            return frozenset(options.items())
        except TypeError:
            return None

    def _asked(
        self, inputs: Any, options: dict[str, Any]
    ) -> tuple[list[Any], bool, Pipeline | Unsupported, str | None]:
        """Checked inputs, whether they are a single one, what runs them and their prompt."""
        raise NotImplementedError


def _size(text: Any) -> int:
    try:
        return size_of(text)
    except TypeError:
        return 0


def _cancel(submitting: asyncio.Future[Pending]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
