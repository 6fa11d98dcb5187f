"""Timelines as OpenTelemetry spans over OTLP/HTTP: request > prepare, queue, route, prefill,
transfer, decode. The only importer of opentelemetry, which comes with `forebay[otel]`.

Spans are made when a request has ended, from its own marks, and handed to the SDK's bounded queue;
its thread sends them. A collector that is slow, down or wrong costs spans and no request anything.
Sampling, batching and the exporter's headers are the SDK's own settings (OTEL_*).
"""

from __future__ import annotations

import asyncio
import threading
import time

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from forebay.core.clock import Deadline, now
from forebay.gateway.timeline import COMPLETED, LegEnd, LegTimeline, RequestTimeline
from forebay.gateway.timeline import Span as TimelineSpan

SERVICE_NAME = "forebay-gateway"
_PATH = "/v1/traces"
_CLOSE_TICK_S = 0.02


class OtlpSpans:
    """Implements `SpanSink`. `endpoint`: the collector's base URL, or that of its traces path."""

    def __init__(self, endpoint: str) -> None:
        url = endpoint.rstrip("/").removesuffix(_PATH) + _PATH
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=url))
        provider = TracerProvider(
            resource=Resource.create({"service.name": SERVICE_NAME}), shutdown_on_exit=False
        )
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("forebay.gateway")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, timeline: RequestTimeline) -> None:
        unix_ns = time.time_ns() - int(now() * 1e9)

        def ns(at: float) -> int:
            return unix_ns + int(at * 1e9)

        client = self._propagator.extract({"traceparent": timeline.traceparent}, Context())
        request = self._tracer.start_span(
            "request",
            client,
            SpanKind.SERVER,
            _request_attributes(timeline),
            start_time=ns(timeline.arrived_at),
        )
        if request.is_recording():
            inside = set_span_in_context(request, client)
            for part in timeline.spans():
                span = self._tracer.start_span(
                    part.phase.value,
                    inside,
                    attributes=_phase_attributes(timeline, part),
                    start_time=ns(part.began_at),
                )
                span.end(ns(part.ended_at))
            for leg in timeline.legs:
                if leg.end in (LegEnd.LOST, LegEnd.RETURNED) and leg.ended_at is not None:
                    request.add_event(f"leg {leg.end.value}", _broken(leg), ns(leg.ended_at))
            _set_status(request, timeline.outcome)
        request.end(ns(timeline.until))

    async def close(self, deadline: Deadline) -> None:
        """Sends what waits to be sent, as far as time allows."""
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        while closing.is_alive() and not deadline.expired:
            await asyncio.sleep(_CLOSE_TICK_S)


def _request_attributes(timeline: RequestTimeline) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.model": timeline.model,
        "gen_ai.usage.input_tokens": timeline.num_prompt_tokens,
        "gen_ai.usage.output_tokens": sum(choice.num_tokens for choice in timeline.choices),
        "forebay.request_id": timeline.request_id,
        "forebay.cached_tokens": timeline.num_cached_tokens,
        "forebay.num_choices": timeline.num_choices,
        "forebay.num_legs": timeline.num_legs,
        "forebay.outcome": timeline.outcome,
    }
    first_token_at = timeline.first_token_at
    if first_token_at is not None:
        attributes["forebay.ttft_s"] = first_token_at - timeline.arrived_at
    return attributes


def _phase_attributes(timeline: RequestTimeline, part: TimelineSpan) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {"forebay.request_id": timeline.request_id}
    if part.leg is not None:
        attributes["forebay.leg"] = part.leg
    if part.worker_id is not None:
        attributes["forebay.worker_id"] = part.worker_id
    return attributes


def _broken(leg: LegTimeline) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {"forebay.leg": leg.number}
    if leg.lost_worker is not None:
        attributes["forebay.worker_id"] = leg.lost_worker
    return attributes


def _set_status(request: Span, outcome: str) -> None:
    """By its code only: a message may quote the request."""
    if outcome != COMPLETED:
        request.set_status(Status(StatusCode.ERROR, outcome))
