from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from gateway_fakes import MODEL, VOCAB_SIZE, WAIT_S, Edges, FakeGenerator, hello, running_edges
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from forebay.core import errors
from forebay.core.finish import FinishReason
from forebay.gateway.generation import (
    ChatPrompt,
    ChoiceEnd,
    Chunk,
    Event,
    GenerationRequest,
    TextPrompt,
    TokenPrompt,
)
from forebay.gateway.grpc_service import SERVICE_NAME
from forebay.rpc.v1 import inference_pb2 as pb
from forebay.rpc.v1 import inference_pb2_grpc


class Client:
    def __init__(self, edges: Edges) -> None:
        self.edges = edges
        self.channel = grpc.aio.insecure_channel(edges.grpc_address)
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def generate(self, **fields: Any) -> list[pb.GenerateResponse]:
        call = self.stub.Generate(request(**fields), timeout=WAIT_S)
        return [response async for response in call]

    async def refusal(
        self, message: pb.GenerateRequest
    ) -> tuple[grpc.aio.AioRpcError, list[pb.GenerateResponse]]:
        received: list[pb.GenerateResponse] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in self.stub.Generate(message, timeout=WAIT_S):
                received.append(response)
        return caught.value, received


def request(**fields: Any) -> pb.GenerateRequest:
    fields = fields if fields.keys() & {"token_ids", "chat"} else {"text": "Say hello.", **fields}
    return pb.GenerateRequest(**{"model": MODEL, **fields})


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with running_edges(FakeGenerator()) as edges:
        client = Client(edges)
        yield client
        await client.channel.close()


async def test_a_stream_ends_with_its_result(client: Client) -> None:
    *chunks, last = await client.generate(
        request_id="mine-1", sampling=pb.SamplingParams(n=2, top_logprobs=2, max_tokens=5)
    )
    assert {response.request_id for response in [*chunks, last]} == {"mine-1"}
    for choice in range(2):
        own = [c.chunk for c in chunks if c.chunk.choice == choice]
        assert "".join(chunk.text for chunk in own) == "Hello world"
        assert [i for chunk in own for i in chunk.token_ids] == [1, 2, 3]
        logprobs = [item for chunk in own for item in chunk.logprobs]
        assert [item.logprob for item in logprobs] == [-0.5, float("-inf"), -0.25]
        assert [top.token_id for top in logprobs[0].top] == [1, 2]
    assert last.complete == pb.GenerateComplete(
        choices=[pb.ChoiceResult(choice=i, finish_reason=pb.FINISH_REASON_STOP) for i in range(2)],
        usage=pb.Usage(prompt_tokens=7, completion_tokens=6, cached_tokens=4),
    )
    assert client.edges.generator.requests[0].max_tokens == 5


async def test_the_three_kinds_of_input(client: Client) -> None:
    await client.generate()
    await client.generate(token_ids=pb.TokenIds(ids=[1, 2]))
    message = pb.ChatMessage(role="user", content="hi")
    await client.generate(chat=pb.Chat(messages=[message]))
    prompts = [r.prompt for r in client.edges.generator.requests]
    assert prompts == [
        TextPrompt("Say hello."),
        TokenPrompt((1, 2)),
        ChatPrompt([{"role": "user", "content": "hi"}]),
    ]


async def test_sampling_and_deadline_arrive(client: Client) -> None:
    responses = await client.generate(
        sampling=pb.SamplingParams(
            temperature=0.0, seed=2**64 - 1, stop=["a"], logit_bias={3: -1.5}, ignore_eos=True
        )
    )
    seen = client.edges.generator.requests[0]
    assert responses[0].request_id == "req-chosen"
    assert seen.params.temperature == 0
    assert seen.params.stop == ("a",)
    assert seen.params.logit_bias == {3: -1.5}
    assert seen.params.ignore_eos
    assert seen.seed == 2**64 - 1
    assert seen.max_tokens is None
    assert seen.timeout_s is not None
    assert 0 < seen.timeout_s <= 1.01 * WAIT_S  # gRPC rounds a timeout up to three digits


