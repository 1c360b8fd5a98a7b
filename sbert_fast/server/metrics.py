"""Metrics: those of text-embeddings-inference under its names, and ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from sbert_fast.server.errors import KINDS, Api, Refusal

if TYPE_CHECKING:
    from sbert_fast.server.models import Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# The buckets of text-embeddings-inference: durations from 15 microseconds to 15 seconds.
_SECONDS = [1e-5 * 1.5**step for step in range(1, 36)]
_SIZES = [2.0**power for power in range(13)]
_TOKENS = [2.0**power for power in range(21)]
_FILL = [step / 10 for step in range(1, 11)]
_PARTS = ("tokenization", "queue", "inference")
# prometheus_client ends the name of every counter in _total; those of TEI have no such end.
_TOTAL = re.compile(rb"^((?:# (?:HELP|TYPE) )?te_\w+?)_total(?=[ {])", re.MULTILINE)


class Metrics:
    """What a server counts and measures."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(name, told, labels, registry=registry)

        def histogram(name: str, told: str, buckets: list[float]) -> Histogram:
            return Histogram(name, told, buckets=buckets, registry=registry)

        self.requests = counter("te_request_count", "Requests", "method")
        self.successes = counter("te_request_success", "Requests that were answered", "method")
        self.failures = counter("te_request_failure", "Requests that were refused", "err")
        self.refused = counter("sbert_fast_refusals", "Refusals by status", "status")
        # A rate needs a value before the first failure.
        for kind in (*KINDS, "dropped"):
            self.failures.labels(kind)
        self.input_length = histogram("te_request_input_length", "Tokens of a text", _TOKENS)
        self.batch_size = histogram("te_batch_next_size", "Texts of a batch", _SIZES)
        self.batch_tokens = histogram("te_batch_next_tokens", "Tokens of a batch", _TOKENS)
        self.batch_fill = histogram(
            "sbert_fast_batch_fill", "Tokens of a batch, as a share of the most it may have", _FILL
        )
        self.padded = counter("sbert_fast_padded_tokens", "Tokens computed for padding: none")
        self.running = Gauge("sbert_fast_requests_running", "Requests now", registry=registry)
        self.kinds = {
            name: (
                counter(f"te_{name}_count", "Texts"),
                counter(f"te_{name}_success", "Texts that were answered"),
            )
            for name in ("embed", "predict")
        }
        self.seconds = {
            name: [
                histogram(f"te_{name}_duration", "Seconds of a request", _SECONDS),
                *(
                    histogram(f"te_{name}_{part}_duration", f"Seconds of {part}", _SECONDS)
                    for part in _PARTS
                ),
            ]
            for name in ("request", "embed", "predict")
        }

    def watch(self, models: Iterable[Served]) -> None:
        """Measure the batches of models, and tell of them whenever somebody asks."""
        models = list(models)
        for served in models:
            served.queue.on_batch = self._of_batches(served)
        self._registry.register(_OfModels(models))

    def _of_batches(self, served: Served) -> Any:
        def on_batch(texts: int, tokens: int, seconds: float) -> None:
            self.batch_size.observe(texts)
            self.batch_tokens.observe(tokens)
            if served.batch_tokens:
                self.batch_fill.observe(tokens / served.batch_tokens)

        return on_batch

    def failed(self, refusal: Refusal, api: Api) -> None:
        """Count a refusal."""
        self.failures.labels(refusal.kind).inc()
        self.refused.labels(str(refusal.status(api))).inc()

    def spent(self, name: str, total: float, *parts: float) -> None:
        """Observe the seconds of a request, and of its parts, in the order of `_PARTS`."""
        for kind in ("request", name):
            for seconds, amount in zip(self.seconds[kind], (total, *parts), strict=True):
                seconds.observe(amount)

    def text(self) -> bytes:
        """All metrics, in the text format of Prometheus."""
        return _TOTAL.sub(rb"\1", generate_latest(self._registry))


class _OfModels:
    """What models and their queues count themselves."""

    def __init__(self, models: list[Served]) -> None:
        self._models = models

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        size = GaugeMetricFamily("te_queue_size", "Texts that wait")
        size.add_metric([], sum(served.queue.waiting_texts for served in self._models))
        yield size
        gauges = {
            "queue_tokens": ("Tokens that wait", lambda queue: queue.waiting_tokens),
            "queue_max_tokens": ("Tokens that may wait", lambda queue: queue.max_tokens),
            "queue_seconds": ("How long what waits will take", lambda queue: queue.seconds_to_wait),
        }
        for name, (told, value) in gauges.items():
            gauge = GaugeMetricFamily(f"sbert_fast_{name}", told, labels=["model"])
            for served in self._models:
                gauge.add_metric([served.name], value(served.queue))
            yield gauge
        counted = [(served.name, served.stats) for served in self._models]
        for name in ("texts", "tokens", "batches", "truncated"):
            counter = CounterMetricFamily(
                f"sbert_fast_{name}", f"{name} of the packed engine", labels=["model"]
            )
            for model, stats in counted:
                counter.add_metric([model], getattr(stats, name))
            yield counter
        fallbacks = CounterMetricFamily(
            "sbert_fast_fallbacks", "Calls that sentence-transformers ran", labels=["model"]
        )
        for model, stats in counted:
            fallbacks.add_metric([model], sum(stats.fallbacks.values()))
        yield fallbacks
