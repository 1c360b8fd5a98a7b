"""What the routes share: the models by name, the way of a call through a queue and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sbert_fast.errors import QueueFullError
from sbert_fast.pending import Pending, Priority
from sbert_fast.server.errors import ClientLeftError, Refusal
from sbert_fast.server.metrics import Metrics
from sbert_fast.server.models import Served
from sbert_fast.server.settings import Settings

# Characters beyond which the event loop does not wait for texts to be tokenised.
_MANY_CHARACTERS = 20_000
# A guess that is too small rather than too large, for refusals before texts are tokenised.
_CHARACTERS_PER_TOKEN = 8
_HEALTH_SECONDS = 10.0

Receive = Callable[[], Awaitable[Any]]


@dataclass(slots=True)
class Exchange:
    """A request on its way: what its client said of it beside the body, and what it took.

    Attributes:
        receive: tells, once the body is read, that the client has left.
        deadline: by `time.perf_counter`.
        priority: "query" or "bulk"; None leaves it to the number of tokens.
        method: "single" or "batch", for the metrics.
        tokenized, waited, computed: seconds.
    """

    receive: Receive
    started: float
    deadline: float
    priority: Priority | None = None
    method: str = "batch"
    texts: int = 0
    characters: int = 0
    tokens: int = 0
    tokenized: float = 0.0
    waited: float = 0.0
    computed: float = 0.0
    sizes: list[int] = field(default_factory=list)


class Service:
    """The models of a server and what they are asked.

    Args:
        models: the first embedding model and the first cross-encoder are the ones that requests
            mean which name none.
        settings: of the server.
    """

    def __init__(self, models: Sequence[Served], settings: Settings) -> None:
        self.settings = settings
        self.models = {served.name: served for served in models}
        if len(self.models) != len(models):
            raise ValueError("models must have names of their own: serve one of them as NAME=PATH")
        self.metrics = Metrics()
        self.metrics.watch(models)
        for served in models:
            served.queue.max_tokens = settings.queue_tokens
        self.running = 0
        self._health: asyncio.Task[bool] | None = None

    def find(self, kinds: Sequence[str], name: str | None = None) -> Served:
        """The model of a name, or the first of some kinds.

        Raises:
            Refusal: there is none.
        """
        told = {"embedding": "an embedding model", "sparse": "a sparse embedding model"}
        what = told.get(kinds[0], f"a {kinds[0]} model").replace("a reranker", "a re-ranker")
        if name is not None:
            found = self.models.get(name)
            if found is None:
                known = ", ".join(self.models)
                raise Refusal("model", f"there is no model of this name; there are: {known}")
            if found.kind not in kinds:
                raise Refusal("backend", f"model is not {what}")
            return found
        for kind in kinds:
            for served in self.models.values():
                if served.kind == kind:
                    return served
        raise Refusal("backend", f"model is not {what}")

    async def run(
        self,
        served: Served,
        inputs: list[Any],
        options: dict[str, Any],
        exchange: Exchange,
        *,
        truncate: bool = True,
        side: str = "right",
        most: int | None = None,
    ) -> Any:
        """The result of `encode` or `predict` for texts or pairs of them.

        Args:
            served: the model.
            inputs: checked texts or pairs of texts.
            options: further arguments of `encode` or `predict`.
            exchange: the request, to which tokens and times are added.
            truncate: whether texts that are too long are cut; otherwise they are refused.
            side: where they are cut.
            most: tokens that the request may have.

        Raises:
            Refusal: a text is empty, the texts are too long, or the deadline passed.
            ClientLeftError: there is nobody any more to answer.
            QueueFullError, SbertFastError: as the queue and its results raise them.
        """
        for index, each in enumerate(inputs):
            if not (each if isinstance(each, str) else any(each)):
                raise Refusal("empty", f"`inputs` cannot be empty, got an empty text at {index}")
        name = "predict" if served.kind in ("reranker", "classifier") else "embed"
        counts = self.metrics.kinds[name]
        counts[0].inc(len(inputs))
        characters = sum(len(i) if isinstance(i, str) else sum(map(len, i)) for i in inputs)
        exchange.texts += len(inputs)
        exchange.characters += characters
        self._check_room(served, characters)
        before = time.perf_counter()
        tokenize = partial(served.work_of, inputs, options, side, truncate=truncate)
        many = characters > _MANY_CHARACTERS
        work = await asyncio.to_thread(tokenize) if many else tokenize()
        exchange.tokenized += time.perf_counter() - before
        for size in work.sizes:
            self.metrics.input_length.observe(size)
        total = sum(work.sizes)
        if most is not None and total > most:
            told = f"the response would be too large: {total} tokens, of which {most} may be asked"
            raise Refusal("too_large", told)
        bulk = served.batch_tokens and total > served.batch_tokens
        priority: Priority = exchange.priority or ("bulk" if bulk else "query")
        left = max(0.0, exchange.deadline - time.perf_counter())
        pending = served.queue.put(work, priority, left)
        result = await _finished(pending, exchange.receive, left)
        exchange.tokens += total
        exchange.waited += pending.waited
        exchange.computed += pending.computed
        counts[1].inc(len(inputs))
        now = time.perf_counter() - exchange.started
        self.metrics.spent(name, now, exchange.tokenized, pending.waited, pending.computed)
        return result

    def _check_room(self, served: Served, characters: int) -> None:
        """Refuse early, before texts are tokenised, what the queue will refuse."""
        queue = served.queue
        if queue.waiting_tokens + characters // _CHARACTERS_PER_TOKEN > queue.max_tokens and (
            queue.waiting_texts
        ):
            raise QueueFullError("the queue is full", queue.seconds_to_wait)

    async def is_healthy(self) -> bool:
        """Whether every model gives the result that it gave at the start; those who ask at the same
        time get the same answer."""
        if self._health is None or self._health.done():
            self._health = asyncio.ensure_future(self._probe())
        return await asyncio.shield(self._health)

    async def _probe(self) -> bool:
        try:
            pending = [
                asyncio.wrap_future(served.queue.put(served.probe(), is_counted=False))
                for served in self.models.values()
            ]
            results = await asyncio.wait_for(asyncio.gather(*pending), _HEALTH_SECONDS)
        except Exception:
            return False
        pairs = zip(self.models.values(), results, strict=True)
        return all(served.is_as_expected(result) for served, result in pairs)


async def _finished(pending: Pending, receive: Receive, seconds: float) -> Any:
    """The result of a call, unless its client leaves or its deadline passes: then it is dropped."""
    waiting = asyncio.wrap_future(pending)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({waiting, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if leaving.done():
            raise ClientLeftError
        if pending.waited:
            # It runs: a batch takes less time than to start again would.
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            raise ClientLeftError
        raise Refusal("deadline", "the deadline passed before the model got to the request")
    finally:
        leaving.cancel()
        waiting.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
