"""The client against a real gRPC server in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from forebay.client import Event, ForebayClient
from forebay.core import errors
from forebay.deploy.ports import free_ports
from forebay.rpc.status import mapped, trailing_metadata
from forebay.rpc.v1 import inference_pb2 as pb
from forebay.rpc.v1 import inference_pb2_grpc

Script = Callable[[pb.GenerateRequest, Any], AsyncIterator[pb.GenerateResponse]]


class Scripted(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # type: ignore[override]
        async for response in self._script(request, context):
            yield response

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:  # type: ignore[override]
        return pb.ListModelsResponse(models=[pb.ModelCard(id="m", max_model_len=9, engine="sim")])


@asynccontextmanager
async def connected(script: Script) -> AsyncIterator[ForebayClient]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Scripted(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with ForebayClient(f"127.0.0.1:{port}") as client:
            yield client
    finally:
        await server.stop(None)


def chunk(text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(chunk=pb.GenerateChunk(text=text))


COMPLETE = pb.GenerateResponse(complete=pb.GenerateComplete(usage=pb.Usage(completion_tokens=2)))


async def test_chunks_then_complete() -> None:
    requests = []

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[Any]:
        requests.append(request)
        yield chunk("Par")
        yield chunk("is")
        yield COMPLETE

    events: list[Event] = []
    async with connected(script) as client:
        messages = [pb.ChatMessage(role="user", content="hi")]
        sampling = pb.SamplingParams(max_tokens=3)
        async for event in client.chat("m", messages, sampling):
            events.append(event)
    assert [type(event).__name__ for event in events] == [
        "GenerateChunk",
        "GenerateChunk",
        "GenerateComplete",
    ]
    assert events[-1] == COMPLETE.complete
    assert requests[0].chat.messages[0].content == "hi"
    assert requests[0].sampling.max_tokens == 3
    assert not requests[0].sampling.HasField("temperature")


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("bad", param="sampling.top_p", code="out_of_range"),
        errors.NotFound("no model", param="model"),
        errors.Overloaded("later", retry_after_s=2.5),
        errors.DeadlineExceeded("late"),
        errors.Unavailable("draining"),
        errors.InternalError("bug"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_arrive_as_they_were_raised(error: errors.ForebayError) -> None:
    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        yield chunk("x")
        code = mapped(error).grpc
        yield pb.GenerateResponse(error=pb.GenerateError(code=code.value[0], message="bad"))
        await context.abort(code, error.message, trailing_metadata(error))

    async with connected(script) as client:
        with pytest.raises(type(error)) as caught:
            async for _ in client.generate(pb.GenerateRequest(model="m", text="x")):
                pass
    assert caught.value.message == error.message
    for name in ("param", "code", "retry_after_s"):
        assert getattr(caught.value, name, None) == getattr(error, name, None)


async def test_a_stream_without_an_end_is_an_error() -> None:
    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        yield chunk("half")

    async with connected(script) as client:
        with pytest.raises(errors.InternalError, match="without completing"):
            async for _ in client.generate(pb.GenerateRequest(model="m", text="x")):
                pass


async def test_leaving_early_cancels_on_the_server() -> None:
    cancelled = asyncio.Event()

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        context.add_done_callback(lambda _: cancelled.set())
        while True:
            yield chunk("x")
            await asyncio.sleep(0)

    async with connected(script) as client:
        stream = client.chat("m", [pb.ChatMessage(role="user", content="hi")])
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.wait_for(cancelled.wait(), 10)


async def test_its_deadline_travels() -> None:
    remaining: list[float] = []

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        remaining.append(context.time_remaining())
        await asyncio.Event().wait()
        yield chunk("never")

    async with connected(script) as client:
        with pytest.raises(errors.DeadlineExceeded):
            async for _ in client.generate(pb.GenerateRequest(text="x"), timeout_s=0.3):
                pass
    assert 0 < remaining[0] < 1


async def test_list_models() -> None:
    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        yield COMPLETE

    async with connected(script) as client:
        cards = await client.list_models()
    assert [(card.id, card.max_model_len) for card in cards] == [("m", 9)]


async def test_nobody_there() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    async with ForebayClient(address) as client:
        with pytest.raises(errors.Unavailable, match=f"no gateway answers on {address}"):
            await client.list_models()
