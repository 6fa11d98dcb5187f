"""The openai package, sync and async, against a gateway on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import openai
import pytest
from gateway_fakes import MODEL, WAIT_S, Edges, FakeGenerator, running_edges

from forebay.core import errors
from forebay.gateway.generation import Chunk, Event, GenerationRequest

MESSAGES = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
async def edges() -> AsyncIterator[Edges]:
    async with running_edges(FakeGenerator()) as running:
        yield running


@pytest.fixture
async def client(edges: Edges) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{edges.server.http_port}/v1",
        api_key="none",
        max_retries=0,
        timeout=WAIT_S,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as opened:
        yield opened


async def in_thread(edges: Edges, work: object) -> object:
    """Runs `work(client)` with the synchronous client while the loop serves it."""

    def run() -> object:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{edges.server.http_port}/v1",
            api_key="none",
            max_retries=0,
            timeout=WAIT_S,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        ) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def test_a_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        n=2,
        logprobs=True,
        top_logprobs=2,
        stop="x",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    assert [choice.message.content for choice in answer.choices] == ["Hello world"] * 2
    assert answer.choices[1].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].token == "t2"
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.usage.total_tokens == 13
    assert answer._request_id
    assert answer.id.startswith("chatcmpl-")


async def test_a_streamed_chat(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, n=2
    )
    texts = {0: "", 1: ""}
    reasons: dict[int, str] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {0: "Hello world", 1: "Hello world"}
    assert reasons == {0: "stop", 1: "stop"}
    assert chunk.usage.completion_tokens == 6


async def test_the_streaming_helper_puts_the_answer_together(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=MESSAGES, n=2) as stream:
        answer = await stream.get_final_completion()
    assert [choice.message.content for choice in answer.choices] == ["Hello world"] * 2
    assert answer.choices[0].message.role == "assistant"


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[3].logprobs.token_logprobs[1] == -9999.0
    text = ""
    async for chunk in await client.completions.create(model=MODEL, prompt=[1, 2], stream=True):
        text += chunk.choices[0].text
    assert text == "Hello world"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "forebay"


async def test_the_synchronous_client(edges: Edges) -> None:
    def work(client: openai.OpenAI) -> tuple[str, str]:
        whole = client.chat.completions.create(model=MODEL, messages=MESSAGES)
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return whole.choices[0].message.content, streamed

    assert await in_thread(edges, work) == ("Hello world", "Hello world")


@pytest.mark.parametrize(
    ("fields", "class_", "param"),
    [
        ({"temperature": 5}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"model": "other"}, openai.NotFoundError, "model"),
    ],
)
async def test_refusals(
    edges: Edges, client: openai.AsyncOpenAI, fields: dict, class_: type, param: str
) -> None:
    wanted = {"model": MODEL, "messages": MESSAGES, **fields}
    with pytest.raises(class_) as caught:
        await client.chat.completions.create(**wanted)
    assert caught.value.param == param
    assert caught.value.request_id

    def work(sync: openai.OpenAI) -> None:
        with pytest.raises(class_):
            sync.chat.completions.create(**wanted)

    await in_thread(edges, work)


@pytest.mark.parametrize(
    ("failure", "class_"),
    [
        (errors.Overloaded("full", retry_after_s=7), openai.RateLimitError),
        (errors.Unavailable("gone"), openai.InternalServerError),
        (errors.DeadlineExceeded("late"), openai.InternalServerError),
    ],
)
async def test_failures(
    edges: Edges, client: openai.AsyncOpenAI, failure: errors.ForebayError, class_: type
) -> None:
    edges.generator.failure = failure
    with pytest.raises(class_) as caught:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    if isinstance(failure, errors.Overloaded):
        assert caught.value.response.headers["retry-after"] == "7"


async def test_a_rate_limited_client_retries_by_itself(edges: Edges) -> None:
    async def once_full(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        edges.generator.script = usual
        raise errors.Overloaded("full", retry_after_s=0.5)
        yield

    usual = edges.generator.script
    edges.generator.script = once_full
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{edges.server.http_port}/v1", api_key="none", timeout=WAIT_S
    ) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello world"
    assert len(edges.generator.requests) == 2


async def test_an_error_in_mid_stream_raises(edges: Edges, client: openai.AsyncOpenAI) -> None:
    async def failing(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "Hel", ())
        raise errors.WorkerLost("the worker is gone")

    edges.generator.script = failing
    text = ""
    with pytest.raises(openai.APIError, match="the worker is gone"):
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True
        ):
            text += chunk.choices[0].delta.content or ""
    assert text == "Hel"


async def test_closing_a_stream_ends_the_generation(
    edges: Edges, client: openai.AsyncOpenAI
) -> None:
    async def one_then_never(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "Hel", ())
        await asyncio.Event().wait()

    edges.generator.script = one_then_never
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    await anext(stream.__aiter__())
    await stream.close()
    await edges.closed()
