"""A worker's Prometheus metrics: durations observed as they happen, everything else read from the
worker's own description at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from forebay.core import clock
from forebay.rpc.v1 import worker_pb2
from forebay.worker.requests import WorkerRequest

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

_COUNTERS = {
    "prompt_tokens": "Prompt tokens computed here up to the next token, resumed answers' included.",
    "generation_tokens": "Tokens sampled here.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache, pulled ones included.",
    "preemptions": "Sequences preempted because no KV block was left.",
    "kv_bytes_sent": "KV bytes pushed to other workers.",
    "kv_bytes_received": "KV bytes received from other workers.",
    "kv_transfer_failures": "KV transfers that failed, sent or received.",
    "expired_leases": "Requests that ended because their gateway did not renew their lease.",
    "requests": "Requests accepted.",
    "kv_pulled_tokens": "Prompt tokens whose KV was fetched from another worker.",
    "kv_pull_failures": "Prompts that waited for KV from another worker in vain.",
}


class WorkerMetrics:
    """One registry per worker, so that several fit into one process."""

    def __init__(self, describe: Callable[[], worker_pb2.WorkerDescription]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_DescriptionCollector(describe))
        self._model_name = describe().model.id
        self._prefill_s = self._histogram(
            "forebay_request_prefill_time_seconds", "From acceptance to the first token."
        )
        self._decode_s = self._histogram(
            "forebay_request_decode_time_seconds", "From the first token to the last."
        )
        self._transfer_s = self._histogram(
            "forebay_kv_transfer_seconds", "From the first token to the receiver's commit."
        )

        self._handed_over = Counter(
            "forebay_handed_over_requests",
            "Requests given back to their gateways because the worker's time to drain was up.",
            ("model_name",),
            registry=self.registry,
        )
        self._handed_over.labels(self._model_name)

    def count_handed_over(self) -> None:
        self._handed_over.labels(self._model_name).inc()

    def observe_token(self, request: WorkerRequest, *, is_first: bool, is_last: bool) -> None:
        """Of one choice; the first token of the request's choices ends its first phase."""
        if is_first and not request.first_token_sent:
            request.first_token_sent = True
            self._prefill_s.labels(self._model_name).observe(clock.now() - request.since)
            request.since = clock.now()
        if is_last and not is_first:
            self._decode_s.labels(self._model_name).observe(clock.now() - request.since)

    def observe_transfer(self, seconds: float) -> None:
        self._transfer_s.labels(self._model_name).observe(seconds)

    def _histogram(self, name: str, documentation: str) -> Histogram:
        return Histogram(
            name, documentation, ("model_name",), buckets=_SECONDS, registry=self.registry
        )


class _DescriptionCollector(Collector):
    def __init__(self, describe: Callable[[], worker_pb2.WorkerDescription]) -> None:
        self._describe = describe

    def collect(self) -> Iterator[Metric]:
        worker = self._describe()
        labels = [worker.model.id]
        load, blocks = worker.load, worker.load.kv_blocks
        used_share = (blocks.used + blocks.leased + blocks.quarantined) / max(1, blocks.total)
        for name, documentation, value in (
            ("num_requests_running", "Sequences in the running batch.", load.num_running),
            ("num_requests_waiting", "Sequences waiting for a first step.", load.num_waiting),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used_share),
        ):
            gauge = GaugeMetricFamily(f"forebay_{name}", documentation, labels=["model_name"])
            gauge.add_metric(labels, value)
            yield gauge
        states = GaugeMetricFamily(
            "forebay_kv_blocks", "KV blocks by state.", labels=["model_name", "state"]
        )
        for state in ("free", "cached", "used", "leased", "quarantined"):
            states.add_metric([*labels, state], getattr(blocks, state))
        yield states
        for name, documentation in _COUNTERS.items():
            counter = CounterMetricFamily(f"forebay_{name}", documentation, labels=["model_name"])
            counter.add_metric(labels, getattr(worker.counters, name))
            yield counter
