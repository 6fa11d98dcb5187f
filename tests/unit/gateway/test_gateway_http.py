from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
from gateway_fakes import (
    MODEL,
    WAIT_S,
    Edges,
    FakeGenerator,
    chat_body,
    edge_settings,
    hello,
    running_edges,
    sse_data,
)

from forebay.core import errors
from forebay.core.finish import FinishReason
from forebay.gateway.generation import (
    ChatPrompt,
    ChoiceEnd,
    Chunk,
    Completion,
    Event,
    GenerationRequest,
    TextPrompt,
    TokenPrompt,
    Usage,
)


@pytest.fixture
async def edges() -> AsyncIterator[Edges]:
    async with running_edges(FakeGenerator()) as running:
        yield running


async def test_a_whole_chat_answer(edges: Edges) -> None:
    response = await edges.chat(n=2, temperature=0, seed=-3, max_completion_tokens=9)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"] == "chatcmpl-" + response.headers["x-request-id"]
    assert body["model"] == MODEL
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert choice["message"]["content"] == "Hello world"
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"] is None
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 6,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 4},
        "prompt_cache_hit_tokens": 4,
        "prompt_cache_miss_tokens": 3,
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    request = edges.generator.requests[0]
    assert request.seed == -3
    assert request.max_tokens == 9
    assert request.max_tokens_param == "max_completion_tokens"
    assert request.params.n == 2
    assert request.params.temperature == 0


async def test_messages_reach_the_template(edges: Edges) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": "two", "refusal": None, "unknown": 1},
        {
            "role": "user",
            "content": [{"type": "text", "text": "three"}, {"type": "text", "text": "\u0000é"}],
        },
    ]
    assert (await edges.chat(messages=messages)).status_code == 200
    prompt = edges.generator.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert list(prompt.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one", "name": "ann"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three\n\u0000é"},
    ]


async def test_every_sampling_parameter_arrives(edges: Edges) -> None:
    response = await edges.complete(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "6": 1.5},
        stop=["a", "b"],
        stop_token_ids=[3, 4],
        ignore_eos=True,
        logprobs=2,
        seed=2**63,
    )
    assert response.status_code == 200
    request = edges.generator.requests[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.repetition_penalty == 1.1
    assert params.logit_bias == {5: -100.0, 6: 1.5}
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (3, 4)
    assert params.ignore_eos
    assert params.top_logprobs == 2
    assert request.seed == 2**63
    assert request.max_tokens == 16


async def test_nulls_are_defaults(edges: Edges) -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "max_tokens", "logprobs", "stream")
    extras = ("tools", "tool_choice", "response_format", "audio", "logit_bias", "stream_options")
    response = await edges.chat(**dict.fromkeys(names + extras))
    assert response.status_code == 200
    assert edges.generator.requests[0].params == (await _default_request(edges)).params


async def _default_request(edges: Edges) -> GenerationRequest:
    await edges.chat()
    return edges.generator.requests[-1]


async def test_harmless_and_unknown_fields_are_ignored(edges: Edges) -> None:
    response = await edges.chat(
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        parallel_tool_calls=True,
        reasoning_effort="low",
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        no_such_field=[1, {"x": None}],
    )
    assert response.status_code == 200


async def test_several_prompts_at_once(edges: Edges) -> None:
    response = await edges.complete(prompt=["a", "b", [1, 2]], n=2)
    assert response.status_code == 200
    body = response.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert {choice["text"] for choice in body["choices"]} == {"Hello world"}
    assert body["usage"]["completion_tokens"] == 18
    assert body["usage"]["prompt_tokens"] == 21
    prompts = [request.prompt for request in edges.generator.requests]
    assert prompts == [TextPrompt("a"), TextPrompt("b"), TokenPrompt((1, 2))]
    assert len({request.request_id for request in edges.generator.requests}) == 3


async def test_several_prompts_are_streamed_with_their_indices(edges: Edges) -> None:
    async def named(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        assert isinstance(request.prompt, TextPrompt)
        yield Chunk(0, request.prompt.text, ())
        yield ChoiceEnd(0, FinishReason.LENGTH)
        yield Completion(Usage(1, 1, 0))

    edges.generator.script = named
    response = await edges.complete(prompt=["a", "b", "c"], stream=True)
    texts: dict[int, str] = {}
    *chunks, done = sse_data(response.text)
    assert done == "[DONE]"
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "a", 1: "b", 2: "c"}