async def test_no_deadline_is_none(client: Client) -> None:
    async for _ in client.stub.Generate(request()):
        pass
    assert client.edges.generator.requests[0].timeout_s is None


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (pb.GenerateRequest(), "model"),
        (pb.GenerateRequest(text="a"), "model"),
        (pb.GenerateRequest(model=MODEL), "input"),
        (pb.GenerateRequest(model=MODEL, text=""), "text"),
        (pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds()), "token_ids.ids"),
        (request(token_ids=pb.TokenIds(ids=[VOCAB_SIZE])), "token_ids.ids"),
        (pb.GenerateRequest(model=MODEL, chat=pb.Chat()), "messages"),
        (request(chat=pb.Chat(messages=[pb.ChatMessage()])), "messages[0].role"),
        (
            request(chat=pb.Chat(messages=[pb.ChatMessage(role="tool", content="x")])),
            "messages[0].role",
        ),
        (request(request_id="a b"), "request_id"),
        (request(request_id="a" * 129), "request_id"),
        *(
            (request(sampling=pb.SamplingParams(**{name: value})), name)
            for name, value in [
                ("temperature", NAN),
                ("temperature", INF),
                ("temperature", -1.0),
                ("top_p", NAN),
                ("top_p", 0.0),
                ("min_p", -INF),
                ("presence_penalty", NAN),
                ("frequency_penalty", 5.0),
                ("repetition_penalty", 0.0),
                ("max_tokens", 0),
                ("n", 0),
                ("n", 2**31),
                ("top_logprobs", 21),
                ("top_k", 2**32 - 1),
                ("stop", [""]),
                ("stop", ["a"] * 50),
                ("stop_token_ids", [VOCAB_SIZE]),
                ("stop_token_ids", [1] * 100),
                ("logit_bias", {VOCAB_SIZE: 1.0}),
                ("logit_bias", {1: NAN}),
                ("logit_bias", {i: 1.0 for i in range(301)}),
            ]
        ),
    ],
)
async def test_bad_input_names_the_field(
    client: Client, message: pb.GenerateRequest, param: str
) -> None:
    error, received = await client.refusal(message)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["forebay-param"] == param
    assert [response.WhichOneof("event") for response in received] == ["error"]
    assert received[0].error.param == param
    assert received[0].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert received[0].error.message == error.details()
    assert len(error.details()) < 300
    assert await client.generate()


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (errors.NotFound("none", param="model"), grpc.StatusCode.NOT_FOUND),
        (errors.Overloaded("full", retry_after_s=1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.WorkerLost("gone"), grpc.StatusCode.UNAVAILABLE),
        (errors.InvalidRequest("é" * 5000, param="messages"), grpc.StatusCode.INVALID_ARGUMENT),
        (KeyError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
@pytest.mark.parametrize("mid_stream", [False, True])
async def test_an_error_is_an_event_and_a_status(
    client: Client, failure: Exception, code: grpc.StatusCode, mid_stream: bool
) -> None:
    async def failing(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        if mid_stream:
            yield Chunk(0, "Hel", ())
        raise failure

    client.edges.generator.script = failing
    error, received = await client.refusal(request())
    assert error.code() is code
    assert "secret" not in (error.details() or "")
    assert received[-1].error.code == code.value[0]
    assert [r.WhichOneof("event") for r in received[:-1]] == ["chunk"] * mid_stream
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        raw = dict(error.trailing_metadata())["grpc-status-details-bin"]
        info = error_details_pb2.RetryInfo()
        assert status_pb2.Status.FromString(raw).details[0].Unpack(info)
        assert info.retry_delay.ToMilliseconds() == 1500
    client.edges.generator.script = hello
    assert await client.generate()


async def one_then_never(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    yield Chunk(0, "Hel", ())
    await asyncio.Event().wait()


async def never(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    await asyncio.Event().wait()
    yield Chunk(0, "", ())


async def all_but_the_result(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    yield Chunk(0, "Hel", ())
    yield ChoiceEnd(0, FinishReason.STOP)
    await asyncio.Event().wait()


@pytest.mark.parametrize("script", [never, one_then_never, all_but_the_result])
async def test_cancelling_closes_the_generation(client: Client, script: Any) -> None:
    generator = client.edges.generator
    generator.script = script
    call = client.stub.Generate(request(), timeout=WAIT_S)
    async with asyncio.timeout(WAIT_S):
        if script is not never:
            assert (await call.read()).chunk.text == "Hel"
        await generator.started.wait()
    assert generator.num_open == 1
    call.cancel()
    await client.edges.closed()
    assert generator.num_finished == 0
    assert client.edges.metric("forebay_num_requests_running", model_name=MODEL) == 0


async def test_a_client_whose_channel_goes_away_closes_the_generation(client: Client) -> None:
    client.edges.generator.script = one_then_never
    call = client.stub.Generate(request())
    await call.read()
    await client.channel.close()
    await client.edges.closed()


async def test_the_callers_deadline_ends_the_generation(client: Client) -> None:
    client.edges.generator.script = never
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in client.stub.Generate(request(), timeout=0.1):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await client.edges.closed()


async def test_a_reader_that_stalls_holds_the_generation_back(client: Client) -> None:
    num_events = 0

    async def flood(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        nonlocal num_events
        while True:
            num_events += 1
            yield Chunk(0, "x" * 10_000, ())

    client.edges.generator.script = flood
    call = client.stub.Generate(request(), timeout=1.0)
    await call.read()
    await client.edges.closed()
    assert num_events * 10_000 < 64 * 1024 * 1024
    call.cancel()


async def test_a_request_past_the_size_limit_is_refused(client: Client) -> None:
    error, _ = await client.refusal(request(text="x" * 300 * 1024))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await client.generate()


async def test_models(client: Client) -> None:
    response = await client.stub.ListModels(pb.ListModelsRequest())
    assert list(response.models) == [pb.ModelCard(id=MODEL, max_model_len=4096, engine="sim")]


async def test_health_follows_readiness(client: Client) -> None:
    stub: Any = health_pb2_grpc.HealthStub(client.channel)
    for name in ("", SERVICE_NAME):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=WAIT_S)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    client.edges.generator.ready = False
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


async def test_reflection_lists_the_services(client: Client) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    call = stub.ServerReflectionInfo(timeout=WAIT_S)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    await call.done_writing()
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= names


async def test_draining_lets_a_call_finish_and_refuses_new_ones(client: Client) -> None:
    go_on = asyncio.Event()

    async def waiting(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "Hel", ())
        await go_on.wait()
        async for event in hello(request):
            yield event

    client.edges.generator.script = waiting
    call = client.stub.Generate(request(), timeout=WAIT_S)
    await call.read()
    stop = asyncio.create_task(client.edges.server.stop(WAIT_S))
    async with asyncio.timeout(WAIT_S):
        while not client.edges.server._exchanges.draining:
            await asyncio.sleep(0)
    go_on.set()
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    assert responses[-1].WhichOneof("event") == "complete"
    await stop
    error, _ = await client.refusal(request())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
