"""A scripted generator, and both edges around it on loopback sockets of the test's own loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx

from forebay.core.errors import InvalidRequest, NotFound
from forebay.core.finish import FinishReason
from forebay.core.randomness import Rng
from forebay.core.settings import GatewaySettings
from forebay.engine.interface import SampledToken
from forebay.gateway.generation import (
    ChoiceEnd,
    Chunk,
    Completion,
    Event,
    GenerationRequest,
    ModelCard,
    Placed,
    TokenPrompt,
    Usage,
)
from forebay.gateway.server import GatewayServer
from forebay.gateway.timeline import RequestTimeline

MODEL = "fake-model"
VOCAB_SIZE = 1000
WAIT_S = 20.0
Script = Callable[[GenerationRequest], AsyncGenerator[Event, None]]


def token(token_id: int, logprob: float | None = None) -> SampledToken:
    top = () if logprob is None else ((token_id, logprob), (token_id + 1, logprob - 1))
    return SampledToken(token_id, logprob, top)


async def hello(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    """`Hello world` for every choice, three tokens each, the second without text of its own."""
    wants = request.params.top_logprobs is not None
    for choice in range(request.params.n):
        yield Chunk(choice, "Hello", (token(1, -0.5 if wants else None),))
        yield Chunk(choice, "", (token(2, float("-inf") if wants else None),))
        yield Chunk(choice, " world", (token(3, -0.25 if wants else None),))
        yield ChoiceEnd(choice, FinishReason.STOP)
    yield Completion(Usage(7, 3 * request.params.n, 4))


class FakeGeneration:
    def __init__(self, owner: FakeGenerator, request: GenerationRequest) -> None:
        self.request_id = request.request_id or "req-chosen"
        self.num_prompt_tokens = 7
        self.timeline = RequestTimeline(
            self.request_id,
            f"internal-{len(owner.requests)}",
            MODEL,
            num_prompt_tokens=self.num_prompt_tokens,
            num_choices=request.params.n,
        )
        self._owner = owner
        self._request = request

    def token_text(self, token_id: int) -> str:
        return f"t{token_id}"

    def token_bytes(self, token_id: int) -> bytes:
        return f"t{token_id}".encode()

    async def events(self) -> AsyncGenerator[Placed | Event, None]:
        self._owner.num_open += 1
        self._owner.started.set()
        try:
            yield Placed()
            async for event in self._owner.script(self._request):
                yield event
            self._owner.num_finished += 1
        finally:
            self._owner.num_open -= 1
            if self._owner.num_open == 0:
                self._owner.all_closed.set()


class FakeGenerator:
    """Implements Generator. `all_closed` is set once no iterator of events is open any more."""

    def __init__(self, script: Script = hello) -> None:
        self.script = script
        self.ready = True
        self.requests: list[GenerationRequest] = []
        self.num_open = 0
        self.num_finished = 0
        self.started = asyncio.Event()
        self.all_closed = asyncio.Event()
        self.failure: Exception | None = None

    def models(self) -> list[ModelCard]:
        return [ModelCard(MODEL, 4096, "sim", 1_700_000_000)]

    def prepare(self, request: GenerationRequest) -> FakeGeneration:
        if self.failure is not None:
            raise self.failure
        if request.model != MODEL:
            raise NotFound(f"no model {request.model}", param="model", code="model_not_found")
        replace(request.params, max_tokens=request.max_tokens or 16).validate(VOCAB_SIZE)
        if isinstance(request.prompt, TokenPrompt) and max(request.prompt.ids) >= VOCAB_SIZE:
            raise InvalidRequest(
                "prompt: token id outside the vocabulary", param=request.prompt_param
            )
        self.requests.append(request)
        return FakeGeneration(self, request)


class Edges:
    """Both edges, listening."""

    def __init__(self, generator: FakeGenerator, server: GatewayServer) -> None:
        self.generator = generator
        self.server = server
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.http_port}", timeout=WAIT_S, trust_env=False
        )

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.server.grpc_port}"

    async def chat(self, **fields: object) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=chat_body(**fields))

    async def complete(self, **fields: object) -> httpx.Response:
        body = {"model": MODEL, "prompt": "Say hello.", **fields}
        return await self.http.post("/v1/completions", json=body)

    async def closed(self) -> None:
        """Waits until the generator's iterators are closed."""
        async with asyncio.timeout(WAIT_S):
            await self.generator.all_closed.wait()

    def metric(self, name: str, **labels: str) -> float:
        value = self.server.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], **fields}


@asynccontextmanager
async def running_edges(
    generator: FakeGenerator, settings: GatewaySettings | None = None
) -> AsyncIterator[Edges]:
    settings = settings or edge_settings()
    server = GatewayServer(generator, settings, Rng(1))
    await server.start()
    edges = Edges(generator, server)
    try:
        yield edges
    finally:
        await edges.http.aclose()
        await server.stop(0.0)


def edge_settings(**changes: object) -> GatewaySettings:
    return replace(GatewaySettings(http_port=0, grpc_port=0, max_body_kib=256), **changes)


def sse_data(text: str) -> Iterator[dict[str, object] | str]:
    """The payloads of an event stream: objects, and `[DONE]` as it is."""
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            payload = block.removeprefix("data: ")
            yield payload if payload == "[DONE]" else json.loads(payload)
