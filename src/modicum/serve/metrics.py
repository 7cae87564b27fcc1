"""Figures for Prometheus: what the engine counts, read at each scrape, and how long requests took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from modicum.serve.worker import Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
COUNTERS = {
    "steps": "Engine steps.",
    "prompt_tokens": "Prompt tokens of admitted sequences.",
    "computed_tokens": "Tokens run through the model.",
    "cached_tokens": "Prompt tokens found in the prefix cache.",
    "generated_tokens": "Tokens sampled.",
    "drafted_tokens": "Tokens that a drafter guessed.",
    "accepted_tokens": "Guessed tokens that were right.",
    "preemptions": "Sequences whose cache was taken away.",
    "failures": "Steps that failed.",
    "thinnings": "Times a KV policy thinned a sequence's cache.",
}
GAUGES = {
    "running": "Sequences in the batch.",
    "waiting": "Sequences that wait.",
    "blocks": "Blocks of the cache.",
    "free_blocks": "Blocks not held by a sequence.",
    "remembered_blocks": "Free blocks whose prefix can be found again.",
    "used_bytes": "Bytes of held blocks.",
    "tokens_per_forward": "Tokens that a forward pass gave a sequence, on average since the start.",
}


class _EngineFigures(Collector):
    def __init__(self, worker: Worker):
        self._worker = worker

    def collect(self) -> Iterable[Any]:
        stats = self._worker.engine.stats()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"modicum_{name}", text, value=stats[name])
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"modicum_{name}", text, value=stats[name])
        yield GaugeMetricFamily("modicum_queued_requests", "Requests without a first token.", value=self._worker.queued)


class Metrics:
    """One registry per server, so that several can live in a process."""

    def __init__(self, worker: Worker):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(worker))
        self.requests = Counter(
            "modicum_http_requests",
            "HTTP requests by path and status.",
            ("path", "status"),
            registry=self._registry,
        )
        self.aborted = Counter("modicum_aborted_requests", "Requests whose client went away.", registry=self._registry)
        self.first_token = Histogram(
            "modicum_time_to_first_token_seconds",
            "From arrival to the first token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.per_token = Histogram(
            "modicum_time_per_output_token_seconds",
            "Mean over a request, after the first.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.whole = Histogram(
            "modicum_request_seconds",
            "From arrival to the last token.",
            buckets=SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
