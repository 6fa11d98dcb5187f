"""Explanations of requests that real workers served over real gRPC: both edges, pools, the spans a
collector gets, and nowhere a word of prompt or answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import httpx
import pytest
from click.testing import CliRunner
from otlp_receiver import attributes, collector

from forebay.cli.main import main
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.settings import GatewaySettings, WorkerSettings
from forebay.gateway.server import GatewayServer
from forebay.rpc.v1 import inference_pb2 as pb
from forebay.rpc.v1 import inference_pb2_grpc
from forebay.worker.process import WorkerProcess
from test_platform_over_grpc import ENGINE, POOLS, Platform, platform, until

CANARY = "zanzibar-4711 "
ASKED = {"x-forebay-explain": "1"}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Gateway:
    def __init__(self, pools: Platform, server: GatewayServer, http: httpx.AsyncClient) -> None:
        self.pools = pools
        self.server = server
        self.http = http

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {
            "model": "sim",
            "messages": [{"role": "user", "content": CANARY * 10}],
            "max_tokens": 12,
            "seed": 3,
            "ignore_eos": True,
            **fields,
        }
        headers = {**ASKED, "traceparent": TRACEPARENT}
        answer = await self.http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer

    async def told(self, request_id: str) -> str:
        """What `forebay explain` prints."""
        url = f"http://127.0.0.1:{self.server.http_port}"
        arguments = ["explain", request_id, "--url", url]
        result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    async def worker_id(self, index: int) -> str:
        return (await self.pools.describe(index)).worker_id

    async def explain(self, request_id: str) -> dict[str, Any]:
        record: dict[str, Any] = (await self.http.get(f"/v1/requests/{request_id}/explain")).json()
        return record


@asynccontextmanager
async def gateway(
    valkey_url: str, otlp: str = "", roles: tuple[WorkerRole, ...] = POOLS, **engine: Any
) -> AsyncIterator[Gateway]:
    async with platform(valkey_url, roles, replace(ENGINE, **engine)) as pools:
        settings = GatewaySettings(http_port=0, grpc_port=0, otlp_endpoint=otlp)
        server = GatewayServer(pools.gateway, settings, Rng())
        await server.start()
        url = f"http://127.0.0.1:{server.http_port}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as http:
                yield Gateway(pools, server, http)
        finally:
            await server.stop(0.0)


async def test_pools(valkey_url: str) -> None:
    async with gateway(valkey_url) as edge:
        prefill, decode = await edge.worker_id(0), await edge.worker_id(1)
        answer = await edge.chat()
        record = await edge.explain(answer.headers["x-request-id"])
        names = [phase["name"] for phase in record["phases"]]
        assert names == ["prepare", "queue", "route", "prefill", "transfer", "decode"]
        ends = [phase["start_ms"] + phase["duration_ms"] for phase in record["phases"]]
        starts = [phase["start_ms"] for phase in record["phases"]]
        assert starts[1:] == pytest.approx(ends[:-1], abs=0.01)
        assert ends[-1] <= record["duration_ms"]
        assert record["choices"][0]["num_tokens"] == 12
        attempt = record["legs"][0]["attempts"][-1]
        assert (attempt["prefill"], attempt["decode"]) == (prefill, decode)
        assert set(attempt["scores"]) == {prefill, decode}
        assert attempt["routed_ms"] <= attempt["reserved_ms"] <= attempt["accepted_ms"]
        assert prefill in attempt["why"] and decode in attempt["why"]
        told = await edge.told(record["request_id"])
        assert attempt["why"] in told and "\ntransfer " in told
        route = json.loads(answer.headers["x-forebay-route"])
        assert (route["prefill"], route["decode"]) == (prefill, decode)
        assert route["scores"] == attempt["scores"]


async def test_a_cached_prompt_is_seen_as_such(valkey_url: str) -> None:
    async with gateway(valkey_url) as edge:
        answer = await edge.chat()

        async def expected() -> bool:
            nonlocal answer
            answer = await edge.chat()
            route = json.loads(answer.headers["x-forebay-route"])
            return max(route["matched_tokens"].values()) > 0

        await until(expected)
        usage = answer.json()["usage"]["prompt_tokens_details"]
        record = await edge.explain(answer.headers["x-request-id"])
        matched = record["legs"][0]["attempts"][0]["matched_tokens"]
        assert max(matched.values()) == record["num_cached_tokens"] == usage["cached_tokens"]


async def test_streams_and_choices(valkey_url: str) -> None:
    async with gateway(valkey_url) as edge:
        answer = await edge.chat(stream=True, n=3)
        comment, done = answer.text.removesuffix("\n\n").split("\n\n")[-2:]
        assert done == "data: [DONE]"
        line = json.loads(comment.removeprefix(": x-forebay-timeline "))
        record = await edge.explain(line["request_id"])
        assert [choice["num_tokens"] for choice in record["choices"]] == [12] * 3
        assert [choice["finish_reason"] for choice in record["choices"]] == ["length"] * 3
        assert line["phases"] == record["phases"]


async def test_a_stream_whose_worker_is_lost(valkey_url: str) -> None:
    roles = (WorkerRole.PREFILL, WorkerRole.DECODE)
    async with gateway(valkey_url, roles=roles, sim_time_scale=1.0) as edge:
        reading = asyncio.create_task(edge.chat(max_tokens=60))
        first, first_id = edge.pools.workers[1], await edge.worker_id(1)

        async def decodes() -> bool:
            return (await edge.pools.describe(1)).load.num_running > 0

        await until(decodes)
        settings = WorkerSettings(
            redis_url=valkey_url,
            role=WorkerRole.DECODE,
            engine=replace(ENGINE, sim_time_scale=1.0),
        )
        edge.pools.workers[1] = WorkerProcess(settings)
        await edge.pools.workers[1].start()
        await first.stop(0)
        answer = await reading
        record = await edge.explain(answer.headers["x-request-id"])
        assert record["outcome"] == "completed" and record["num_legs"] >= 2
        assert record["legs"][0]["decode"] == first_id
        assert record["legs"][0]["end"] in ("lost", "returned")
        last = record["legs"][-1]
        assert (last["decode"], last["end"]) == (await edge.worker_id(1), "finished")
        assert sum(choice["num_tokens"] for choice in record["choices"]) == 60
        told = await edge.told(record["request_id"])
        assert "Leg 1, choices 0, goes on " in told and "from leg 0: " in told


async def test_client_that_leaves(valkey_url: str) -> None:
    async with gateway(valkey_url, sim_time_scale=1.0) as edge:
        body = {"model": "sim", "prompt": CANARY, "max_tokens": 500, "stream": True}
        async with edge.http.stream("POST", "/v1/completions", json=body) as answer:
            await anext(answer.aiter_raw())
            request_id = answer.headers["x-request-id"]
            assert (await edge.explain(request_id))["outcome"] == "running"

        async def cancelled() -> bool:
            return (await edge.explain(request_id))["outcome"] == "cancelled"

        await until(cancelled)
        record = await edge.explain(request_id)
        assert record["legs"][0]["end"] == "left"


async def test_the_deadline(valkey_url: str) -> None:
    async with gateway(valkey_url, sim_time_scale=1.0) as edge:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.server.grpc_port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            message = pb.GenerateRequest(
                model="sim",
                text=CANARY,
                request_id="mine",
                sampling=pb.SamplingParams(max_tokens=2000, ignore_eos=True),
            )
            call = stub.Generate(message, timeout=0.3, metadata=(("x-forebay-explain", "1"),))
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in call:
                    pass

        async def over() -> bool:
            return (await edge.explain("mine"))["outcome"] != "running"

        await until(over)
        assert (await edge.explain("mine"))["outcome"] in ("deadline_exceeded", "cancelled")


async def test_spans_and_no_word_of_anybody_anywhere(
    valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with collector() as found:
        async with gateway(valkey_url, otlp=found.url) as edge:
            whole, streamed = await edge.chat(), await edge.chat(stream=True)
            said = whole.json()["choices"][0]["message"]["content"]
            request_id = whole.headers["x-request-id"]
            shown = [
                json.dumps(await edge.explain(request_id)),
                str(whole.headers),
                str(streamed.headers),
                next(line for line in streamed.text.split("\n") if line.startswith(": x-")),
                (await edge.http.get("/metrics")).text,
                caplog.text,
            ]
        exported = b"".join(export.SerializeToString() for export in found.exports)
        requests = [span for span in found.spans() if span.name == "request"]
    assert len(requests) == 2
    assert {span.trace_id.hex() for span in found.spans()} == {TRACEPARENT[3:35]}
    assert attributes(requests[0])["forebay.request_id"] == request_id
    names = {span.name for span in found.spans() if span.parent_span_id == requests[0].span_id}
    assert names == {"prepare", "queue", "route", "prefill", "transfer", "decode"}
    assert len(said) >= 8
    for word in (CANARY.strip(), said[:8]):
        assert json.dumps(word)[1:-1] not in "".join(shown)
        assert word.encode() not in exported
