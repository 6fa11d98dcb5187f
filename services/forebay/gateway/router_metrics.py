"""What a gateway's router knows and how it decided, read at scrape time."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from forebay.gateway.router import Router


class RouterCollector(Collector):
    """On the event loop only: what it reads has no locks."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        index, follower = self._router.index, self._router.follower
        for name, documentation, value in (
            ("kv_index_blocks", "KV blocks that the index finds.", index.num_blocks),
            ("kv_index_bytes", "Memory of the index of KV blocks.", index.num_bytes),
            ("kv_index_max_bytes", "Its bound.", index.max_bytes),
            (
                "kv_index_predictions",
                "Blocks expected on a worker by this gateway's own choice.",
                index.num_predictions,
            ),
            (
                "kv_index_staleness_seconds",
                "How far the index is behind the worker that it is furthest behind of.",
                follower.staleness_s,
            ),
            (
                "router_degraded",
                "1 while requests are routed by load and this gateway's own choices alone.",
                float(self._router.degraded),
            ),
            ("router_waiting_requests", "Requests that wait for one worker.", self._num_waits),
        ):
            yield GaugeMetricFamily(f"forebay_{name}", documentation, value)
        for name, documentation, count in (
            (
                "kv_events_applied",
                "Blocks stored or removed, as workers told.",
                follower.num_applied,
            ),
            ("kv_event_gaps", "Times that a batch of KV events was missing.", follower.num_gaps),
            (
                "kv_resyncs",
                "Snapshots that took the place of what was known.",
                follower.num_resyncs,
            ),
            ("kv_index_evictions", "Blocks forgotten for want of memory.", index.num_evictions),
        ):
            yield CounterMetricFamily(f"forebay_{name}", documentation, count)
        decisions = CounterMetricFamily(
            "forebay_router_decisions",
            "Tries to place a request on a pair of workers or one alone, with or without KV pulled"
            " from another worker.",
            labels=["kind"],
        )
        for kind, number in self._router.num_decisions.items():
            decisions.add_metric([kind], number)
        yield decisions

    @property
    def _num_waits(self) -> int:
        return len(self._router.waits)
