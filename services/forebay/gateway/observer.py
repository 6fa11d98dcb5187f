"""Who watches the requests of a gateway: metrics, explanations and, where asked for, traces."""

from __future__ import annotations

import importlib
from typing import Protocol
from urllib.parse import urlsplit

from forebay.core.clock import Deadline
from forebay.core.errors import ConfigurationError
from forebay.core.settings import GatewaySettings
from forebay.gateway.explanations import Explanations
from forebay.gateway.failure_log import log_failure
from forebay.gateway.metrics import GatewayMetrics
from forebay.gateway.timeline import RequestTimeline

OTLP_VARIABLE = "FOREBAY_GATEWAY_OTLP_ENDPOINT"
_CLOSE_S = 2.0


class SpanSink(Protocol):
    def record(self, timeline: RequestTimeline) -> None:
        """Of a request that has ended. Waits for nothing."""

    async def close(self, deadline: Deadline) -> None: ...


class Observer:
    """What both edges share. `spans` is None where no collector is set."""

    def __init__(
        self, metrics: GatewayMetrics, explanations: Explanations, spans: SpanSink | None = None
    ) -> None:
        self.metrics = metrics
        self.explanations = explanations
        self._spans = spans

    @classmethod
    def of(cls, settings: GatewaySettings) -> Observer:
        """Raises ConfigurationError for a collector that cannot be used."""
        return cls(
            GatewayMetrics(),
            Explanations(settings.explain_requests),
            span_sink(settings.otlp_endpoint) if settings.otlp_endpoint else None,
        )

    def begin(self, timeline: RequestTimeline) -> None:
        self.explanations.begin(timeline)

    def end(self, timeline: RequestTimeline) -> None:
        """Never fails: whoever watches must not harm what is watched."""
        self.explanations.end(timeline)
        if self._spans is None:
            return
        try:
            self._spans.record(timeline)
        except Exception as error:
            log_failure(timeline.internal_id, error)

    async def close(self) -> None:
        if self._spans is not None:
            await self._spans.close(Deadline.after(_CLOSE_S))


def span_sink(endpoint: str) -> SpanSink:
    """The one place that needs opentelemetry. Raises ConfigurationError."""
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigurationError(f"{OTLP_VARIABLE}: should be http://HOST:PORT or https://...")
    try:
        otel = importlib.import_module("forebay.gateway.otel")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("forebay"):
            raise
        raise ConfigurationError(f"{OTLP_VARIABLE} needs forebay[otel]") from error
    sink: SpanSink = otel.OtlpSpans(endpoint)
    return sink
