"""What clients of both edges are told about their requests."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
import pytest
from gateway_fakes import (
    MODEL,
    WAIT_S,
    Edges,
    FakeGenerator,
    chat_body,
    edge_settings,
    running_edges,
    sse_data,
)

from forebay.core.errors import Overloaded, Unavailable
from forebay.gateway.generation import Chunk, Event, GenerationRequest
from forebay.rpc.v1 import inference_pb2 as pb
from forebay.rpc.v1 import inference_pb2_grpc

ASKED = {"x-forebay-explain": "1"}
CANARY = "canary-51e0"


async def overloaded(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    raise Overloaded(f"no place for {CANARY}", retry_after_s=3)
    yield


async def broken(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    yield Chunk(0, "Hel", ())
    raise Unavailable(f"lost {CANARY}")


async def post(edges: Edges, path: str = "chat/completions", **fields: object) -> Any:
    body = chat_body(**fields) if path.startswith("chat") else {"model": MODEL, **fields}
    return await edges.http.post(f"/v1/{path}", json=body, headers=ASKED)


async def explained(edges: Edges, request_id: str) -> dict[str, Any]:
    answer = await edges.http.get(f"/v1/requests/{request_id}/explain")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


async def test_nobody_is_told_who_did_not_ask() -> None:
    async with running_edges(FakeGenerator()) as edges:
        for value in ("0", "", "true", "11"):
            answer = await edges.http.post(
                "/v1/chat/completions", json=chat_body(), headers={"x-forebay-explain": value}
            )
            assert not [name for name in answer.headers if name.startswith("x-forebay")]
        streamed = await edges.chat(stream=True)
        assert "x-forebay" not in streamed.text


async def test_a_whole_answer_has_both_headers() -> None:
    async with running_edges(FakeGenerator()) as edges:
        answer = await post(edges, n=2)
        request_id = answer.headers["x-request-id"]
        route = json.loads(answer.headers["x-forebay-route"])
        timeline = json.loads(answer.headers["x-forebay-timeline"])
        record = await explained(edges, request_id)
        assert await explained(edges, answer.json()["id"]) == record
    assert route["request_id"] == timeline["request_id"] == record["request_id"] == request_id
    assert timeline["outcome"] == record["outcome"] == "completed"
    assert timeline["phases"] == record["phases"]
    assert record["num_choices"] == len(record["choices"]) == 2


async def test_a_stream_has_its_route_first_and_its_timeline_before_its_end() -> None:
    async with running_edges(FakeGenerator()) as edges:
        asked, plain = await post(edges, stream=True), await edges.chat(stream=True)
    assert "x-forebay-timeline" not in asked.headers
    assert json.loads(asked.headers["x-forebay-route"])["request_id"]
    comment, end = asked.text.removesuffix("\n\n").split("\n\n")[-2:]
    assert end == "data: [DONE]"
    assert comment.startswith(": x-forebay-timeline {")
    assert json.loads(comment.removeprefix(": x-forebay-timeline "))["outcome"] == "completed"
    assert len(list(sse_data(asked.text))) == len(list(sse_data(plain.text)))


async def test_usage_is_still_the_last_chunk() -> None:
    async with running_edges(FakeGenerator()) as edges:
        answer = await post(edges, stream=True, stream_options={"include_usage": True})
    *_, usage, done = sse_data(answer.text)
    assert done == "[DONE]" and usage["usage"]["total_tokens"] == 10  # type: ignore[index]
    assert answer.text.count("x-forebay-timeline") == 1


async def test_errors_are_explained_without_their_words() -> None:
    async with running_edges(FakeGenerator(overloaded)) as edges:
        answer = await post(edges)
        record = await explained(edges, answer.headers["x-request-id"])
    assert (answer.status_code, record["outcome"]) == (429, "resource_exhausted")
    assert answer.headers["retry-after"] == "3"
    assert json.loads(answer.headers["x-forebay-timeline"])["outcome"] == "resource_exhausted"
    assert CANARY not in json.dumps(record) + str(answer.headers)


async def test_a_stream_that_breaks_is_explained_before_its_error() -> None:
    async with running_edges(FakeGenerator(broken)) as edges:
        answer = await post(edges, stream=True)
    comment, end = answer.text.removesuffix("\n\n").split("\n\n")[-2:]
    assert json.loads(comment.removeprefix(": x-forebay-timeline "))["outcome"] == "unavailable"
    assert json.loads(end.removeprefix("data: "))["error"]["type"] == "unavailable_error"


async def test_a_request_that_was_never_begun_has_no_explanation() -> None:
    async with running_edges(FakeGenerator()) as edges:
        answer = await post(edges, temperature=9)
        missing = await edges.http.get(f"/v1/requests/{answer.headers['x-request-id']}/explain")
    assert answer.status_code == 400
    assert not [name for name in answer.headers if name.startswith("x-forebay")]
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "request_not_found"


async def test_each_prompt_of_several_has_its_own() -> None:
    async with running_edges(FakeGenerator()) as edges:
        answer = await post(edges, "completions", prompt=["a", "b", "c"])
        request_id = answer.headers["x-request-id"]
        whole = await edges.http.get(f"/v1/requests/{request_id}/explain")
        records = [await explained(edges, f"{request_id}-{i}") for i in range(3)]
    assert "several prompts" in whole.json()["error"]["message"]
    assert {record["outcome"] for record in records} == {"completed"}
    shown = json.loads(answer.headers["x-forebay-route"])
    assert [route["request_id"] for route in shown] == [f"{request_id}-0", f"{request_id}-1"]


async def test_memory_is_as_the_setting_says() -> None:
    async with running_edges(FakeGenerator(), edge_settings(explain_requests=1)) as edges:
        ids = [(await edges.chat()).headers["x-request-id"] for _ in range(2)]
        gone = await edges.http.get(f"/v1/requests/{ids[0]}/explain")
        assert gone.status_code == 404
        assert await explained(edges, ids[1])


async def test_a_request_under_way_is_explained_so_far() -> None:
    async with running_edges(FakeGenerator()) as edges:
        seen: list[dict[str, Any]] = []

        async def look(request: GenerationRequest) -> AsyncGenerator[Event, None]:
            seen.append(await explained(edges, request.request_id))
            raise Unavailable("enough")
            yield

        edges.generator.script = look
        await edges.chat()
    assert seen[0]["outcome"] == "running"


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_the_route_only_reads(method: str) -> None:
    async with running_edges(FakeGenerator()) as edges:
        answer = await edges.http.request(method, "/v1/requests/x/explain")
    assert answer.status_code == 405


async def call(edges: Edges, metadata: tuple[tuple[str, str], ...]) -> Any:
    async with grpc.aio.insecure_channel(edges.grpc_address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        message = pb.GenerateRequest(model=MODEL, text=CANARY, request_id="mine")
        answer = stub.Generate(message, timeout=WAIT_S, metadata=metadata)
        code = grpc.StatusCode.OK
        try:
            async for _ in answer:
                pass
        except grpc.aio.AioRpcError as error:
            code = error.code()
        first, last = await answer.initial_metadata(), await answer.trailing_metadata()
        return code, dict(first or ()), dict(last or ())


async def test_grpc_metadata() -> None:
    async with running_edges(FakeGenerator()) as edges:
        code, first, last = await call(edges, (("x-forebay-explain", "1"),))
        _, plain_first, plain_last = await call(edges, ())
        record = await explained(edges, "mine")
    assert code is grpc.StatusCode.OK
    assert json.loads(first["x-forebay-route"])["request_id"] == "mine"
    assert json.loads(last["x-forebay-timeline"])["outcome"] == "completed"
    assert "x-forebay-route" not in plain_first and "x-forebay-timeline" not in plain_last
    assert record["num_prompt_tokens"] == 7
    assert CANARY not in json.dumps([first, last, record])


async def test_grpc_errors_are_explained_as_well() -> None:
    async with running_edges(FakeGenerator(overloaded)) as edges:
        code, _, last = await call(edges, (("x-forebay-explain", "1"),))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert last["forebay-retry-after-ms"] == "3000"
    assert json.loads(last["x-forebay-timeline"])["outcome"] == "resource_exhausted"
