"""The metrics of a running server for Prometheus. docs/serving.md lists every name.

HTTP requests are counted here. An engine counts its own tokens, queue, batch, cache and times in its own thread, and is
read at each scrape, so that a token costs nothing on the HTTP side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GAUGES = ("requests_running", "requests_waiting", "cache_blocks_used", "cache_blocks_total")
FINISHED = "finished_"
NAMES = {
    "cache_blocks_total": "cache_blocks",
    "requests": "requests_admitted",
    "rejected": "requests_rejected",
    "cached_tokens": "cached_prompt_tokens",
    "first_token_seconds": "time_to_first_token_seconds",
    "between_tokens_seconds": "inter_token_seconds",
}
HELP = {
    "requests_running": "Completions in the batch now",
    "requests_waiting": "Completions in the queue now",
    "cache_blocks_used": "Blocks of the key/value cache in use",
    "cache_blocks": "Blocks of the key/value cache",
    "requests_admitted": "Completions let into the queue",
    "requests_rejected": "Completions rejected because the queue was full",
    "preemptions": "Completions preempted because the cache was full",
    "restarts": "Times the engine's thread began anew after a failure",
    "steps": "Steps of the decoder",
    "rows": "Tokens put through the decoder, of prompts and answers",
    "prompt_tokens": "Tokens of prompts",
    "cached_prompt_tokens": "Of these, found in the cache",
    "completion_tokens": "Tokens generated",
    "draft_offered": "Draft tokens proposed",
    "draft_accepted": "Of these, accepted",
    "time_to_first_token_seconds": "From a completion's arrival to its first token",
    "inter_token_seconds": "Between two tokens of one completion",
    "queue_seconds": "From a completion's arrival to its place in the batch",
    "request_seconds": "From a completion's arrival to its end",
    "rows_per_step": "Tokens in one step of the decoder: the size of the batch",
}


class Metrics:
    """All measures of one server, in a registry of its own."""

    def __init__(self, models: Mapping[str, Any]) -> None:  # by name, what counts: an engine, or a queue
        self.registry = CollectorRegistry()
        labels = ("path", "method", "status", "model")
        self.requests = Counter("gulliver_http_requests", "HTTP requests answered", labels, registry=self.registry)
        self.seconds = Histogram(
            "gulliver_http_request_seconds",
            "From the arrival of an HTTP request to the end of its answer",
            ("path",),
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        self.active = Gauge("gulliver_http_requests_active", "HTTP requests being answered", registry=self.registry)
        ProcessCollector(registry=self.registry)
        self.registry.register(_Models(models))


class _Models(Collector):
    """Asks every model for its numbers when Prometheus asks."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Any] = {}

        def family(name: str, kind: Any) -> Any:
            shown = NAMES.get(name, name)
            text = HELP.get(shown, shown.replace("_", " "))
            return families.setdefault(shown, kind(f"gulliver_{shown}", text, labels=("model",)))

        ended = CounterMetricFamily("gulliver_completions", "Completions ended", labels=("model", "reason"))
        for model, measured in self._models.items():
            for name, value in measured.stats().items():
                if name.startswith(FINISHED):
                    ended.add_metric((model, name.removeprefix(FINISHED)), value)
                else:
                    kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
                    family(name, kind).add_metric([model], value)
            for name, histogram in measured.histograms().items():
                bounds = (*map(str, histogram.bounds), "+Inf")
                buckets = list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
                family(name, HistogramMetricFamily).add_metric([model], buckets, histogram.total)
        yield from (ended, *families.values())