async def test_one_failing_prompt_ends_all(edges: Edges) -> None:
    async def second_fails(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        if request.prompt == TextPrompt("b"):
            raise errors.Overloaded("no room", retry_after_s=2.5)
        await asyncio.Event().wait()
        yield Chunk(0, "", ())

    edges.generator.script = second_fails
    response = await edges.complete(prompt=["a", "b"])
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    await edges.closed()


async def test_models(edges: Edges) -> None:
    listing = (await edges.http.get("/v1/models")).json()
    assert [card["id"] for card in listing["data"]] == [MODEL]
    one = await edges.http.get(f"/v1/models/{MODEL}")
    assert one.json()["max_model_len"] == 4096
    missing = await edges.http.get("/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_health_and_readiness(edges: Edges) -> None:
    assert (await edges.http.get("/health")).status_code == 200
    assert (await edges.http.get("/ready")).status_code == 200
    edges.generator.ready = False
    assert (await edges.http.get("/ready")).status_code == 503
    assert (await edges.http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405)],
)
async def test_routes_that_are_not_there(edges: Edges, method: str, path: str, status: int) -> None:
    response = await edges.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("error", "status", "type_"),
    [
        (errors.InvalidRequest("bad", param="messages", code="x"), 400, "invalid_request_error"),
        (errors.NotFound("none", param="model"), 404, "invalid_request_error"),
        (errors.Overloaded("full", retry_after_s=0.2), 429, "overloaded_error"),
        (errors.DeadlineExceeded("late"), 504, "timeout_error"),
        (errors.Unavailable("gone"), 503, "unavailable_error"),
        (errors.WorkerLost("gone"), 503, "unavailable_error"),
        (errors.KvTransferError("lost"), 502, "server_error"),
        (errors.InternalError("bug"), 500, "server_error"),
    ],
)
@pytest.mark.parametrize("when", ["prepare", "first"])
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_event_have_their_status(
    edges: Edges, error: errors.ForebayError, status: int, type_: str, when: str, stream: bool
) -> None:
    async def failing(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        raise error
        yield

    if when == "prepare":
        edges.generator.failure = error
    else:
        edges.generator.script = failing
    response = await edges.chat(stream=stream)
    assert response.status_code == status
    body = response.json()["error"]
    assert body["message"] == error.message
    assert body["type"] == type_
    assert body["param"] == getattr(error, "param", None)
    assert ("retry-after" in response.headers) == (status in (429, 503))
    if status == 429:
        assert response.headers["retry-after"] == "1"
    assert edges.metric("forebay_num_requests_running", model_name=MODEL) == 0


@pytest.mark.parametrize("when", ["prepare", "first"])
async def test_a_bug_is_a_500_and_never_logs_the_prompt(
    edges: Edges, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    canary = "canary-7391"

    async def buggy(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        raise KeyError(canary)
        yield

    if when == "prepare":
        edges.generator.failure = KeyError(canary)
    else:
        edges.generator.script = buggy
    response = await edges.chat(messages=[{"role": "user", "content": canary}])
    assert response.status_code == 500
    assert canary not in response.text
    assert "KeyError" in caplog.text
    assert canary not in caplog.text
    edges.generator.failure, edges.generator.script = None, hello
    assert (await edges.chat()).status_code == 200


async def test_a_result_cut_by_the_engine_is_an_error(edges: Edges) -> None:
    async def aborted(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "Hel", ())
        yield ChoiceEnd(0, FinishReason.ABORT)
        yield Completion(Usage(1, 1, 0))

    edges.generator.script = aborted
    assert (await edges.chat()).status_code == 500


async def test_a_generation_that_just_stops_is_an_error(edges: Edges) -> None:
    async def silent(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "Hel", ())

    edges.generator.script = silent
    assert (await edges.chat()).status_code == 500
    streamed = [*sse_data((await edges.chat(stream=True)).text)]
    assert streamed[-1]["error"]["type"] == "server_error"


async def test_logprobs_of_a_chat(edges: Edges) -> None:
    choice = (await edges.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    first, second, third = choice["logprobs"]["content"]
    assert first == {
        "token": "t1",
        "logprob": -0.5,
        "bytes": [116, 49],
        "top_logprobs": [
            {"token": "t1", "logprob": -0.5, "bytes": [116, 49]},
            {"token": "t2", "logprob": -1.5, "bytes": [116, 50]},
        ],
    }
    assert second["logprob"] == -9999.0
    assert third["logprob"] == -0.25


async def test_logprobs_of_a_completion(edges: Edges) -> None:
    choice = (await edges.complete(logprobs=1)).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["t1", "t2", "t3"],
        "token_logprobs": [-0.5, -9999.0, -0.25],
        "text_offset": [0, 2, 4],
        "top_logprobs": [
            {"t1": -0.5, "t2": -1.5},
            {"t2": -9999.0, "t3": -9999.0},
            {"t3": -0.25, "t4": -1.25},
        ],
    }


async def test_any_content_type_and_a_byte_order_mark_are_taken(edges: Edges) -> None:
    raw = b'\xef\xbb\xbf{"model":"fake-model","prompt":"a"}'
    for headers in ({}, {"content-type": "text/plain"}):
        response = await edges.http.post("/v1/completions", content=raw, headers=headers)
        assert response.status_code == 200


async def test_metrics(edges: Edges) -> None:
    await edges.chat(n=2)
    await edges.chat(model="x" * 50)
    await edges.chat(temperature=9)
    model = {"model_name": MODEL}
    assert edges.metric("forebay_prompt_tokens_total", **model) == 7
    assert edges.metric("forebay_generation_tokens_total", **model) == 6
    assert edges.metric("forebay_request_success_total", finished_reason="stop", **model) == 1
    assert edges.metric("forebay_time_to_first_token_seconds_count", **model) == 1
    assert edges.metric("forebay_e2e_request_latency_seconds_count", **model) == 1
    assert edges.metric("forebay_request_time_per_output_token_seconds_count", **model) == 1
    assert edges.metric("forebay_inter_token_latency_seconds_count", **model) == 4
    unknown = {"model_name": ""}
    assert edges.metric("forebay_request_errors_total", code="not_found", **unknown) == 1
    assert edges.metric("forebay_request_errors_total", code="invalid_argument", **unknown) == 1
    text = (await edges.http.get("/metrics")).text
    assert "forebay_num_requests_running" in text
    assert "xxxx" not in text


async def test_running_requests_are_counted_until_they_end(edges: Edges) -> None:
    go_on = asyncio.Event()

    async def waiting(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        await go_on.wait()
        async for event in hello(request):
            yield event

    edges.generator.script = waiting
    call = asyncio.create_task(edges.chat())
    async with asyncio.timeout(WAIT_S):
        await edges.generator.started.wait()
    assert edges.metric("forebay_num_requests_running", model_name=MODEL) == 1
    go_on.set()
    assert (await call).status_code == 200
    assert edges.metric("forebay_num_requests_running", model_name=MODEL) == 0


async def test_draining_lets_running_requests_finish_and_refuses_new_ones() -> None:
    go_on = asyncio.Event()

    async def waiting(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "Hel", ())
        await go_on.wait()
        yield Chunk(0, "lo", ())
        yield ChoiceEnd(0, FinishReason.STOP)
        yield Completion(Usage(1, 2, 0))

    async with running_edges(FakeGenerator(waiting)) as edges:
        async with edges.http.stream(
            "POST", "/v1/chat/completions", json=chat_body(stream=True)
        ) as response:
            stop = asyncio.create_task(edges.server.stop(WAIT_S))
            while (await edges.http.get("/ready")).status_code != 503:
                await asyncio.sleep(0)
            refused = await edges.chat()
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            go_on.set()
            await response.aread()
        assert [*sse_data(response.text)][-1] == "[DONE]"
        await stop


async def test_what_outlives_the_drain_ends_with_an_error() -> None:
    async def endless(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "Hel", ())
        await asyncio.Event().wait()

    async with (
        running_edges(FakeGenerator(endless)) as edges,
        edges.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response,
    ):
        stop = asyncio.create_task(edges.server.stop(0.0))
        await response.aread()
        last = [*sse_data(response.text)][-1]
        assert last["error"]["type"] == "unavailable_error"
        await edges.closed()
        await stop


async def test_a_taken_port_is_a_configuration_error(edges: Edges) -> None:
    for taken in (
        edge_settings(http_port=edges.server.http_port),
        edge_settings(grpc_port=edges.server.grpc_port),
    ):
        with pytest.raises(errors.ConfigurationError, match=r"cannot listen on 127\.0\.0\.1:"):
            async with running_edges(FakeGenerator(), taken):
                pass


async def test_small_writes_are_not_held_back_by_the_kernel(edges: Edges) -> None:
    await edges.chat()
    (connection,) = edges.server._http.server_state.connections
    sock = connection.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
