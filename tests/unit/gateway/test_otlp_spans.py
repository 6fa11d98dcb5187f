"""Spans as a collector gets them."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from gateway_fakes import FakeGenerator as Generator
from gateway_fakes import edge_settings, hello, running_edges
from otlp_receiver import WAIT_S, Collector, attributes, collector
from timelines import decision

from forebay.core.clock import Deadline, now
from forebay.core.errors import ConfigurationError, Unavailable
from forebay.core.randomness import Rng
from forebay.core.settings import GatewaySettings
from forebay.gateway import observer
from forebay.gateway.explanations import Explanations
from forebay.gateway.generation import Chunk, Event, GenerationRequest
from forebay.gateway.metrics import GatewayMetrics
from forebay.gateway.observer import Observer, span_sink
from forebay.gateway.server import GatewayServer
from forebay.gateway.timeline import LegEnd, RequestTimeline

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"
CANARY = "canary-7f3a"


def moved_timeline(traceparent: str = "") -> RequestTimeline:
    """It was placed, lost its worker, was placed again and completed, 2 s after it had come."""
    request = RequestTimeline("client-1", "req-1", "m", 12, 1)
    request.arrived(now() - 2.0, traceparent)
    for continues in (None, 0):
        leg = request.new_leg((0,), continues=continues)
        leg.routed(decision(), 0.0)
        leg.placed("decode", "prefill")
        leg.first_token()
        leg.decode_began()
        if continues is None:
            leg.broke(LegEnd.LOST, "decode")
        else:
            leg.left(finished=True)
    request.got_tokens(0, 5, "stop")
    request.num_cached_tokens = 4
    request.ended("completed")
    return request


async def exported(found: Collector, *timelines: RequestTimeline) -> None:
    sink = span_sink(found.url)
    for timeline in timelines:
        sink.record(timeline)
    await sink.close(Deadline.after(10))


async def test_one_span_a_phase_under_one_a_request() -> None:
    with collector() as found:
        timeline = moved_timeline()
        await exported(found, timeline)
        request = next(span for span in found.spans() if span.name == "request")
        children = [span for span in found.spans() if span is not request]
    assert found.paths == ["/v1/traces"]
    assert request.parent_span_id == b""
    assert {span.parent_span_id for span in children} == {request.span_id}
    assert {span.trace_id for span in children} == {request.trace_id}
    phases = ["queue", "route", "prefill", "transfer", "decode"]
    assert [span.name for span in children] == ["prepare", *phases, *phases]
    assert [attributes(span).get("forebay.leg") for span in children] == [None] + [0] * 5 + [1] * 5
    assert attributes(children[3])["forebay.worker_id"] == "prefill"
    assert attributes(request) == {
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5,
        "forebay.request_id": "client-1",
        "forebay.cached_tokens": 4,
        "forebay.num_choices": 1,
        "forebay.num_legs": 2,
        "forebay.outcome": "completed",
        "forebay.ttft_s": pytest.approx(2.0, abs=0.5),
    }
    assert [event.name for event in request.events] == ["leg lost"]


async def test_times_are_the_timelines() -> None:
    with collector() as found:
        timeline = moved_timeline()
        await exported(found, timeline)
        spans = found.spans()
    request = next(span for span in spans if span.name == "request")
    children = [span for span in spans if span is not request]
    assert request.end_time_unix_nano - request.start_time_unix_nano == pytest.approx(
        (timeline.until - timeline.arrived_at) * 1e9, abs=1e3
    )
    for child, part in zip(children, timeline.spans(), strict=True):
        began_ns = child.start_time_unix_nano - request.start_time_unix_nano
        assert began_ns == pytest.approx((part.began_at - timeline.arrived_at) * 1e9, abs=1e3)
    assert abs(request.end_time_unix_nano - time.time_ns()) < 60e9


async def test_a_trace_that_the_client_began_goes_on() -> None:
    with collector() as found:
        await exported(found, moved_timeline(f"00-{TRACE_ID}-{PARENT_ID}-01"))
        request = next(span for span in found.spans() if span.name == "request")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)


async def test_a_trace_that_the_client_does_not_sample_is_not_sent() -> None:
    with collector() as found:
        await exported(found, moved_timeline(UNSAMPLED))
    assert found.exports == []


@pytest.mark.parametrize("path", ["", "/", "/v1/traces", "/v1/traces/"])
async def test_the_endpoint_with_and_without_its_path(path: str) -> None:
    with collector() as found:
        sink = span_sink(found.url + path)
        sink.record(moved_timeline())
        await sink.close(Deadline.after(10))
    assert found.paths == ["/v1/traces"]


async def test_failures_have_their_code_and_nothing_else() -> None:
    timeline = RequestTimeline("client-1", "req-1", "m", 12, 1)
    timeline.new_leg((0,))
    timeline.ended("resource_exhausted")
    with collector() as found:
        await exported(found, timeline)
        request = next(span for span in found.spans() if span.name == "request")
    assert (request.status.code, request.status.message) == (2, "resource_exhausted")


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://x", "http://", "127.0.0.1"])
def test_an_endpoint_that_is_none_is_refused_at_the_start(endpoint: str) -> None:
    settings = replace(GatewaySettings(), otlp_endpoint=endpoint)
    with pytest.raises(ConfigurationError, match="FOREBAY_GATEWAY_OTLP_ENDPOINT"):
        Observer.of(settings)


def test_without_the_package_the_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "forebay.gateway.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    with pytest.raises(ConfigurationError, match=r"OTLP_ENDPOINT needs forebay\[otel\]"):
        span_sink("http://127.0.0.1:1")


async def speaking(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    async for event in hello(request):
        yield replace(event, text=CANARY) if isinstance(event, Chunk) else event


async def failing(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    yield Chunk(0, CANARY, ())
    raise Unavailable(f"it broke at {CANARY}")


@pytest.mark.parametrize("script", [speaking, failing])
async def test_no_text_of_a_request_is_in_any_span(script: object) -> None:
    with collector() as found:
        settings = edge_settings(otlp_endpoint=found.url)
        async with running_edges(Generator(script), settings) as edges:  # type: ignore[arg-type]
            for stream in (False, True):
                answer = await edges.http.post(
                    "/v1/chat/completions",
                    json={
                        "model": "fake-model",
                        "messages": [{"role": "user", "content": CANARY}],
                        "stream": stream,
                    },
                    headers={"traceparent": CANARY, "x-secret": CANARY},
                )
                assert CANARY in answer.text
        sent = b"".join(export.SerializeToString() for export in found.exports)
    assert sent.count(b"request") >= 2
    assert CANARY.encode() not in sent


async def answered(settings: GatewaySettings, num_requests: int) -> None:
    """Stopping the gateway is part of it."""
    async with running_edges(Generator(), settings) as edges:
        for _ in range(num_requests):
            answer = await edges.chat()
            assert answer.status_code == 200


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "_CLOSE_S", 0.1)


@pytest.mark.usefixtures("impatient")
async def test_a_collector_that_is_not_there_harms_nobody() -> None:
    await answered(edge_settings(otlp_endpoint="http://127.0.0.1:9"), 3)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", [400, 500])
async def test_nor_does_one_that_refuses(status: int) -> None:
    with collector() as found:
        found.status = status
        await answered(edge_settings(otlp_endpoint=found.url), 2)
        assert await asyncio.to_thread(found.asked.wait, WAIT_S)


@pytest.mark.usefixtures("impatient")
async def test_nor_does_one_that_hangs() -> None:
    with collector() as found:
        found.answers.clear()
        await asyncio.wait_for(answered(edge_settings(otlp_endpoint=found.url), 2), 10)
        assert not found.exports


class Broken:
    """A sink with a bug."""

    def record(self, timeline: RequestTimeline) -> None:
        raise RuntimeError(CANARY)

    async def close(self, deadline: Deadline) -> None:
        pass


async def test_a_bug_in_a_sink_is_logged_without_its_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watching = Observer(GatewayMetrics(), Explanations(10), Broken())
    timeline = moved_timeline()
    watching.begin(timeline)
    watching.end(timeline)
    assert "request=req-1 failed: RuntimeError" in caplog.text
    assert CANARY not in caplog.text


async def test_a_server_takes_the_setting() -> None:
    with pytest.raises(ConfigurationError):
        GatewayServer(Generator(), edge_settings(otlp_endpoint="nonsense"), Rng(1))
