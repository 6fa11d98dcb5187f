"""The gateway's Prometheus metrics. Names mirror vLLM's with our prefix."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from forebay.core.errors import ForebayError
from forebay.core.finish import FinishReason
from forebay.gateway.generation import Usage
from forebay.rpc.status import mapped

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

UNKNOWN_MODEL = ""
"""The label of requests that failed before their model was known: never a client's own text."""


class GatewayMetrics:
    """One registry per gateway, so that several live in one process (tests, simulation)."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.time_to_first_token = self._histogram(
            "forebay_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            _TTFT_BUCKETS,
        )
        self.inter_token_latency = self._histogram(
            "forebay_inter_token_latency_seconds",
            "Gap between two arrivals of tokens of one choice",
            _TOKEN_BUCKETS,
        )
        self.time_per_output_token = self._histogram(
            "forebay_request_time_per_output_token_seconds",
            "A request's mean time per token after the first",
            _TOKEN_BUCKETS,
        )
        self.e2e_latency = self._histogram(
            "forebay_e2e_request_latency_seconds",
            "From a request's arrival to its last token; successful requests only",
            _REQUEST_BUCKETS,
        )
        self.queue_time = self._histogram(
            "forebay_request_queue_time_seconds",
            "From a request's arrival until it has its workers",
            _TTFT_BUCKETS,
        )
        self.num_running = self._gauge(
            "forebay_num_requests_running", "Requests that have their workers and have not ended"
        )
        self.num_waiting = self._gauge(
            "forebay_num_requests_waiting", "Requests that wait for a place on a worker"
        )
        self.prompt_tokens = self._counter(
            "forebay_prompt_tokens_total", "Prompt tokens of successful requests"
        )
        self.generation_tokens = self._counter(
            "forebay_generation_tokens_total", "Tokens generated, of requests that failed as well"
        )
        self.migrations = self._counter(
            "forebay_request_migrations_total",
            "Times that a request went on elsewhere: its worker was lost, hung or drained, or its"
            " KV did not arrive",
        )
        self.success = self._counter(
            "forebay_request_success_total",
            "Requests that completed; the reason is the first choice's",
            "finished_reason",
        )
        self.errors = self._counter(
            "forebay_request_errors_total",
            "Requests that did not complete, by gRPC status code in lower case",
            "code",
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model_name"], registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["model_name", *labels], registry=self.registry)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def count_error(self, error: ForebayError, model: str = UNKNOWN_MODEL) -> None:
        self.errors.labels(model, mapped(error).grpc.name.lower()).inc()

    def begin(self, model: str, arrived_at: float) -> RequestRecord:
        return RequestRecord(self, model, arrived_at)


class RequestRecord:
    """Times of one running request, in seconds on the loop's clock. `end` exactly once."""

    def __init__(self, metrics: GatewayMetrics, model: str, arrived_at: float) -> None:
        self._metrics = metrics
        self._model = model
        self._arrived_at = arrived_at
        self._inter_token = metrics.inter_token_latency.labels(model)
        self._waiting: Gauge | None = metrics.num_waiting.labels(model)
        self._running = metrics.num_running.labels(model)
        self._first_at: dict[int, float] = {}
        self._last_at: dict[int, float] = {}
        self._num_tokens = 0
        self._waiting.inc()

    def placed(self, at: float) -> None:
        """The request leaves the queue; later calls have no effect."""
        if self._waiting is not None:
            self._waiting.dec()
            self._waiting = None
            self._running.inc()
            self._metrics.queue_time.labels(self._model).observe(at - self._arrived_at)

    def migrated(self) -> None:
        self._metrics.migrations.labels(self._model).inc()

    def tokens(self, choice: int, num_tokens: int, at: float) -> None:
        last_at = self._last_at.get(choice)
        if last_at is not None:
            self._inter_token.observe(at - last_at)
        else:
            if not self._first_at:
                self._metrics.time_to_first_token.labels(self._model).observe(at - self._arrived_at)
            self._first_at[choice] = at
        self._last_at[choice] = at
        self._num_tokens += num_tokens

    def succeed(self, reason: FinishReason, usage: Usage, at: float) -> None:
        metrics, model = self._metrics, self._model
        metrics.e2e_latency.labels(model).observe(at - self._arrived_at)
        metrics.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        metrics.success.labels(model, reason.value).inc()
        num_gaps = self._num_tokens - len(self._first_at)
        if num_gaps > 0:
            spent = sum(self._last_at[i] - first_at for i, first_at in self._first_at.items())
            metrics.time_per_output_token.labels(model).observe(spent / num_gaps)

    def fail(self, error: ForebayError) -> None:
        self._metrics.count_error(error, self._model)

    def end(self) -> None:
        if self._waiting is not None:
            self._waiting.dec()
        else:
            self._running.dec()
        self._metrics.generation_tokens.labels(self._model).inc(self._num_tokens)
